import itertools

import pytest
import torch

from gen_accel.kernels import prepare as definition
from gen_accel.kernels.prepare import (
    AxisPlaces,
    IndexPlaces,
    Norm,
    Rope,
    _flatten,
    _flatten_norm,
    _flatten_rope,
)
from gen_accel.kernels.triton.prepare import prepare, restore
from helpers.kernels import DEVICE

pytestmark = pytest.mark.usefixtures("by_torch")

GRID = (3, 4, 5)
VIDEO = 60
AXES = tuple(itertools.permutations(range(3)))


def tokens(before, after, dim, heads=9, dtype=torch.float32):
    """Nine heads are more than one program walks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, before + VIDEO + after, heads, dim, generator=generator)
    return x.to(DEVICE, dtype)


def orders(before, after):
    axes = [AXES[i % 6] for i in range(9)]
    yield None
    yield AxisPlaces.from_axes(axes, GRID, before, DEVICE)
    generator = torch.Generator().manual_seed(2)
    number = before + VIDEO + after
    place = torch.randperm(number + 11, generator=generator)[:number]
    token = torch.randint(number, (number + 11,), generator=generator)
    token[place] = torch.arange(number)
    yield IndexPlaces(token.to(DEVICE), place.to(DEVICE))


def ropes(before, dim):
    generator = torch.Generator().manual_seed(1)
    angle = (6 * torch.rand(VIDEO, dim // 2, generator=generator)).to(DEVICE)
    yield None
    twice = [t.repeat_interleave(2, 1) for t in (angle.cos(), angle.sin())]
    yield Rope(twice[0][:, ::2], twice[1][:, 1::2], before)
    yield Rope(angle.cos(), angle.sin(), before, halves=True)


def norms(dim, dtype=torch.float32):
    """One for each head of nine, and one across them."""
    generator = torch.Generator().manual_seed(3)
    for width in (dim, 9 * dim):
        yield Norm((0.5 + torch.rand(width, generator=generator)).to(DEVICE, dtype), 1e-3)


def pieces(places=None, rope=None, norm=None):
    return *_flatten(places), *_flatten_rope(rope), *_flatten_norm(norm)


@pytest.mark.parametrize("before, after, dim", [(0, 0, 16), (7, 0, 24), (0, 6, 128), (2, 3, 64)])
def test_result_is_that_of_the_definition(before, after, dim, poison):
    x = tokens(before, after, dim)
    for places, rope in itertools.product(orders(before, after), ropes(before, dim)):
        found = prepare(x, *pieces(places, rope))
        right = definition.prepare(x, places, rope)
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)
        back = restore(found, *_flatten(places))
        assert torch.equal(back, definition.restore(found, places))
        if rope is None:
            assert torch.equal(back, x)


@pytest.mark.parametrize("before, after, dim", [(0, 6, 24), (2, 3, 64)])
def test_norm_is_that_of_the_definition(before, after, dim, poison):
    x = tokens(before, after, dim)
    cases = itertools.product(orders(before, after), ropes(before, dim), norms(dim))
    for places, rope, norm in cases:
        found = prepare(x, *pieces(places, rope, norm))
        right = definition.prepare(x, places, rope, norm)
        torch.testing.assert_close(found, right, rtol=2e-6, atol=2e-6)


def test_one_row_may_be_far_larger_than_the_next():
    x = tokens(0, 0, 16) * torch.logspace(-6, 6, VIDEO, device=DEVICE)[:, None, None]
    for norm, rope in itertools.product(norms(16), ropes(0, 16)):
        found, right = (
            prepare(x, *pieces(None, rope, norm)),
            definition.prepare(x, None, rope, norm),
        )
        torch.testing.assert_close(found, right, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_and_turn_are_rounded_once(dtype):
    x = tokens(2, 3, 32, dtype=dtype)
    for rope, norm in itertools.product(ropes(2, 32), norms(32, dtype)):
        found = prepare(x, *pieces(None, rope, norm))
        wide = Norm(norm.weight.float(), norm.eps)
        right = definition.prepare(x.float(), None, rope, wide).to(x.dtype)
        torch.testing.assert_close(found, right, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(definition.prepare(x, None, rope, norm), right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_turned_in_fp32(dtype):
    x = tokens(2, 3, 32, dtype=dtype)
    for rope in ropes(2, 32):
        found = prepare(x, *pieces(None, rope))
        right = definition.prepare(x.float(), None, rope).to(x.dtype)
        torch.testing.assert_close(found, right, rtol=torch.finfo(dtype).eps, atol=0)


def test_strided_inputs():
    x = tokens(0, 0, 32).transpose(1, 2).contiguous().transpose(1, 2)
    for places in orders(0, 0):
        found = prepare(x[..., ::2], *pieces(places))
        assert torch.equal(found, definition.prepare(x[..., ::2], places))
        back = restore(found[..., ::2], *_flatten(places))
        assert torch.equal(back, definition.restore(found[..., ::2], places))


def test_the_operations_are_registered_well():
    x, places = tokens(0, 0, 16), list(orders(0, 0))[2]
    tests = ("test_schema", "test_faketensor")
    args = (x, *pieces(places, list(ropes(0, 16))[1], next(norms(16))))
    torch.library.opcheck(prepare, args, test_utils=tests)
    torch.library.opcheck(restore, (prepare(*args), *_flatten(places)), test_utils=tests)
