"""diffusers changes; these tests say where before a picture does."""

import inspect

import pytest
from diffusers.models.transformers import (
    transformer_cosmos,
    transformer_flux,
    transformer_hunyuan_video,
    transformer_wan,
)

from gen_accel.families import families

JOINT = ("hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb")
STOCK = {
    "WanAttnProcessor": (transformer_wan, (*JOINT[:3], "rotary_emb")),
    "HunyuanVideoAttnProcessor2_0": (transformer_hunyuan_video, JOINT),
    "FluxAttnProcessor": (transformer_flux, JOINT),
    "CosmosAttnProcessor2_0": (transformer_cosmos, JOINT),
}


def arguments(processor):
    return tuple(inspect.signature(processor.__call__).parameters)[2:]  # after self, attn


@pytest.mark.parametrize("name", STOCK)
def test_stock_signature_is_the_one_we_wrote_for(name):
    module, expected = STOCK[name]
    actual = arguments(getattr(module, name))
    assert actual == expected, (
        f"diffusers changed {name}.__call__ from {expected} to {actual}: compare its body with the "
        "processor of the family that lists it, add the argument there, then update this test"
    )


def test_every_processor_names_the_arguments_of_its_stock_processor():
    """diffusers drops keywords that __call__ does not name; lost RoPE is only a log line."""
    served = {name: ours for family in families() for name, ours in family.processors.items()}
    assert set(served) == set(STOCK)
    for name, ours in served.items():
        assert arguments(ours) == STOCK[name][1], f"{ours.__name__} does not match {name}"
