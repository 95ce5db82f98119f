import pytest
import torch

from gen_accel.kernels import route as definition
from gen_accel.kernels.triton.route import route, to_lists
from helpers.kernels import DEVICE

pytestmark = pytest.mark.usefixtures("by_torch")

INF = float("inf")


def scores(columns):
    """Rows with ties, without spread, with blocks that do not exist, with both infinities."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(2, 3, 2, columns, generator=generator).round(decimals=1)
    x[0, 0, 0] = 1
    x[0, 0, 1, : columns // 2] = -INF
    x[0, 1, 0] = -INF
    x[0, 1, 1, ::3] = torch.nan
    x[1, 0, 0, :2] = INF
    x[1, 0, 1] = torch.where(x[1, 0, 1] > 0, 0.0, -0.0)
    return x.to(DEVICE)


@pytest.mark.parametrize("columns", [1, 5, 37, 300])
@pytest.mark.parametrize(
    "keep, beta, forcing",
    [(3, None, False), (0, 0.51, False), (7, 1.03, True), (0, None, True), (300, None, False)],
)
def test_lists_are_those_of_the_definition(columns, keep, beta, forcing):
    x, keep = scores(columns), min(keep, columns)
    generator = torch.Generator().manual_seed(1)
    forced = torch.rand(2, 1, 2, columns, generator=generator).to(DEVICE) < 0.2 if forcing else None
    width = keep if beta is None and not forcing else columns
    found = route(x, keep, beta, forced, width)
    right = definition.to_lists(definition._choose(x, keep, beta, forced), width)
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1])


def test_any_strides():
    x = scores(37).transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(37, 2, dtype=torch.bool, device=DEVICE)
    wide[::5] = True
    found = route(x, 4, None, wide.T, 37)
    right = definition.to_lists(definition._choose(x, 4, None, wide.T), 37)
    assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])


def test_the_operation_is_registered_well():
    args = (scores(5), 2, None, None, 2)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(route, args, test_utils=tests)
    torch.library.opcheck(to_lists, (scores(5) > 0, 5), test_utils=tests)
