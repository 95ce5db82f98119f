"""The rule of one axis, its tiles, and the patterns that are settings of it."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_accel.order.tiling import tile_edges, unroll
from gen_accel.select.window import (
    WHOLE,
    AxisWindow,
    Window,
    block_sparse_problem,
    blocked,
    causal,
    halo,
    nearest_legal,
    neighborhood,
    sliding_tile,
    sparse_global,
    strided,
    tile_ranges,
)
from helpers.windows import axis_mask, grid_mask, random_setting

# The worked examples of the specification, computed with NATTEN's own mask.
EXAMPLES = [
    ("E1", 8, 3, 1, False, "0 0 1 2 3 4 5 5", "3 3 4 5 6 7 8 8"),
    ("E2", 8, 4, 1, False, "0 0 0 1 2 3 4 4", "4 4 4 5 6 7 8 8"),
    ("E3", 8, 4, 2, False, "0 0 1 1 3 3 4 4", "4 4 5 5 7 7 8 8"),
    ("E4", 8, 4, 4, False, "0 0 0 0 4 4 4 4", "4 4 4 4 8 8 8 8"),
    ("E5", 10, 4, 4, False, "0 0 0 0 4 4 4 4 6 6", "4 4 4 4 8 8 8 8 10 10"),
    ("E6", 12, 6, 2, False, "0 0 0 0 2 2 4 4 6 6 6 6", "6 6 6 6 8 8 10 10 12 12 12 12"),
    ("E7", 10, 5, 3, False, "0 0 0 2 2 2 5 5 5 5", "5 5 5 7 7 7 10 10 10 10"),
    ("E8", 11, 6, 4, False, "0 0 0 0 3 3 3 3 5 5 5", "6 6 6 6 9 9 9 9 11 11 11"),
    ("E9", 6, 2, 1, False, "0 0 1 2 3 4", "2 2 3 4 5 6"),
    ("E10", 5, 5, 3, False, "0 0 0 0 0", "5 5 5 5 5"),
    ("E11", 8, 3, 1, True, "0 0 0 1 2 3 4 5", "1 2 3 4 5 6 7 8"),
    ("E12", 8, 4, 2, True, "0 0 0 0 2 2 4 4", "1 2 3 4 5 6 7 8"),
    ("E13", 8, 4, 4, True, "0 0 0 0 4 4 4 4", "1 2 3 4 5 6 7 8"),
    ("E14", 10, 5, 3, True, "0 0 0 1 1 1 4 4 4 5", "1 2 3 4 5 6 7 8 9 10"),
]  # fmt: skip


@pytest.mark.parametrize("name, length, size, stride, is_causal, start, end", EXAMPLES)
def test_worked_examples(name, length, size, stride, is_causal, start, end):
    axis = AxisWindow(length, size, stride, causal=is_causal)
    assert axis.start.tolist() == [int(n) for n in start.split()]
    assert axis.end.tolist() == [int(n) for n in end.split()]


def test_worked_examples_of_hunyuan_video():
    frames, height = AxisWindow(30, 18, 16), AxisWindow(48, 24, 8)
    assert frames.start.tolist() == [0] * 16 + [12] * 14  # E15
    assert frames.end.tolist() == [18] * 16 + [30] * 14
    assert height.start.tolist() == [0] * 16 + [8] * 8 + [16] * 8 + [24] * 16  # E16
    assert (height.end - height.start == 24).all()


@pytest.mark.parametrize(
    "axis, keys",
    [
        (AxisWindow(9, 3, 1, 2), "024|135|024|135|246|357|468|357|468"),  # E17
        (AxisWindow(10, 3, 2, 3), "036|147|258|036|147|258|369|147|258|369"),  # E18
        (AxisWindow(9, 3, 1, 2, True), "0|1|02|13|024|135|246|357|468"),  # E19
    ],
)
def test_worked_examples_with_dilation(axis, keys):
    assert "|".join("".join(map(str, axis.keys(i))) for i in range(axis.length)) == keys


def test_worked_examples_on_two_and_three_axes():
    window = Window((4, 6), (2, 4), (2, 2))  # E20
    rows, columns = window.axes[0].keys(3), window.axes[1].keys(2)
    assert (rows[:, None] * 6 + columns).ravel().tolist() == [13, 14, 15, 16, 19, 20, 21, 22]
    window = Window((30, 48, 80), (18, 24, 24), (16, 8, 8))  # E21
    boxes = [axis.keys(i)[[0, -1]].tolist() for axis, i in zip(window.axes, (17, 20, 41))]
    assert boxes == [[12, 29], [8, 31], [32, 55]]
    assert window.density == pytest.approx(0.09)
    assert window.is_block_sparse((4, 8, 8), (2, 8, 8))


def element_mask(axis):
    positions, place = unroll(axis.length, axis.dilation), np.arange(axis.length)
    mask = np.zeros((axis.length,) * 2, bool)
    inside = (axis.start[:, None] <= place) & (place < axis.end[:, None])
    mask[np.ix_(positions, positions)] = inside
    return mask


def any_and_all(mask, axis, tile_q, tile_kv):
    """Per pair of tiles: is something visible, is everything; from the element mask."""
    positions = unroll(axis.length, axis.dilation)
    mask = mask[np.ix_(positions, positions)].astype(int)
    rows, columns = (tile_edges(axis.length, t, axis.dilation)[:-1] for t in (tile_q, tile_kv))
    reduce = lambda f: f.reduceat(f.reduceat(mask, rows, 0), columns, 1) > 0  # noqa: E731
    return reduce(np.maximum), reduce(np.minimum)


def listed(first, stop, tiles):
    tile = np.arange(tiles)
    return (tile >= first[:, None]) & (tile < stop[:, None])


@pytest.mark.parametrize("seed", range(6))
def test_rule_and_tiles_against_element_masks(seed):
    """1,000 random settings per seed, in one to three dimensions, with unequal tiles."""
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        window = Window(*random_setting(rng, 150))
        product = 1
        for axis in window.axes:
            mask = element_mask(axis)
            expected = axis_mask(
                axis.length, axis.size, axis.stride, axis.dilation, axis.causal, axis.snap
            )
            assert np.array_equal(mask, expected), axis
            assert axis.density == expected.mean()
            tile_q, tile_kv = rng.integers(1, axis.length + 1, 2).tolist()
            some, every = any_and_all(expected, axis, tile_q, tile_kv)
            ranges = tile_ranges(axis, tile_q, tile_kv)
            assert np.array_equal(listed(ranges.first, ranges.stop, some.shape[1]), some), axis
            full = listed(ranges.full_first, ranges.full_stop, some.shape[1])
            assert np.array_equal(full, every), axis
            sparse = block_sparse_problem(axis, tile_q, tile_kv) is None
            assert sparse == np.array_equal(some, every), axis
            product = np.kron(product, mask)
        assert np.array_equal(product, grid_mask(window)), window


def test_perfect_block_sparsity_exhaustively():
    checked = sparse = 0
    for length in range(2, 13):
        for size in range(2, length + 1):
            for stride in range(1, size + 1):
                axis, mask = AxisWindow(length, size, stride), axis_mask(length, size, stride)
                for tile_q in (1, 2, 3, 4):
                    for tile_kv in (1, 2, 3, 4):
                        some, every = any_and_all(mask, axis, tile_q, tile_kv)
                        free = block_sparse_problem(axis, tile_q, tile_kv) is None
                        assert free == np.array_equal(some, every), (axis, tile_q, tile_kv)
                        # The ragged-axis theorem of the specification.
                        assert not free or length % tile_kv == 0 or size == length
                        checked, sparse = checked + 1, sparse + free
    assert checked > 4000 and 0.05 < sparse / checked < 0.95


def test_where_nattens_closed_form_errs():
    # Declared block-sparse there; it is not: neighbours in a key tile of 2 begin at odd places.
    assert block_sparse_problem(AxisWindow(16, 8, 1), 1, 2) is not None
    # Not declared, and yet it is, because both borders clamp.
    assert block_sparse_problem(AxisWindow(14, 12, 6), 2, 2) is None


@st.composite
def legal_axes(draw):
    length = draw(st.integers(2, 40))
    dilation = draw(st.integers(1, length // 2))
    size = draw(st.integers(2, length // dilation))
    stride = draw(st.integers(1, size))
    return AxisWindow(length, size, stride, dilation, draw(st.booleans()))


@given(legal_axes())
@settings(max_examples=300, deadline=None)
def test_invariants(axis):
    place = np.arange(axis.length)
    assert (axis.start <= place).all() and (place < axis.end).all()  # a query sees itself
    assert (np.diff(axis.start) >= 0).all() and (np.diff(axis.end) >= 0).all()
    count = axis.end - axis.start
    if not axis.causal:
        assert (count == axis.width).all()
        assert axis.density == pytest.approx(axis.width / axis.length)
    else:
        assert (count <= axis.width).all() and (axis.end == place + 1).all()


def test_whole_axes_and_images():
    axis = AxisWindow(7)
    assert axis.size == WHOLE and axis.is_whole and axis.density == 1
    assert AxisWindow(1).keys(0).tolist() == [0]
    image = Window((1, 8, 9), (4, 3), 2)
    assert image.size == (WHOLE, 4, 3) and image.stride == (1, 2, 2)
    assert image.density == pytest.approx(4 * 3 / 72)
    assert not AxisWindow(7, causal=True).is_whole


# ---- patterns with a name ------------------------------------------------------------------------


def test_neighborhood_and_strided_and_causal():
    assert neighborhood((9, 9), 3) == Window((9, 9), (3, 3))
    assert strided((9, 9), 3, (1, 2)) == Window((9, 9), (3, 3), (1, 2))
    window = causal((9, 6), (4, -1), (2, 1))
    assert window.causal == (True, False) and window.axes[1].is_whole


def test_blocked_is_swin_where_the_window_divides_the_axis():
    checked = 0
    for size in range(2, 16):
        for blocks in range(1, 8):
            block = np.arange(size * blocks) // size
            axis = blocked((size * blocks,), size).axes[0]
            assert np.array_equal(element_mask(axis), block[:, None] == block)
            checked += 1
    assert checked == 98
    # A last, short block sees the last `size` tokens instead.
    assert blocked((10,), 4).axes[0].keys(9).tolist() == [6, 7, 8, 9]


def test_halo_is_exact_in_the_interior():
    interior = 0
    for block in range(1, 7):
        for margin in range(1, 5):
            for length in range(block + 2 * margin, 40):
                axis = halo((length,), block, margin).axes[0]
                for query in range(length):
                    begin = query // block * block - margin
                    if begin >= 0 and begin + block + 2 * margin <= length:
                        assert axis.keys(query).tolist() == list(
                            range(begin, begin + block + 2 * margin)
                        )
                        interior += 1
    assert interior > 4000
    # The border differs: GNA shifts, HaloNet would cut.
    assert halo((12,), 2, 1).axes[0].keys(0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tile", range(1, 7))
def test_sliding_tile_is_exact_with_its_borders(tile):
    for tiles in range(1, 12):
        for odd in range(1, tiles + 1, 2):
            if tile * odd < 2:
                continue
            here = np.arange(tile * tiles) // tile
            # STA's own reference mask: the centre is clamped, keys lie within half a window of it.
            centre = np.clip(here, odd // 2, tiles - 1 - odd // 2)
            expected = abs(centre[:, None] - here) <= odd // 2
            axis = sliding_tile((tile * tiles,), tile, odd).axes[0]
            assert np.array_equal(element_mask(axis), expected)
            assert block_sparse_problem(axis, tile) is None


def test_sliding_tile_of_hunyuan_video():
    window = sliding_tile((30, 48, 80), (6, 8, 8), (3, 3, 3))
    assert window == Window((30, 48, 80), (18, 24, 24), (6, 8, 8))
    assert window.is_block_sparse((2, 8, 8))
    assert not window.is_block_sparse((4, 8, 8), (2, 8, 8))  # 6 is no multiple of 4
    assert sliding_tile((30, 48), (6, 8), (WHOLE, 3)).size == (WHOLE, 24)


def test_an_even_number_of_tiles_is_refused_with_the_next_odd():
    for even in (2, 4, 6):
        with pytest.raises(ValueError, match=f"tiles={even} on width: .*odd.*setting: {even + 1}"):
            sliding_tile((64,), 8, even)
        # What STA's reference mask does with an even number, which is why we refuse it.
        here = np.arange(64) // 8
        centre = np.clip(here, even // 2, 7 - even // 2)
        assert np.array_equal(
            abs(centre[:, None] - here) <= even // 2,
            element_mask(sliding_tile((64,), 8, even + 1).axes[0]),
        )
    with pytest.raises(ValueError, match="setting: -1"):
        sliding_tile((64,), 8, 8)
    with pytest.raises(ValueError, match="tiles=0 .*setting: 1"):
        sliding_tile((64,), 8, 0)


def test_sparse_global_reaches_across_the_axis():
    window = sparse_global((16, 44, 80), (-1, 4, 16))
    assert window.dilation == (1, 11, 5)
    # Dense inside each dilation group, as the Cosmos layers that use it.
    assert window.is_block_sparse((4, 4, 8))
    assert window.axes[1].keys(5).tolist() == [5, 16, 27, 38]


# ---- snapping, our own border rule ---------------------------------------------------------------


def test_snap_keeps_windows_on_tile_edges_of_ragged_axes():
    shifted, snap = AxisWindow(45, 24, 8), AxisWindow(45, 24, 8, snap=8)
    assert block_sparse_problem(shifted, 8) is not None
    assert block_sparse_problem(snap, 8) is None
    assert (snap.start % 8 == 0).all()
    assert snap.keys(44).tolist() == list(range(24, 45))  # three keys fewer at the far border
    assert np.array_equal(element_mask(snap), axis_mask(45, 24, 8, snap=8))
    assert np.array_equal(snap.start[:30], shifted.start[:30])  # away from it, plain GNA
    assert AxisWindow(13, snap=4).is_whole and AxisWindow(13, snap=4).density == 1


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, rule",
    [
        ((48, 60), "window=60 on axis of length 48: a window cannot exceed its axis"),
        ((48, 1), "window=1 on axis of length 48: a window has at least 2 keys"),
        ((48, 0), "window=0 on axis of length 48: a window has at least 2 keys"),
        ((48, -7), "window=-7 on axis of length 48: a window has at least 2 keys"),
        ((48, 24, 25), "stride=25 on axis of length 48: a stride is 1..window, and window=24"),
        ((48, 24, 0), "stride=0 on axis of length 48: a stride is 1..window, and window=24"),
        ((48, 24, 8, 3), "window=24 with dilation=3 .* together they span 72 tokens"),
        ((48, 24, 8, 0), "dilation=0 on axis of length 48: a dilation is at least 1"),
        ((1, 2), "window=2 on axis of length 1: a single token has no window, drop the axis"),
        ((1, 1), "window=1 on axis of length 1"),
        ((1, WHOLE, 2), "stride=2 on axis of length 1"),
    ],
)
def test_illegal_settings_name_the_nearest_legal_one(setting, rule):
    with pytest.raises(ValueError, match=rule) as error:
        AxisWindow(*setting)
    numbers = re.search(
        r"nearest legal setting: window=(-?\d+).*, stride=(\d+), dilation=(\d+)$", str(error.value)
    )
    near = AxisWindow(setting[0], *map(int, numbers.groups()))  # legal, or this would raise
    assert near == nearest_legal(*setting)
    assert "\n" not in str(error.value)


def test_nearest_legal_settings():
    assert nearest_legal(48, 60, 8) == AxisWindow(48, 48, 8)
    assert nearest_legal(48, 24, 30) == AxisWindow(48, 24, 24)
    assert nearest_legal(48, 24, 8, 3) == AxisWindow(48, 24, 8, 2)
    assert nearest_legal(48, 1) == AxisWindow(48, 2)
    assert nearest_legal(1, 5, 3, 2) == AxisWindow(1)
    legal = AxisWindow(48, 24, 8, 2)
    assert nearest_legal(48, 24, 8, 2) == legal


def test_windows_name_the_axis_and_the_argument():
    with pytest.raises(ValueError, match="window=24 on frames of length 1: .* drop the axis"):
        Window((1, 48, 80), 24)
    with pytest.raises(ValueError, match="window=60 on height of length 48"):
        Window((48, 80), (60, 24))
    with pytest.raises(ValueError, match=r"stride=\(8, 8\): 2 entries for a grid of 3 axes"):
        Window((30, 48, 80), (18, 24, 24), (8, 8))
    with pytest.raises(ValueError, match="one to three axes"):
        Window((2, 3, 4, 5), 2)
    with pytest.raises(ValueError, match="length=0"):
        AxisWindow(0)


@pytest.mark.parametrize(
    "axis, tile_q, tile_kv, reason",
    [
        (AxisWindow(48, 24, 4), 8, 8, "stride 4 splits query tiles of 8"),
        (AxisWindow(45, 24, 8), 8, 8, "key tiles of 8 do not divide length 45"),
        (AxisWindow(48, 20, 8), 8, 8, "not on the edges of key tiles of 8"),
        (AxisWindow(48, 24, 8, causal=True), 8, 8, "causal"),
        (AxisWindow(48, 24, 8), 8, 8, None),
        (AxisWindow(48, 48, 1), 8, 8, None),
    ],
)
def test_why_a_setting_is_not_block_sparse(axis, tile_q, tile_kv, reason):
    problem = block_sparse_problem(axis, tile_q, tile_kv)
    assert problem is None if reason is None else reason in problem


def test_shared_tables_cannot_be_written():
    with pytest.raises(ValueError):
        AxisWindow(8, 3).start[0] = 1
