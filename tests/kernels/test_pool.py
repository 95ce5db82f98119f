import pytest
import torch

from gen_accel.kernels.pool import group_means

SHAPES = [(64, 16), (60, 16), (7, 16), (65, 64)]


def tokens(number, dtype=torch.float64):
    return torch.randn(2, number, 3, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("number, size", SHAPES)
@pytest.mark.parametrize("holes", [False, True])
def test_each_group_is_what_its_tokens_are(number, size, holes):
    x = tokens(number)
    real = torch.rand(number, generator=torch.Generator().manual_seed(1)) < 0.6 if holes else None
    found = group_means(x, size, real, deviation=True, variance=True)
    assert len(found.count) == -(-number // size)
    for group, count in enumerate(found.count.tolist()):
        inside = torch.arange(number) // size == group
        own = x[:, inside if real is None else inside & real]
        assert own.shape[1] == count
        mean = own.mean(1)
        torch.testing.assert_close(found.mean[:, group], mean)
        away = own - mean[:, None]
        torch.testing.assert_close(found.deviation[:, group], away.abs().mean(1))
        torch.testing.assert_close(found.variance[:, group], away.square().mean(1))


def test_a_group_without_tokens_is_zero():
    real = torch.arange(64) >= 16
    found = group_means(tokens(64), 16, real, deviation=True, variance=True)
    assert found.count.tolist() == [0, 16, 16, 16]
    for x in (found.mean, found.deviation, found.variance):
        assert (x[:, 0] == 0).all() and (x[:, 1:] != 0).all()


def test_what_was_not_asked_for_is_none():
    found = group_means(tokens(64, torch.bfloat16), 16)
    assert found.deviation is None and found.variance is None
    assert found.mean.dtype == torch.float32
