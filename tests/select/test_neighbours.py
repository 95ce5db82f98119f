import numpy as np
import pytest
import torch

from gen_accel.layout import TokenGrid
from gen_accel.order.axis import axis_permutation
from gen_accel.order.curve import CurveOrder
from gen_accel.order.tile import TileOrder
from gen_accel.select.neighbours import block_neighbours, frame_blocks

GRID = TokenGrid(4, 5, 7)
ORDERS = {
    "curve": CurveOrder().permutation,
    "tile": TileOrder((2, 2, 3), block=16).permutation,
    "dilated tile": TileOrder((1, 3, 3), (1, 1, 2)).permutation,
    "raster": lambda grid: axis_permutation(grid, 0),
    "WHF": lambda grid: axis_permutation(grid, 4),
}


def blocks_of(permutation, grid, block):
    """Cells of each block, as sets of coordinates."""
    blocks = [permutation[i : i + block] for i in range(0, len(permutation), block)]
    return [np.stack(np.unravel_index(b[b >= 0], grid), -1) for b in map(np.asarray, blocks)]


@pytest.mark.parametrize("grid", [GRID, TokenGrid(1, 6, 9), TokenGrid(3, 1, 8)], ids=str)
@pytest.mark.parametrize("block", [12, 16])
@pytest.mark.parametrize("name", ORDERS)
def test_neighbours_contain_cells_that_touch(name, block, grid):
    permutation = ORDERS[name](grid)
    blocks = blocks_of(permutation, grid, block)
    touch = block_neighbours(permutation, grid, block)
    expected = [
        [bool((np.abs(x[:, None] - y).max(-1, initial=0) <= 1).any()) for y in blocks]
        for x in blocks
    ]
    assert touch.dtype == torch.bool and touch.tolist() == expected


@pytest.mark.parametrize("frame", [0, 2, -1])
@pytest.mark.parametrize("name", ORDERS)
def test_frame_blocks_contain_the_frame(name, frame):
    permutation = ORDERS[name](GRID)
    expected = [bool((b[:, 0] == frame % 4).any()) for b in blocks_of(permutation, GRID, 16)]
    assert frame_blocks(permutation, GRID, 16, frame).tolist() == expected


def test_first_frame_of_a_curve_is_not_its_beginning():
    """The authors' mask takes the first blocks; right in raster order, wrong on the curve."""
    grid = TokenGrid(8, 16, 16)
    raster, curve = axis_permutation(grid, 0), CurveOrder().permutation(grid)
    assert frame_blocks(raster, grid, 32).nonzero().flatten().tolist() == list(range(8))
    assert frame_blocks(curve, grid, 32).nonzero().max() > 32


def test_hunyuan_720p():
    grid = TokenGrid(33, 45, 80)
    touch = block_neighbours(CurveOrder().permutation(grid), grid, 128)
    assert touch.shape == (929, 929) and touch.diagonal().all() and torch.equal(touch, touch.T)
    assert touch.sum(1).float().mean() < 20  # 2 % of the blocks


def test_blocks_of_nothing_but_padding_touch_nothing():
    permutation = np.r_[np.arange(GRID.numel), np.full(20, -1)]  # 140 = 8.75 blocks of 16
    touch = block_neighbours(permutation, GRID, 16)
    assert touch.shape == (10, 10) and not touch[9].any() and not touch[:, 9].any()
    assert not frame_blocks(permutation, GRID, 16)[9]


def test_equal_permutations_share_one_mask():
    permutation = CurveOrder().permutation(GRID)
    first = block_neighbours(permutation, GRID, 16)
    assert block_neighbours(torch.from_numpy(permutation.copy()), GRID, 16) is first
    assert block_neighbours(axis_permutation(GRID, 0), GRID, 16) is not first


def test_errors():
    permutation = CurveOrder().permutation(GRID)
    for broken in (permutation[1:], np.zeros_like(permutation), permutation + 1):
        with pytest.raises(ValueError, match="has to hold each of the 140 cells"):
            block_neighbours(broken, GRID, 16)
    with pytest.raises(ValueError, match="block=0: a block has at least one place"):
        block_neighbours(permutation, GRID, 0)
    for frame in (4, -5):
        with pytest.raises(ValueError, match=rf"frame={frame}: grid 4x5x7 has frames 0\.\.3"):
            frame_blocks(permutation, GRID, 16, frame)
