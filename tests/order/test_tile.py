import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.tile import TileOrder
from gen_accel.order.tiling import group_lengths, tile_edges, unroll

GRID = TokenGrid(3, 5, 7)


def token_at(order, layout):
    """Which token of the model's order stands at each ordered place."""
    tokens = torch.arange(layout.tokens, dtype=torch.float64).view(1, -1, 1, 1)
    return order.reorder(tokens, layout).flatten().long()


def test_unrolled_axis_puts_dilation_groups_end_to_end():
    assert unroll(7, 3).tolist() == [0, 3, 6, 1, 4, 2, 5]
    assert group_lengths(7, 3).tolist() == [3, 2, 2]
    assert tile_edges(7, 2, 3).tolist() == [0, 2, 3, 5, 7]  # a short tile ends each ragged group
    assert tile_edges(7, 4).tolist() == [0, 4, 7]


def test_tiles_that_divide_the_grid_are_boxes_in_raster_order():
    grid = TokenGrid(2, 4, 6)
    order = TileOrder((1, 2, 3))
    expected = torch.arange(48).view(2, 1, 2, 2, 2, 3).permute(0, 2, 4, 1, 3, 5).flatten()
    assert order.lanes(grid) == 6 and order.tiles(grid) == (2, 2, 2) and order.places(grid) == 48
    assert torch.equal(token_at(order, TokenLayout(grid)), expected)


@pytest.mark.parametrize("block", [None, 12, 16])
@pytest.mark.parametrize("dilation", [(1, 1, 1), (1, 2, 3)])
def test_each_tile_is_one_box_on_a_block_edge(dilation, block):
    order = TileOrder((2, 3, 2), dilation, block)
    lanes = order.lanes(GRID)
    assert lanes == (block or 12)
    tokens = token_at(order, TokenLayout(GRID)).view(-1, lanes)
    real = torch.from_numpy(order.coordinates(GRID)[0] >= 0).view(-1, lanes)
    tiles = [
        [unroll(n, d)[a:b] for a, b in itertools.pairwise(tile_edges(n, t, d))]
        for n, t, d in zip(GRID, order.tile, order.dilation)
    ]
    assert len(tokens) == np.prod([len(axis) for axis in tiles]) == np.prod(order.tiles(GRID))
    for row, mask, box in zip(tokens, real, itertools.product(*tiles)):
        inside = [(f * 5 + h) * 7 + w for f, h, w in itertools.product(*box)]
        assert row[: len(inside)].tolist() == inside
        assert mask.tolist() == [True] * len(inside) + [False] * (lanes - len(inside))
        assert (row[len(inside) :] == row[0]).all()  # padding repeats a token of its own tile


@given(
    grid=st.tuples(*[st.integers(1, 9)] * 3),
    tile=st.tuples(*[st.integers(1, 5)] * 3),
    dilations=st.tuples(*[st.integers(1, 4)] * 3),
    text=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    spare=st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_reorder_and_restore_are_inverse(grid, tile, dilations, text, spare):
    dilation = tuple(min(d, n) for d, n in zip(dilations, grid))
    layout = TokenLayout(TokenGrid(*grid), *text)
    order = TileOrder(tile, dilation)
    order = TileOrder(tile, dilation, order.lanes(layout.grid) + spare)
    x = torch.randn(2, layout.tokens, 3, 2)
    ordered = order.reorder(x, layout)
    assert ordered.shape == (2, order.places(layout.grid) + layout.text, 3, 2)
    before, after = x[:, : text[0]], x[:, text[0] + layout.grid.numel :]
    assert torch.equal(ordered[:, order.places(layout.grid) :], torch.cat([before, after], 1))
    assert torch.equal(order.restore(ordered, layout), x)
    assert torch.equal(order.restore(ordered.contiguous(), layout), x)


def test_coordinates_are_unrolled_places_and_cover_the_grid_once():
    order = TileOrder((2, 2, 2), (1, 2, 3), 9)
    coordinates = order.coordinates(GRID)
    real = coordinates[0] >= 0
    assert ((coordinates >= 0) == real).all()
    axes = [unroll(n, d) for n, d in zip(GRID, order.dilation)]
    f, h, w = (axis[c] for axis, c in zip(axes, coordinates[:, real]))
    tokens = token_at(order, TokenLayout(GRID)).numpy()
    assert np.array_equal((f * 5 + h) * 7 + w, tokens[real])
    assert np.array_equal(np.sort(tokens[real]), np.arange(GRID.numel))


def test_images_and_tiles_larger_than_an_axis():
    grid = TokenGrid(1, 4, 6)
    order = TileOrder((4, 2, 8))
    assert order.lanes(grid) == 12 and order.tiles(grid) == (1, 2, 1)
    x = torch.randn(1, 24, 1, 2)
    assert torch.equal(order.restore(order.reorder(x, TokenLayout(grid)), TokenLayout(grid)), x)


def test_output_memory_suits_the_carriers():
    layout = TokenLayout(GRID, 2, 3)
    order = TileOrder((1, 5, 7))
    ordered = order.reorder(torch.randn(2, layout.tokens, 4, 8), layout)
    assert ordered.transpose(1, 2).is_contiguous()
    assert order.restore(ordered, layout).is_contiguous()


def test_padding_does_not_read_text():
    """A NaN in one tile must not reach another one through padding."""
    layout = TokenLayout(GRID, 1, 1)
    x = torch.randn(1, layout.tokens, 1, 1)
    x[:, [0, -1]] = torch.nan
    order = TileOrder((2, 3, 4), block=32)
    assert order.reorder(x, layout)[:, : order.places(GRID)].isfinite().all()


def test_gradients_pass_also_after_a_call_in_inference_mode():
    layout, order = TokenLayout(GRID, 2), TileOrder((3, 1, 4))
    with torch.inference_mode():
        order.reorder(torch.randn(1, layout.tokens, 1, 2), layout)
    x = torch.randn(1, layout.tokens, 1, 2, requires_grad=True)
    order.restore(order.reorder(x, layout) * 2, layout).sum().backward()
    assert (x.grad == 2).all()


def test_errors():
    with pytest.raises(ValueError, match=r"tile=\(0, 2, 2\): give \(frames, height, width\)"):
        TileOrder((0, 2, 2))
    with pytest.raises(ValueError, match=r"dilation=\(1, 1\)"):
        TileOrder((1, 1, 1), (1, 1))
    with pytest.raises(ValueError, match="block=8: a tile of 2x3x4 holds 24 tokens .* block=24"):
        TileOrder((2, 3, 4), block=8).lanes(GRID)
    with pytest.raises(ValueError, match="dilation=6 on height of length 5"):
        TileOrder((1, 1, 1), (1, 6, 1)).coordinates(GRID)
    order = TileOrder((2, 3, 4))
    with pytest.raises(ValueError, match=r"need \[batch, 105, heads, head_dim\]"):
        order.reorder(torch.zeros(1, 104, 2, 4), TokenLayout(GRID))
    with pytest.raises(ValueError, match=r"need \[batch, 193, heads, head_dim\]"):
        order.restore(torch.zeros(1, 106, 2, 4), TokenLayout(GRID, 1))


@pytest.mark.parametrize("dilation", [(1, 1, 1), (1, 2, 3)])
def test_permutation_is_what_reorder_does_but_for_the_padding(dilation):
    order = TileOrder((2, 3, 2), dilation, 16)
    permutation = order.permutation(GRID)
    real = permutation >= 0
    assert np.array_equal(real, order.coordinates(GRID)[0] >= 0)
    assert np.array_equal(token_at(order, TokenLayout(GRID)).numpy()[real], permutation[real])
