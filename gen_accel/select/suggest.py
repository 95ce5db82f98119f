"""Which window to take: block-sparse settings for a density, and for another resolution.

A window costs exactly its density only where it is perfectly block-sparse, which almost no window
is that was picked by hand (and none but the whole axis where the tile does not divide the axis).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gen_accel.select.window import AxisWindow, Window, block_sparse_problem

_FILL = 0.85  # of a block, below which a tile wastes too much of it
_EVENNESS = 0.2  # how much uneven shares of the axes weigh against a missed density


def fitting_tile(grid: Sequence[int], block: int = 128, border: str = "shift") -> tuple[int, ...]:
    """The tile that fits a grid and fills a block best.

    Under the ``"shift"`` border it divides every axis, or no window could be block-sparse. A tile
    of exactly ``block`` tokens needs no padding lanes and comes first; then the roundest of those
    that fill 85 % of it; if there is none (axes of prime length), the largest. Under ``"snap"`` it
    has exactly ``block`` tokens, and the roundest with the least padding at the borders wins.

    Args:
        grid: Tokens along each axis.
        block: Places per tile.
        border: See `gna_plan`.
    """
    if border == "snap":
        sizes = [t for t in range(1, block + 1) if block % t == 0]
        tiles = [t for t in itertools.product(sizes, repeat=len(grid)) if math.prod(t) == block]
    else:
        divisors = [[t for t in range(1, min(n, block) + 1) if n % t == 0] for n in grid]
        tiles = [t for t in itertools.product(*divisors) if math.prod(t) <= block]

    def rank(tile: tuple[int, ...]) -> tuple[float, ...]:
        volume = math.prod(tile)
        padded = math.prod(-(-n // t) * t for n, t in zip(grid, tile)) / math.prod(grid)
        if volume < _FILL * block:
            return 2, -volume, sum(tile)
        return int(volume < block), padded * sum(tile) / volume ** (1 / len(tile)), -volume

    return min(tiles, key=lambda tile: (*rank(tile), tile))


@lru_cache(maxsize=256)
def axis_menu(
    length: int, tile_q: int, tile_kv: int | None = None, dilation: int = 1, snap: int = 1
) -> tuple[AxisWindow, ...]:
    """Every perfectly block-sparse window of an axis with its smallest stride, shortest first.

    The smallest, because the window governs quality and the stride costs a little of it. The last
    entry is always the whole axis, unless a dilation does not divide it.
    """
    tile_kv = tile_kv or tile_q
    longest = length // dilation
    menu = []
    for size in range(tile_kv, longest + 1, tile_kv):
        if size < 2 or size == length:
            continue
        for stride in range(1, size + 1):
            axis = AxisWindow(length, size, stride, dilation, snap=snap)
            if block_sparse_problem(axis, tile_q, tile_kv) is None:
                menu.append(axis)
                break
    if dilation == 1:
        menu.append(AxisWindow(length, snap=snap))
    return tuple(menu)


def suggest(
    grid: Sequence[int],
    density: float,
    tile: str | Sequence[int] = "auto",
    *,
    border: str = "shift",
    count: int = 5,
) -> tuple[Window, ...]:
    """Perfectly block-sparse windows near a density, best first.

    Best is near in density and of similar reach on every axis.

    Args:
        grid: Tokens along each axis.
        density: Share of keys to see, in (0, 1].
        tile: Tokens per tile, or ``"auto"`` for `fitting_tile`.
        border: ``"snap"`` for windows that are block-sparse on ragged axes too; see `gna_plan`.
        count: How many.

    Raises:
        ValueError: The density is no share.
    """
    if not 0 < density <= 1:
        raise ValueError(
            f"density={density}: a share of the keys lies in (0, 1]; 0.25 is a quarter"
        )
    shape = _tile(grid, tile, border)
    if math.prod(grid) == 1:
        return (Window.from_axes([AxisWindow(1)] * len(grid)),)
    menus = [
        axis_menu(length, t, snap=t if border == "snap" else 1) for length, t in zip(grid, shape)
    ]
    shares = [np.log([axis.density for axis in menu]) for menu in menus]
    # An axis of one token has nothing to restrict, and no say in what is even.
    wide = np.stack([s for n, s in zip(grid, np.meshgrid(*shares, indexing="ij")) if n > 1])
    score = abs(wide.sum(0) - math.log(density)) + _EVENNESS * wide.std(0)
    best = np.argsort(score, axis=None, kind="stable")[:count]
    return tuple(
        Window.from_axes([menu[i] for menu, i in zip(menus, index)])
        for index in zip(*np.unravel_index(best, score.shape))
    )


def rescale(
    window: Window, grid: Sequence[int], tile: str | Sequence[int] = "auto", border: str = "shift"
) -> Window:
    """The same share of another grid, perfectly block-sparse there.

    Rounding a scaled window and stride loses block sparsity; this takes the nearest setting that
    has it. A dilation is kept where it can be (window times dilation then covers the same share),
    else the nearest one is taken. Causal axes, which are never block-sparse, are only rounded.

    Args:
        window: A setting that is right for its own grid.
        grid: The new grid, as many axes.
        tile: Tokens per tile of the new grid, or ``"auto"`` for `fitting_tile`.
        border: See `gna_plan`.
    """
    if len(grid) != len(window.grid):
        raise ValueError(f"grid={tuple(grid)}: the window is for {len(window.grid)} axes")
    shape = _tile(grid, tile, border)
    axes = zip(window.axes, grid, shape)
    return Window.from_axes([_rescale(a, n, t, t if border == "snap" else 1) for a, n, t in axes])


def _rescale(axis: AxisWindow, length: int, tile: int, snap: int) -> AxisWindow:
    if length == 1 or axis.is_whole:
        return AxisWindow(length, snap=snap)
    size = axis.width * length / axis.length
    if axis.causal:
        size = min(max(round(size), 2), length)
        stride = min(max(round(axis.stride * length / axis.length), 1), size)
        dilation = min(axis.dilation, length // size)
        return AxisWindow(length, size, stride, dilation, True, snap)
    dilations = [1] if axis.dilation == 1 else range(1, length // 2 + 1)
    settings = [s for d in dilations for s in axis_menu(length, tile, None, d, snap)]

    def distance(setting: AxisWindow) -> float:
        moved = abs(math.log(setting.width / size))
        return moved + abs(math.log(setting.dilation / axis.dilation))

    return min(settings, key=distance)


def _tile(grid: Sequence[int], tile: str | Sequence[int], border: str) -> tuple[int, ...]:
    if isinstance(tile, str):
        if tile != "auto":
            raise ValueError(f"tile={tile!r}: give 'auto', or one number per axis")
        return fitting_tile(grid, border=border)
    if len(tile) != len(grid) or min(tile) < 1:
        raise ValueError(
            f"tile={tuple(tile)}: a grid of {len(grid)} axes needs {len(grid)} numbers, each >= 1"
        )
    return tuple(tile)
