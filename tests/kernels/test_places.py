"""Tokens in the model's order, block lists in another: the carriers put them there and back."""

import pytest
import torch

from gen_accel.kernels.api import block_sparse_attention
from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.prepare import AxisPlaces, prepare, restore
from helpers.kernels import DEVICE

GRID, TEXT, HEADS = (3, 4, 10), 9, 2
TOKENS = 120 + TEXT


def _case(before: int, keys: int):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, TOKENS, HEADS, 32, generator=generator).bfloat16().to(DEVICE)
    places = AxisPlaces.from_axes([(2, 0, 1), (1, 2, 0)], GRID, before, DEVICE)
    mask = torch.rand(1, HEADS, 9, -(-keys // 16), generator=generator) < 0.5
    blocks = Blocks.from_mask(mask.to(DEVICE), q_len=TOKENS, kv_len=keys, block_size=16)
    return q, k[:, :keys], v[:, :keys], blocks, places


@pytest.mark.parametrize("precision", ["auto", "int8", "bf16"])
@pytest.mark.parametrize("tail", ["drop", "joint"])
@pytest.mark.parametrize("impl", ["reference", "gather", "triton"])
def test_as_if_ordered_by_hand(impl, tail, precision):
    # Text before, and text behind of which the last four tokens are not attended to.
    for before, keys in ((TEXT, TOKENS), (0, TOKENS - 4)):
        q, k, v, blocks, places = _case(before, keys)
        options = dict(impl=impl, tail=tail, precision=precision, return_lse=True)
        out, lse = block_sparse_attention(q, k, v, blocks, places=places, **options)
        ordered = [prepare(x, places).transpose(1, 2) for x in (q, k, v)]
        expected, expected_lse = block_sparse_attention(*ordered, blocks, **options)
        expected = restore(expected.transpose(1, 2), places)
        at = places.places(TOKENS)[None].expand_as(lse)
        torch.testing.assert_close(out, expected, atol=0, rtol=0)
        torch.testing.assert_close(lse, expected_lse.gather(2, at), atol=0, rtol=0)


def test_in_a_compiled_graph():
    q, k, v, blocks, places = _case(TEXT, TOKENS)

    def call(q, k, v):
        return block_sparse_attention(q, k, v, blocks, places=places, impl="reference")

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v), atol=0, rtol=0)
