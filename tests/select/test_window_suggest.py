import math

import pytest

from gen_accel.select.gna import gna_plan
from gen_accel.select.presets import PRESETS, presets
from gen_accel.select.suggest import axis_menu, fitting_tile, rescale, suggest
from gen_accel.select.window import WHOLE, AxisWindow, Window, block_sparse_problem

# Settings that the specification computed for the grids of known models, with their sparsity.
KNOWN = [
    ((33, 45, 80), (3, 5, 8), (27, 35, 64), (3, 5, 16), 0.49),
    ((33, 45, 80), (3, 5, 8), (21, 30, 48), (3, 10, 16), 0.75),
    ((33, 45, 80), (3, 5, 8), (15, 20, 40), (3, 10, 8), 0.90),
    ((21, 45, 80), (3, 5, 8), (18, 35, 64), (6, 5, 16), 0.47),
    ((21, 45, 80), (3, 5, 8), (12, 30, 48), (6, 10, 16), 0.77),
    ((21, 45, 80), (3, 5, 8), (9, 20, 32), (3, 10, 16), 0.92),
    ((21, 30, 52), (3, 10, 4), (18, 20, 44), (6, 20, 4), 0.52),
    ((21, 30, 52), (3, 10, 4), (12, 20, 32), (6, 20, 8), 0.77),
    ((21, 30, 52), (3, 10, 4), (9, 10, 24), (3, 10, 8), 0.93),
    ((30, 48, 80), (2, 8, 8), (24, 40, 64), (4, 8, 16), 0.47),
    ((30, 48, 80), (2, 8, 8), (18, 32, 48), (2, 16, 16), 0.76),
    ((30, 48, 80), (2, 8, 8), (14, 24, 40), (2, 8, 8), 0.88),
    ((16, 44, 80), (4, 4, 8), (12, 28, 48), (4, 4, 16), 0.71),
    ((16, 44, 80), (4, 4, 8), (8, 20, 40), (8, 4, 8), 0.89),
    ((128, 128), (16, 8), (64, 64), (32, 16), 0.75),
]


@pytest.mark.parametrize("grid, tile, size, stride, sparsity", KNOWN)
def test_menus_hold_the_known_settings_with_their_smallest_strides(
    grid, tile, size, stride, sparsity
):
    window = Window(grid, size, stride)
    assert window.is_block_sparse(tile)
    assert window.density == pytest.approx(1 - sparsity, abs=0.005)
    for axis, t in zip(window.axes, tile):
        menu = {entry.width: entry for entry in axis_menu(axis.length, t)}
        assert menu[axis.size].stride == axis.stride


@pytest.mark.parametrize(
    "length, tile_q, tile_kv", [(30, 4, 2), (24, 3, 3), (17, 1, 1), (20, 6, 4)]
)
def test_menus_are_exactly_the_block_sparse_windows(length, tile_q, tile_kv):
    found = {axis.width: axis.stride for axis in axis_menu(length, tile_q, tile_kv)}
    for size in range(2, length):
        strides = [
            stride
            for stride in range(1, size + 1)
            if block_sparse_problem(AxisWindow(length, size, stride), tile_q, tile_kv) is None
        ]
        assert found.get(size) == (strides[0] if strides else None)
    assert found[length] == 1


@pytest.mark.parametrize(
    "grid, tile",
    [
        ((30, 48, 80), (2, 8, 8)),
        ((33, 45, 80), (3, 5, 8)),
        ((21, 45, 80), (3, 5, 8)),
        ((21, 30, 52), (3, 10, 4)),
        ((16, 44, 80), (4, 4, 8)),
        ((1, 128, 128), (1, 8, 16)),
    ],
)
def test_fitting_tiles_divide_the_grid_and_fill_a_block(grid, tile):
    assert fitting_tile(grid) == tile


def test_fitting_tiles_of_awkward_grids():
    assert fitting_tile((13, 17, 19)) == (1, 1, 19)  # nothing divides primes
    assert math.prod(fitting_tile((13, 17, 19), border="snap")) == 128
    assert math.prod(fitting_tile((30, 48, 80), 64)) == 64
    assert fitting_tile((1, 4, 5)) == (1, 4, 5)


@pytest.mark.parametrize("grid", [(33, 45, 80), (21, 45, 80), (1, 64, 64), (64, 96), (8, 32, 48)])
@pytest.mark.parametrize("density", [0.5, 0.25, 0.1])
def test_suggestions_are_block_sparse_and_near_the_density(grid, density):
    windows = suggest(grid, density)
    assert len(windows) == len(set(windows)) == 5
    tile = fitting_tile(grid)
    assert all(window.is_block_sparse(tile) for window in windows)
    assert windows[0].density == pytest.approx(density, rel=0.12)


