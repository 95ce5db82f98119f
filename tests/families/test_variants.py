"""Relatives of the four models, and processors that must be left alone."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from gen_accel.families import family_of
from gen_accel.families.base import FamilyProcessor
from helpers import dits, tiny
from helpers.dense import Dense, Zero, difference, installed

TOLERANCE = 1e-5


@pytest.mark.parametrize(
    "build",
    [
        dits.vace,
        dits.animate,
        dits.chronoedit,
        dits.hunyuan_token_replace,
        dits.hunyuan_latent_concat,
        dits.cosmos25,
    ],
    ids=lambda build: build.__name__,
)
def test_transformer_equals_stock(build):
    model, inputs, layers = build()
    stock = model(**inputs).sample
    with installed(model, Dense()) as attend:
        assert difference(model(**inputs).sample, stock) <= TOLERANCE
    assert attend.layout is not None
    assert sorted({layer for layer, _ in attend.calls}) == list(range(layers))
    with installed(model, Zero()):
        assert difference(model(**inputs).sample, stock) > 100 * TOLERANCE


def left_alone(transformer):
    family = family_of(transformer)
    return {
        name: family.keep(name, module)
        for name, module in transformer.named_modules()
        if hasattr(module, "processor") and family.keep(name, module) is not None
    }


def test_what_is_left_alone_and_why():
    assert left_alone(tiny.wan_transformer(layers=1)) == {"blocks.0.attn2": "cross-attention"}
    assert left_alone(dits.animate()[0])["face_adapter.0"] == "cross-attention to the face"
    assert left_alone(tiny.hunyuan_transformer()) == {
        "context_embedder.token_refiner.refiner_blocks.0.attn": "token refiner (text only)"
    }
    assert left_alone(tiny.flux_transformer()) == {}
    for model in (tiny.cosmos_transformer(layers=1), dits.cosmos25()[0]):
        assert left_alone(model)["transformer_blocks.0.attn2"] == "cross-attention"


def test_unknown_and_accelerated_processors_are_left_alone():
    class Foreign:
        pass

    model = tiny.wan_transformer(layers=2)
    model.blocks[0].attn1.processor = Foreign()
    assert left_alone(model)["blocks.0.attn1"] == "Foreign is not known to the wan family"
    with installed(model, Dense()):
        assert left_alone(model)["blocks.1.attn1"] == "already accelerated"


def test_ip_adapter_is_left_alone():
    _, inputs, _ = dits.flux()
    model = tiny.flux_transformer(layers=1, single_layers=1)
    torch.manual_seed(0)
    adapter = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, num_tokens=(4,))
    model.transformer_blocks[0].attn.set_processor(adapter)
    assert left_alone(model) == {"transformer_blocks.0.attn": "IP-Adapter"}

    inputs["joint_attention_kwargs"] = {"ip_hidden_states": [dits.rand(1, 4, 32)]}
    stock = model(**inputs).sample
    with installed(model, Dense()) as attend:
        assert model.transformer_blocks[0].attn.processor is adapter
        assert isinstance(model.single_transformer_blocks[0].attn.processor, FamilyProcessor)
        assert difference(model(**inputs).sample, stock) <= TOLERANCE
    assert len(attend.calls) == 1


def test_loading_an_ip_adapter_later_says_what_to_do():
    """diffusers calls ``type(processor)()`` for the single-stream blocks."""
    model, _, _ = dits.flux()
    weights = {"ip_adapter": {}, "image_proj": {"proj.weight": torch.zeros(4, 4)}}
    model.transformer_blocks = torch.nn.ModuleList()
    with installed(model, Dense()), pytest.raises(TypeError, match=r"IP-Adapter.*remove\(\)"):
        model._convert_ip_adapter_attn_to_diffusers([weights])


@pytest.mark.parametrize("build", [dits.flux, dits.hunyuan])
def test_heads_follow_the_width_of_the_projections(build):
    """Under tensor parallelism a rank holds some heads, and ``attn.heads`` still says all."""
    model, inputs, _ = build()
    attn = model.single_transformer_blocks[0].attn
    halves = []
    for rank in range(2):
        half = copy.deepcopy(attn)
        for linear in (half.to_q, half.to_k, half.to_v):
            linear.weight.data = linear.weight[rank * 16 : rank * 16 + 16]
            linear.bias.data = linear.bias[rank * 16 : rank * 16 + 16]
        halves.append(half)
    video, text = dits.rand(2, 24, 32), dits.rand(2, 8, 32)
    rope = (dits.rand(24, 16), dits.rand(24, 16))
    encoder = None if build is dits.flux else text
    kind = family_of(model).processors[type(attn.processor).__name__]
    processor = kind(Dense(), 0, attn.processor)
    call = (video, encoder, None, rope)
    whole, parts = processor(attn, *call), [processor(half, *call) for half in halves]
    if encoder is None:
        assert difference(torch.cat(parts, dim=-1), whole) <= TOLERANCE
    else:
        for joined, expected in zip(zip(*parts), whole):
            assert difference(torch.cat(joined, dim=-1), expected) <= TOLERANCE
