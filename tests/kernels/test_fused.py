"""What a GPU runs: the public functions with their Triton forms, beside the same on torch alone."""

import pytest
import torch

import gen_accel.kernels.mass as mass
import gen_accel.kernels.pool as pool
import gen_accel.kernels.prepare as prepare
import gen_accel.kernels.route as route
from gen_accel.kernels.fused import fused
from gen_accel.kernels.tail import block_scores, pool_keys
from helpers.kernels import DEVICE

MODULES = (mass, pool, prepare, route)


@pytest.fixture(params=[True, False], ids=["fused", "torch"])
def both(request, monkeypatch):
    """Sets which form runs; fp64 always runs as torch operations."""
    for module in MODULES:
        choice = lambda *x: request.param and x[0].dtype != torch.float64  # noqa: E731
        monkeypatch.setattr(module, "fused", choice)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact(x):
    return x.double()


def test_what_is_fused():
    x = torch.empty(1)
    assert not fused(x)  # no GPU
    with torch.device("meta"):
        assert not fused(torch.empty(1))
    if DEVICE == "cuda":
        x = x.cuda()
        assert fused(x) and fused(x.bfloat16()) and not fused(x.double())
        assert not fused(x.requires_grad_())
        with torch.no_grad():
            assert fused(x)


def test_pooling(both):
    x = randn(2, 75, 3, 16)
    found, right = (pool.group_means(y, 16, deviation=True, variance=True) for y in (x, exact(x)))
    for mine, theirs in zip(found, right):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-6)
    assert pool.group_means(x, 16).deviation is None
    assert pool.group_means(x[:, :0], 16).mean.shape == (2, 0, 3, 16)


def test_tails(both):
    k, v = randn(2, 75, 3, 16), randn(2, 75, 3, 16, seed=1)
    found, right = (
        pool_keys(*x, 16, per_block=4, variance=True) for x in ((k, v), (exact(k), exact(v)))
    )
    for name in ("key", "value", "bias", "variance"):
        mine, theirs = getattr(found, name), getattr(right, name)
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-6)
    scores = block_scores(k, v, 16, 16, pooled=64, scale=0.25, gapr=True)
    right = block_scores(exact(k), exact(v), 16, 16, pooled=64, scale=0.25, gapr=True)
    for name in ("video", "text", "gain", "error"):
        mine, theirs = getattr(scores, name), getattr(right, name)
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, block", [(None, 16), (3, 16), (None, 160)])
def test_mass(both, rows, block):
    q, k = randn(1, 200, 2, 16), randn(1, 210, 2, 16, seed=1)
    size = {"block": block, "blocks": 200 // block, "rows_per_block": rows}
    found, right = (mass.block_mass(*x, **size) for x in ((q, k), (exact(q), exact(k))))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    lse = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(0.25).logsumexp(-1)
    torch.testing.assert_close(mass.block_mass(q, k, lse=lse, **size), right, rtol=1e-5, atol=1e-6)


def test_routing(both, monkeypatch):
    scores = randn(1, 2, 5, 37)
    forced = torch.zeros(5, 37, dtype=torch.bool, device=DEVICE)
    forced[:, 3] = True
    counts, lists = route.route(scores, keep=4, forced=forced)
    for row, number, found in zip(scores[0, 1], counts[0, 1], lists[0, 1]):
        assert set(found[:number].tolist()) == {*row.topk(4).indices.tolist(), 3}
    assert route.route(scores, beta=1)[1].shape[-1] == 37
    assert route.route(scores, keep=100)[0].eq(37).all()
    wide = randn(1, 1, 1, 8200)
    assert route.route(wide, keep=2)[1].flatten().tolist() == sorted(
        wide.flatten().topk(2).indices.tolist()
    )


def test_lists(both):
    mask = (randn(2, 1, 5, 37) > 0.5).expand(2, 3, 5, 37)
    counts, lists = route.to_lists(mask, 30)
    assert counts.shape == (2, 3, 5) and lists.shape == (2, 3, 5, 30)
    for row, number, found in zip(mask[1, 2], counts[1, 2], lists[1, 2]):
        assert found[:number].tolist() == row.nonzero().flatten().tolist()
        assert (found[number:] == 0).all()
    assert route.to_lists(mask[0, 0], 37)[1].shape == (5, 37)


def test_orders(both):
    x = randn(2, 26, 3, 8)
    places = prepare.AxisPlaces.from_axes([(0, 1, 2), (2, 0, 1), (1, 2, 0)], (2, 3, 4), 2, DEVICE)
    angle = randn(24, 4)
    rope = prepare.Rope(angle.cos(), angle.sin(), start=2)
    found, right = (prepare.prepare(y, places, rope) for y in (x, exact(x)))
    torch.testing.assert_close(found, right.float())
    assert torch.equal(prepare.restore(prepare.prepare(x, places), places), x)


def test_compiled_in_one_graph(both):
    x, places = (
        randn(1, 24, 2, 8),
        prepare.AxisPlaces.from_axes([(2, 1, 0)] * 2, (2, 3, 4), 0, DEVICE),
    )

    def call(x):
        q = prepare.prepare(x, places)
        means = pool.group_means(q.transpose(1, 2), 8).mean.transpose(1, 2)
        counts, lists = route.route(means @ means.transpose(2, 3), keep=2)
        found = mass.block_mass(x, x, block=8, blocks=3)
        return prepare.restore(q, places), counts, lists, found

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for mine, theirs in zip(compiled(x), call(x)):
            torch.testing.assert_close(mine, theirs)