def test_suggestions_prefer_similar_reach_on_every_axis():
    first = suggest((32, 32, 32), 1 / 8, (4, 4, 4))[0]
    shares = [axis.density for axis in first.axes]
    assert max(shares) / min(shares) < 1.5


def test_suggestions_under_the_snap_border():
    grid = (31, 47, 80)
    window = suggest(grid, 0.25, border="snap")[0]
    tile = fitting_tile(grid, border="snap")
    assert window.snap == tile and window.is_block_sparse(tile)
    assert window.density == pytest.approx(0.25, rel=0.1)
    blocks = gna_plan(grid, window.size, window.stride, tile=tile, border="snap")[1]
    assert blocks.density() == pytest.approx(window.density, rel=0.1)


def test_what_suggestions_refuse():
    for density in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match=r"a share of the keys lies in \(0, 1\]"):
            suggest((8, 8), density)
    with pytest.raises(ValueError, match="tile='good'"):
        suggest((8, 8), 0.5, "good")
    with pytest.raises(ValueError, match="2 axes needs 2 numbers"):
        suggest((8, 8), 0.5, (4, 4, 4))


@pytest.mark.parametrize("grid", [(33, 45, 80), (21, 30, 52), (60, 96, 160), (15, 30, 52)])
def test_rescaled_windows_keep_their_share_and_stay_block_sparse(grid):
    window = Window((30, 48, 80), (18, 24, 24), (16, 8, 8))
    scaled = rescale(window, grid)
    assert scaled.grid == grid
    assert scaled.is_block_sparse(fitting_tile(grid))
    for old, new, tile in zip(window.axes, scaled.axes, fitting_tile(grid)):
        # No nearer than a tile can be asked for.
        assert abs(new.width - old.width * new.length / old.length) <= tile
    # Plain rounding would have lost it.
    assert not Window(grid, tuple(
        round(w * new / old) for w, new, old in zip(window.size, grid, window.grid)
    )).is_block_sparse(fitting_tile(grid))  # fmt: skip


def test_rescaling_to_an_image_and_to_the_same_grid():
    window = Window((30, 48, 80), (18, 24, 40), (2, 8, 8))
    assert rescale(window, window.grid, (2, 8, 8)) == window
    image = rescale(window, (1, 48, 80), (1, 8, 8))
    assert image.size == (WHOLE, 24, 40) and image.is_block_sparse((1, 8, 8))
    with pytest.raises(ValueError, match="the window is for 3 axes"):
        rescale(window, (48, 80))


def test_rescaling_keeps_dilations_and_causal_axes():
    cosmos = Window((16, 44, 80), (-1, 4, 16), 1, (1, 11, 5))
    twice = rescale(cosmos, (16, 88, 160))
    assert twice.dilation == (1, 11, 5) and twice.size == (WHOLE, 8, 32)
    other = rescale(cosmos, (16, 60, 80))  # 11 does not divide 60
    assert other.is_block_sparse(fitting_tile(other.grid)) and other.dilation[1] in (10, 12, 15)
    causal = Window((20, 16), (10, 8), (4, 8), 1, (True, False))
    assert rescale(causal, (40, 16), (2, 8)) == Window((40, 16), (20, 8), (8, 8), 1, (True, False))


def test_rescaling_on_ragged_grids_needs_snap_or_a_dividing_tile():
    window = Window((30, 48, 80), (18, 24, 24), (2, 8, 8))
    shifted, snapped = (rescale(window, (31, 47, 80), (2, 8, 8), b) for b in ("shift", "snap"))
    assert shifted.size[:2] == (WHOLE, WHOLE)  # all that is block-sparse there
    assert snapped.size[:2] == (18, 24) and snapped.is_block_sparse((2, 8, 8))


def test_presets_are_block_sparse_on_their_tiles():
    assert {p.model.split()[0] for p in PRESETS} == {"flux", "hunyuan_video", "wan", "cosmos"}
    for preset in PRESETS:
        assert preset.window.is_block_sparse(preset.tile_q, preset.tile_kv), preset
        assert (preset.dense is None) == (preset.source == "ours")
    known = {(s[1], s[2], s[3]) for s in KNOWN if len(s[0]) == 3}
    assert known == {
        (p.tile_kv, p.size, p.stride) for p in PRESETS if p.source == "ours" and p.grid[0] > 1
    }


def test_presets_by_model():
    found = presets("wan")
    assert [p.window.density for p in found] == sorted(p.window.density for p in found)[::-1]
    assert {p.grid for p in presets("wan 480")} == {(21, 30, 52)}
    with pytest.raises(ValueError, match="presets exist for cosmos, flux, hunyuan_video, wan"):
        presets("mochi")


def test_one_token_has_one_window():
    (window,) = suggest((1, 1, 1), 0.25)
    assert window.density == 1
