"""Codes made in one pass are those of the definition."""

import itertools

import pytest
import torch

from gen_accel.kernels import operands as definition
from gen_accel.kernels.prepare import AxisPlaces, IndexPlaces, Rope, _flatten, _flatten_rope
from gen_accel.kernels.quant import PRECISIONS, quantise_values
from helpers.kernels import DEVICE

from gen_accel.kernels.triton import quantise  # isort: skip

pytestmark = pytest.mark.usefixtures("by_torch")

GRID, BEFORE, TOKENS = (3, 4, 5), 7, 128  # sums over a power of two of 16-bit numbers are exact
AXES = tuple(itertools.permutations(range(3)))


def tensors(tokens=TOKENS, dim=16, heads=2, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, tokens, heads, dim, generator=generator)
    return [t.to(DEVICE, dtype) for t in x]


def axis_places(first=0):
    axes = [AXES[(first + i) % 6] for i in range(2)]
    return AxisPlaces.from_axes(axes, GRID, BEFORE, DEVICE)


def index_places():
    token = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    token = torch.cat([token, token[:28]])  # padding repeats tokens
    place = torch.empty(100, dtype=torch.long)
    place[token.flip(0)] = torch.arange(TOKENS).flip(0)
    return IndexPlaces(token.to(DEVICE), place.to(DEVICE))


def rope(halves, dim=16):
    angle = 6 * torch.rand(60, dim // 2, generator=torch.Generator().manual_seed(1))
    return Rope(angle.cos().to(DEVICE), angle.sin().to(DEVICE), BEFORE, halves)


CASES = {
    "as it stands": (TOKENS, None, None),
    "axis order": (TOKENS, axis_places(), None),
    "axis order, rope": (TOKENS, axis_places(2), rope(False)),
    "axis order, rope of halves": (TOKENS, axis_places(4), rope(True)),
    "index with padding, rope": (100, index_places(), rope(False)),
    "rope": (TOKENS, None, rope(True)),
}


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_the_definition(case, poison):
    tokens, places, turn = CASES[case]
    q, k, v = tensors(tokens)
    for name in ("int8+int8", "int8+fp8") if case == "axis order, rope" else ("int8+int8",):
        same(definition.operands, quantise.operands, q, k, v, PRECISIONS[name], places, turn)


def same(one, other, *arguments):
    right, found = one(*arguments), other(*arguments)
    for a, b in zip(right, found):
        if isinstance(a, definition.Codes):
            assert torch.equal(a.codes.view(torch.int8), b.codes.view(torch.int8))
            # On a GPU torch multiplies by the reciprocal of a number it is to divide by.
            torch.testing.assert_close(a.scale, b.scale, rtol=2e-7, atol=0)
            assert a.rows == b.rows
            assert a.codes.dtype == b.codes.dtype
        elif isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert a == b


@pytest.mark.parametrize("name", ["int8", "int8+int8", "int8+fp8"])
def test_odd_sizes(name):
    """93 tokens: the mean rounds otherwise, and with it a code now and then."""
    q, k, v = tensors(93, dim=24, dtype=torch.float32)
    k[:, 32:64] = 0  # less the mean, like everything else
    right = definition.operands(q, k, v, PRECISIONS[name])
    found = quantise.operands(q, k, v, PRECISIONS[name])
    for a, b in ((right.q, found.q), (right.k, found.k), (right.v, found.v)):
        if a is not None:
            torch.testing.assert_close(a.scale, b.scale, rtol=1e-6, atol=0)
            wrong = a.codes.view(torch.int8) != b.codes.view(torch.int8)
            assert float(wrong.float().mean()) < 1e-3
    if name == "int8":
        assert found.v is None and torch.equal(found.values, v)
    else:
        assert found.v.codes.shape == (1, 2, 24, 128) and found.values is None
        assert not found.v.codes.view(torch.int8)[..., 112:].any()


def test_values_stand_as_the_product_takes_them():
    v = tensors(64)[2]
    codes = quantise_values(v, "int8", 64).codes
    turned = definition.turn(codes)
    keys = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert torch.equal(turned[0, 1, :, 16:32], codes[0, [16 + key for key in keys], 1].T)


def test_zeros_and_plain_keys():
    q, k, v = tensors()
    q[:, :32], k[:, :64], v[:, 64:] = 0, 0, 0
    plain = PRECISIONS["int8+int8"]._replace(smooth_k=False)
    same(definition.operands, quantise.operands, q, k, v, plain)
    assert quantise.operands(q, k, v, plain).k_mean is None


def test_the_operation_is_registered_well():
    q, k, v = tensors(64)
    how = ("int8", 32, 64, True, True)
    arguments = (q, k, v, *how, *_flatten(None), *_flatten_rope(None))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(quantise.quantise, arguments, test_utils=tests)
