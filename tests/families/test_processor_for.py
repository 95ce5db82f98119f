"""One object on every module, as ``transformer.set_attn_processor(ParoProcessor(...))`` puts it."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideo15Transformer3DModel
from diffusers.models.attention_processor import Attention

from gen_accel.families import processor_for
from gen_accel.layout import TokenGrid, TokenLayout
from helpers import dits
from helpers.dense import Dense, difference


class Everywhere:
    """A policy that decides per call, from the module and its arguments alone."""

    def __init__(self, grid):
        self.grid = TokenGrid(*grid)
        self.attend = Dense()
        self.delegated = 0
        self.layouts = set()

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        rotary_emb=None,
        image_rotary_emb=None,
    ):
        rope = rotary_emb if image_rotary_emb is None else image_rotary_emb
        call = (hidden_states, encoder_hidden_states, attention_mask)
        match = processor_for(attn, encoder_hidden_states, attention_mask, rope)
        if match.processor is None:
            self.delegated += 1
            return match.stock(attn, *call, *(() if rope is None else (rope,)))
        self.attend.layout = match.processor.layout(self.grid, *call)
        self.layouts.add(self.attend.layout)
        return match.processor(self.attend, 0, match.stock)(attn, *call, rope)


def everywhere(model, policy):
    for module in model.modules():  # Cosmos has no set_attn_processor
        if hasattr(module, "set_processor"):
            module.set_processor(policy)


@pytest.mark.parametrize(
    ("build", "grid", "text", "delegated"),
    [
        (dits.wan, (5, 4, 6), {}, 2),
        (dits.animate, (5, 4, 6), {}, 3),
        (dits.chronoedit, (2, 4, 6), {}, 2),
        (dits.hunyuan, (5, 4, 6), {"text_after": 32, "text_valid": (7, 20)}, 1),
        (dits.flux, (1, 4, 6), {"text_before": 8}, 0),
        (dits.cosmos, (3, 4, 6), {}, 2),
        (dits.cosmos25, (3, 4, 6), {}, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_object_on_every_module(build, grid, text, delegated):
    model, inputs, layers = build()
    stock = model(**inputs).sample
    policy = Everywhere(grid)
    everywhere(model, policy)
    assert difference(model(**inputs).sample, stock) <= 1e-5
    assert policy.layouts == {TokenLayout(policy.grid, **text)}
    assert (len(policy.attend.calls), policy.delegated) == (layers, delegated)


def test_flux_grid_larger_than_the_call():
    model, inputs, _ = dits.flux()
    everywhere(model, Everywhere((1, 40, 60)))
    model.transformer_blocks = torch.nn.ModuleList()  # only single blocks have to infer the text
    with pytest.raises(ValueError, match="grid=1x40x60 has 2400 tokens, the call only 32"):
        model(**inputs)


def test_unknown_modules_are_refused():
    """The module class is shared by many models: a guess would be a wrong picture."""
    x, rope = torch.zeros(1, 8, 16), (torch.zeros(8, 16), torch.zeros(8, 16))
    cogvideox = (
        CogVideoXTransformer3DModel(
            num_attention_heads=1, attention_head_dim=16, num_layers=1, text_embed_dim=16
        )
        .transformer_blocks[0]
        .attn1
    )
    hunyuan15 = (
        HunyuanVideo15Transformer3DModel(
            num_attention_heads=1,
            attention_head_dim=16,
            num_layers=1,
            num_refiner_layers=1,
            rope_axes_dim=(4, 6, 6),
        )
        .transformer_blocks[0]
        .attn
    )
    square = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    sd3 = Attention(16, added_kv_proj_dim=16, context_pre_only=False, qk_norm="rms_norm")
    for attn, arguments in (
        (cogvideox, (x, None, rope)),
        (hunyuan15, (x, square, rope)),
        (sd3, (x, None, None)),
        (torch.nn.Linear(1, 1), (x, None, rope)),
    ):
        with pytest.raises(ValueError, match=r"cannot tell .* use gen_accel.apply"):
            processor_for(attn, *arguments)
