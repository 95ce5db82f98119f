import pytest
import torch

from gen_accel.kernels.pool import Groups, group_means
from gen_accel.kernels.triton.pool import pool
from helpers.kernels import DEVICE

pytestmark = pytest.mark.usefixtures("by_torch")


def tokens(number, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, number, dim, generator=generator)
    return x.to(DEVICE, dtype).transpose(1, 2)  # heads first in memory, as the carriers hold it


def assert_same(found, right):
    for name in Groups._fields:
        mine, theirs = getattr(found, name), getattr(right, name)
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=2e-6, msg=name)


# A ragged end, an end of one token, one group, groups longer than a tile, a head that is no power
# of two.
@pytest.mark.parametrize(
    "number, size, dim",
    [(64, 8, 16), (60, 16, 64), (65, 64, 24), (7, 16, 8), (300, 130, 40), (5, 1, 128)],
)
@pytest.mark.parametrize("holes", [False, True])
def test_statistics_are_those_of_the_definition(number, size, dim, holes, poison):
    x = tokens(number, dim)
    real = None
    if holes:
        real = torch.rand(number, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.6
        real[:size] = False
    found = Groups(*pool(x, size, real, True, True))
    right = group_means(x.double(), size, real, deviation=True, variance=True)
    assert_same(found, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_fp32(dtype):
    x = tokens(120, 32, dtype)
    found = Groups(*pool(x, 48, None, True, True))
    assert_same(found, group_means(x.double(), 48, deviation=True, variance=True))


def test_what_was_not_asked_for_is_empty():
    mean, count, deviation, variance = pool(tokens(20, 16), 8, None, False, False)
    assert deviation.numel() == variance.numel() == 0 and count.tolist() == [8, 8, 4]


def test_channels_may_be_strided():
    x = tokens(40, 32)[..., ::2]
    torch.testing.assert_close(
        pool(x, 16, None, False, False)[0], group_means(x.double(), 16)[0].float()
    )


def test_the_operation_is_registered_well():
    args = (tokens(20, 16), 8, None, True, False)
    torch.library.opcheck(pool, args, test_utils=("test_schema", "test_faketensor"))
