import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.curve import CurveOrder

HUNYUAN_720P = TokenGrid(33, 45, 80)


def cells(permutation, grid):
    """Frame, row and column at every place; ``[places, 3]``."""
    return np.stack(np.unravel_index(permutation, grid), -1)


def step_lengths(permutation, grid):
    return np.abs(np.diff(cells(permutation, grid), axis=0)).sum(1)


def assert_is_a_curve(grid, major="W"):
    permutation = CurveOrder(major).permutation(grid)
    assert permutation.dtype == np.int64
    assert np.array_equal(np.sort(permutation), np.arange(grid.numel)), grid
    assert (step_lengths(permutation, grid) == 1).all(), grid  # no diagonal step, ever


def test_every_small_grid_is_travelled_in_single_steps():
    for grid in itertools.product(range(1, 10), repeat=3):
        assert_is_a_curve(TokenGrid(*grid))


@given(grid=st.tuples(*[st.integers(1, 40)] * 3), major=st.sampled_from("WHF"))
@settings(max_examples=60, deadline=None)
@example(grid=(1, 61, 127), major="W")  # odd: any major axis has a curve
@example(grid=(1, 64, 127), major="W")  # an odd axis of an even grid: travelled along H
@example(grid=(37, 38, 41), major="F")
@example(grid=(1, 1, 2500), major="H")
def test_any_grid_and_major_axis(grid, major):
    assert_is_a_curve(TokenGrid(*grid), major)


def test_image_of_a_power_of_two_is_the_hilbert_curve_of_squares():
    grid = TokenGrid(1, 16, 16)
    squares = cells(CurveOrder().permutation(grid), grid).reshape(16, 16, 3)
    assert (squares.max(1) - squares.min(1) == [0, 3, 3]).all()


def test_curve_connects_the_ends_of_the_major_axis():
    grid = TokenGrid(6, 4, 8)
    for major, end in ("F", (5, 0, 0)), ("H", (0, 3, 0)), ("W", (0, 0, 7)):
        place = cells(CurveOrder(major).permutation(grid), grid)
        assert tuple(place[0]) == (0, 0, 0) and tuple(place[-1]) == end


@pytest.mark.parametrize("grid", [HUNYUAN_720P, TokenGrid(21, 45, 80), TokenGrid(21, 30, 52)])
def test_blocks_of_128_are_compact(grid):
    permutation = CurveOrder().permutation(grid)
    blocks = grid.numel // 128
    place = cells(permutation, grid)[: blocks * 128].reshape(blocks, 128, 3)
    extent = place.max(1) - place.min(1) + 1
    assert (extent.mean(0) < 7).all() and extent.max() < 15  # raster: 1 x 2 x 80
    assert (step_lengths(permutation, grid) == 1).all()


@given(
    grid=st.tuples(*[st.integers(1, 7)] * 3),
    text=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
@settings(max_examples=50, deadline=None)
def test_reorder_and_restore_are_inverse_and_leave_text_alone(grid, text):
    layout = TokenLayout(TokenGrid(*grid), *text)
    order, video = CurveOrder(), layout.grid.numel
    x = torch.randn(2, layout.tokens, 3, 2)
    ordered = order.reorder(x, layout)
    before, inside, after = x.split([text[0], video, text[1]], 1)
    index = torch.from_numpy(order.permutation(layout.grid).copy())
    assert torch.equal(ordered, torch.cat([inside[:, index], before, after], 1))
    assert torch.equal(order.restore(ordered, layout), x)
    assert torch.equal(order.restore(ordered.contiguous(), layout), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_dtypes_and_output_memory(dtype):
    layout = TokenLayout(TokenGrid(3, 4, 5), 2, 3)
    x = torch.randn(2, 4, layout.tokens, 8).to(dtype).transpose(1, 2)
    ordered = CurveOrder().reorder(x, layout)
    assert ordered.dtype == dtype and ordered.transpose(1, 2).is_contiguous()
    assert torch.equal(ordered, CurveOrder().reorder(x.contiguous(), layout))
    restored = CurveOrder().restore(ordered, layout)
    assert restored.is_contiguous() and torch.equal(restored, x)


def test_gradients_pass_also_after_a_call_in_inference_mode():
    layout = TokenLayout(TokenGrid(2, 3, 4), 2)
    with torch.inference_mode():
        CurveOrder().reorder(torch.randn(1, layout.tokens, 1, 2), layout)
    x = torch.randn(1, layout.tokens, 1, 2, requires_grad=True)
    (CurveOrder().restore(CurveOrder().reorder(x, layout) * 2, layout)).sum().backward()
    assert (x.grad == 2).all()


def test_permutation_is_shared_and_cannot_be_written_to():
    permutation = CurveOrder().permutation(HUNYUAN_720P)
    assert CurveOrder().permutation(HUNYUAN_720P) is permutation
    with pytest.raises(ValueError, match="read-only"):
        permutation[0] = 1


def test_errors():
    for major in ("T", "WH", ""):
        with pytest.raises(ValueError, match="name one axis, W, H or F"):
            CurveOrder(major)
    layout = TokenLayout(TokenGrid(2, 3, 4), 5)
    for move in (CurveOrder().reorder, CurveOrder().restore):
        with pytest.raises(ValueError, match=r"needs \[batch, 29, heads, head_dim\]"):
            move(torch.zeros(1, 28, 2, 4), layout)
