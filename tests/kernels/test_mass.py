import math

import pytest
import torch

from gen_accel.kernels.mass import block_mass, order_statistics, sample_rows
from gen_accel.layout import TokenGrid
from gen_accel.order.axis import AXIS_ORDERS, axis_permutation


def full_map(q, k):
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * q.shape[-1] ** -0.5
    return scores.softmax(-1)


def structured(tokens, heads=3, dim=16, batch=2, keys=None):
    torch.manual_seed(0)
    base = torch.randn(1, max(tokens, keys or 0), 1, dim).cumsum(1) * 0.2
    q = base[:, :tokens] + 0.5 * torch.randn(batch, tokens, heads, dim)
    k = base[:, : keys or tokens] + 0.5 * torch.randn(batch, keys or tokens, heads, dim)
    return q, k


@pytest.mark.parametrize("tokens, keys, block", [(96, 96, 16), (100, 117, 16), (64, 64, 32)])
def test_block_mass_is_the_mean_of_the_tiles(tokens, keys, block):
    q, k = structured(tokens, keys=keys)
    blocks = tokens // block
    mass = block_mass(q, k, block=block, blocks=blocks)
    p = full_map(q, k).mean(0)[:, : blocks * block, : blocks * block]
    tiles = p.view(3, blocks, block, blocks, block).sum(-1).mean(2)
    torch.testing.assert_close(mass.double(), tiles, atol=1e-6, rtol=1e-5)


def test_a_log_sum_exp_that_is_known_is_used():
    q, k = structured(96)
    lse = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(q.shape[-1] ** -0.5).logsumexp(-1)
    right = block_mass(q, k, block=16, blocks=6, rows_per_block=4)
    found = block_mass(q, k, block=16, blocks=6, rows_per_block=4, lse=lse)
    torch.testing.assert_close(found, right)
    twice = block_mass(q, k, block=16, blocks=6, rows_per_block=4, lse=lse - 1)
    torch.testing.assert_close(twice, math.e * right)


def test_chunks_do_not_change_the_result(monkeypatch):
    q, k = structured(96)
    whole = block_mass(q, k, block=16, blocks=6)
    monkeypatch.setattr("gen_accel.kernels.mass._CHUNK_ELEMENTS", 96 * 16)
    torch.testing.assert_close(block_mass(q, k, block=16, blocks=6), whole)


def test_sampled_rows_estimate_the_mass():
    q, k = structured(512)
    exact = block_mass(q, k, block=32, blocks=16)
    sampled = block_mass(q, k, block=32, blocks=16, rows_per_block=8)
    # The sampling error shrinks with the root of the rows; eight rows of smooth maps are plenty.
    error = (sampled - exact).abs().sum(-1).mean()
    coarse = block_mass(q, k, block=32, blocks=16, rows_per_block=1)
    assert error < 0.5 * (coarse - exact).abs().sum(-1).mean()
    assert error < 0.1
    torch.testing.assert_close(
        block_mass(q, k, block=32, blocks=16, rows_per_block=32), exact, msg="32 of 32 rows = all"
    )


def test_rows_are_spread_over_each_block():
    rows = sample_rows(3, 16, 4, torch.device("cpu")).view(3, 4)
    assert rows.tolist() == [[0, 4, 8, 12], [16, 20, 24, 28], [32, 36, 40, 44]]


def test_statistics_of_every_order_are_those_of_the_permuted_map():
    grid, block = TokenGrid(3, 5, 7), 16
    q, k = structured(grid.numel, keys=grid.numel + 9)
    permutations = torch.stack([axis_permutation(grid, o) for o in range(len(AXIS_ORDERS))])
    stats = order_statistics(
        q, k, permutations, block=block, rows=torch.arange(grid.numel), eps=0.01
    )
    blocks = grid.numel // block
    p = full_map(q, k)
    for order, perm in enumerate(permutations):
        cut = perm[: blocks * block]
        tiles = p[:, :, cut][..., cut].view(2, 3, blocks, block, blocks, block)
        torch.testing.assert_close(
            stats.mass[:, order].double(), tiles.sum(-1).mean((0, 3)), atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(
            stats.below[:, order].double(),
            (tiles < 0.01).double().mean((0, 3, 5)),
            atol=2e-3,
            rtol=0,
        )
        torch.testing.assert_close(
            stats.peak[:, order].double(), tiles.amax((0, 3, 5)), atol=1e-6, rtol=1e-5
        )
