import pytest
import torch

from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order import axis
from gen_accel.order.axis import (
    AXIS_ORDERS,
    AxisOrder,
    axis_order,
    axis_permutation,
    candidate_orders,
    inverse_permutation,
)

GRID = TokenGrid(3, 5, 7)


@pytest.mark.parametrize("order", range(6))
def test_permutation_walks_the_axes_in_the_named_order(order):
    perm = axis_permutation(GRID, order)
    f, h, w = perm // 35, perm // 7 % 5, perm % 7
    place = dict(F=f, H=h, W=w)
    sizes = dict(F=3, H=5, W=7)
    slow, middle, fast = AXIS_ORDERS[order]
    rank = (place[slow] * sizes[middle] + place[middle]) * sizes[fast] + place[fast]
    assert torch.equal(rank, torch.arange(GRID.numel))


@pytest.mark.parametrize("order", range(6))
def test_inverse_undoes_the_permutation(order):
    perm = axis_permutation(GRID, order)
    inverse = inverse_permutation(perm)
    assert torch.equal(perm[inverse], torch.arange(GRID.numel))
    # 2 (HWF) and 5 (WFH) undo each other; using an index as its own inverse is the classic mistake.
    own = torch.equal(inverse, axis_permutation(TokenGrid(*(GRID[i] for i in _axes(order))), order))
    assert own == (order not in (2, 5))


def _axes(order):
    return ["FHW".index(axis) for axis in AXIS_ORDERS[order]]


@pytest.mark.parametrize("before, after", [(0, 0), (226, 0), (0, 256), (3, 5)])
def test_reorder_and_restore_are_inverse(before, after):
    layout = TokenLayout(GRID, before, after)
    order = axis_order([0, 1, 2, 3, 4, 5, 5, 2])
    x = torch.randn(2, layout.tokens, 8, 4)
    ordered = order.reorder(x, layout)
    assert torch.equal(order.restore(ordered, layout), x)
    for head, index in enumerate(order.heads):
        video = x[:, before : before + GRID.numel, head]
        assert torch.equal(ordered[:, : GRID.numel, head], video[:, axis_permutation(GRID, index)])
    text = torch.cat([x[:, :before], x[:, before + GRID.numel :]], 1)
    assert torch.equal(ordered[:, GRID.numel :], text)


def test_restore_takes_any_strides():
    layout = TokenLayout(GRID, 0, 9)
    order = axis_order([4, 1])
    x = torch.randn(1, layout.tokens, 2, 6)
    ordered = order.reorder(x, layout).contiguous()
    assert torch.equal(order.restore(ordered, layout), x)


@pytest.mark.parametrize("before, after", [(0, 0), (226, 0), (0, 256)])
def test_dense_attention_does_not_notice_the_order(before, after):
    layout = TokenLayout(GRID, before, after)
    order = axis_order(range(6))
    q, k, v = torch.randn(3, 2, layout.tokens, 6, 8, dtype=torch.float64)

    def attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2)

    ordered = attention(*(order.reorder(x, layout) for x in (q, k, v)))
    torch.testing.assert_close(order.restore(ordered, layout), attention(q, k, v))


@pytest.mark.parametrize(
    "grid, expected",
    [
        (TokenGrid(1, 4, 5), ("FHW", "FWH")),
        (TokenGrid(3, 1, 5), ("FHW", "HWF")),
        (TokenGrid(3, 4, 5), AXIS_ORDERS),
        (TokenGrid(1, 1, 5), ("FHW",)),
    ],
)
def test_candidates_are_the_distinct_orders(grid, expected):
    candidates = candidate_orders(grid)
    assert tuple(AXIS_ORDERS[i] for i in candidates) == expected
    assert len({tuple(axis_permutation(grid, i).tolist()) for i in candidates}) == len(candidates)


def test_bad_input():
    with pytest.raises(ValueError, match="order 6 of head 1"):
        AxisOrder((0, 6))
    with pytest.raises(ValueError, match=r"needs \[batch, 105, 2, head_dim\]"):
        AxisOrder((0, 1)).reorder(torch.zeros(1, 104, 2, 4), TokenLayout(GRID))


@pytest.mark.parametrize("before, after", [(0, 0), (3, 0), (0, 4), (3, 5)])
def test_the_fused_form_moves_the_same_tokens(before, after, monkeypatch):
    layout = TokenLayout(GRID, before, after)
    order = axis_order(range(6))
    x = torch.randn(2, layout.tokens, 6, 4)
    ordered, back = order.reorder(x, layout), order.restore(x, layout)
    monkeypatch.setattr(axis, "fused", lambda x: True)  # what a GPU takes; here in torch operations
    assert torch.equal(order.reorder(x, layout), ordered)
    assert torch.equal(order.restore(x, layout), back)
