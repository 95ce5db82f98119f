"""torch.set_default_dtype and set_default_device are the caller's: no result depends on them."""

import contextlib

import pytest
import torch

from gen_accel.kernels import mass, pool, prepare, tail
from gen_accel.kernels.api import block_sparse_attention
from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.operands import operands
from gen_accel.kernels.quant import PRECISIONS
from gen_accel.kernels.route import route

TOKENS, HEADS, DIM, BLOCK = 300, 2, 8, 32
GRID = (5, 7, 8)  # the other 20 tokens are text


@contextlib.contextmanager
def half_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def nowhere_by_default():
    return torch.device("meta")  # what set_default_device enters


def inputs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, TOKENS, HEADS, DIM, generator=generator)
    mask = torch.rand(1, HEADS, 10, 10, generator=generator) < 0.4
    mask[..., 0] = True
    return q, k, v, mask


def places():
    return prepare.AxisPlaces.from_axes([(2, 0, 1), (1, 2, 0)], GRID, before=20)


def blocks(mask):
    return Blocks.from_mask(mask, q_len=TOKENS, kv_len=TOKENS, block_size=BLOCK)


def orders(q, k, v, mask):
    rows = mass.sample_rows(9, BLOCK, 9, q.device)
    raster = torch.arange(TOKENS, device=q.device)
    both = torch.stack([raster, raster.flip(0)])
    return mass.order_statistics(q, k, both, block=BLOCK, rows=rows, eps=1e-3)


def rectified(q, k, v, mask):
    scores = tail.block_scores(q, k, BLOCK, BLOCK, pooled=288, scale=0.3, parts=4, gapr=True)
    return scores, tail.rectify(v, blocks(mask), scores, pooled=288, gapr="paper")


def attention(impl, precision, stand_in):
    def call(q, k, v, mask):
        return block_sparse_attention(
            q, k, v, blocks(mask), places=places(), precision=precision, tail=stand_in, impl=impl,
            return_lse=True,
        )  # fmt: skip

    return call


CALLS = {
    "means": lambda q, k, v, mask: pool.group_means(q, 257, deviation=True, variance=True),
    "mass": lambda q, k, v, mask: mass.block_mass(q, k, block=BLOCK, blocks=9),
    "orders": orders,
    "places": lambda q, k, v, mask: places().places(TOKENS),
    "prepare": lambda q, k, v, mask: prepare.prepare(q.half(), places()),
    "route": lambda q, k, v, mask: route(mask.float(), keep=3, beta=1.0, forced=mask),
    "lists": lambda q, k, v, mask: (blocks(mask).mask(), blocks(mask).kept()),
    "stand-ins": lambda q, k, v, mask: tail.pool_keys(k, v, BLOCK, per_block=4, variance=True),
    "rectified": rectified,
    "codes": lambda q, k, v, mask: operands(q, k, v, PRECISIONS["int8+fp8"], places()),
    "gather": attention("gather", "auto", "joint"),
    "gather, int4": attention("gather", "int4", "rectified"),
    "reference": attention("reference", "int8+int8", "joint"),
}


def tensors(found):
    """All tensors of a result, in turn."""
    if isinstance(found, torch.Tensor):
        return [found]
    parts = found if isinstance(found, tuple) else getattr(found, "__dict__", {}).values()
    return [x for part in parts for x in tensors(part)]


@pytest.mark.parametrize("default", [half_by_default, nowhere_by_default])
@pytest.mark.parametrize("name", CALLS)
def test_defaults_change_nothing(name, default):
    given = inputs()
    expected = tensors(CALLS[name](*given))
    with default():
        found = tensors(CALLS[name](*given))
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
