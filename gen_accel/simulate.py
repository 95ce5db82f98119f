"""What a window costs before anything runs: key tiles visited, and the speed they bound.

Counts the key tiles that each query tile visits, as a kernel with static tiles would, and compares
with dense attention (the analytical simulator of GNA, arXiv 2504.16922, section 3.2; the authors'
own is not released, ours is reconstructed and tested against their tables). Bounds, not forecasts:
overheads outside attention's inner loop are not in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gen_accel.select.suggest import axis_menu
from gen_accel.select.window import WHOLE, AxisWindow, Window, tile_ranges


@dataclass(frozen=True)
class Simulation:
    """Tiles visited by a window.

    Attributes:
        window: The setting.
        tile_q: Query tile.
        tile_kv: Key tile.
        query_tiles: Number of query tiles, over all dilation groups.
        key_tiles: Key tiles a dense query tile visits.
        worst: Key tiles that the busiest query tile visits.
        mean: Key tiles that a query tile visits on average.
        mask_free: Share of the visited tiles that need no mask.
        padding: Places added to the keys by cutting them into tiles, as a share of the tokens.
        problem: Why the setting is not perfectly block-sparse, or None when it is.
    """

    window: Window
    tile_q: tuple[int, ...]
    tile_kv: tuple[int, ...]
    query_tiles: int
    key_tiles: int
    worst: int
    mean: float
    mask_free: float
    padding: float
    problem: str | None

    @property
    def bound_flops(self) -> float:
        """Speed-up over dense attention if only visible pairs cost anything."""
        return 1 / self.window.density

    @property
    def bound_worst(self) -> float:
        """Speed-up if every query tile were as busy as the busiest: what the paper reports."""
        return self._dense_visits / (self.worst * self.query_tiles)

    @property
    def bound_mean(self) -> float:
        """Speed-up by the tiles that are really visited; border tiles visit fewer."""
        return self._dense_visits / (self.mean * self.query_tiles)

    @property
    def _dense_visits(self) -> int:
        # Dilation groups have more short tiles than the undilated grid, hence not query_tiles.
        return self.key_tiles * math.prod(map(_tiles, self.window.grid, self.tile_q))


def simulate(
    window: Window, tile_q: Sequence[int], tile_kv: Sequence[int] | None = None
) -> Simulation:
    """Count the key tiles that a window visits.

    Args:
        window: The setting, on a grid of one to three axes.
        tile_q: Tokens per query tile along each axis.
        tile_kv: Tokens per key tile; None means ``tile_q``.

    Raises:
        ValueError: A tile does not fit the number of axes.
    """
    tile_q = _checked("tile_q", tile_q, window)
    tile_kv = _checked("tile_kv", tile_q if tile_kv is None else tile_kv, window)
    ranges = [tile_ranges(*axis) for axis in zip(window.axes, tile_q, tile_kv)]
    touched = math.prod(int(r.touched.sum()) for r in ranges)
    query_tiles = math.prod(len(r.first) for r in ranges)
    places = math.prod(t * (len(axis.edges(t)) - 1) for axis, t in zip(window.axes, tile_kv))
    return Simulation(
        window=window,
        tile_q=tile_q,
        tile_kv=tile_kv,
        query_tiles=query_tiles,
        key_tiles=math.prod(map(_tiles, window.grid, tile_kv)),
        worst=math.prod(int(r.touched.max()) for r in ranges),
        mean=touched / query_tiles,
        mask_free=math.prod(int(r.full.sum()) for r in ranges) / touched,
        padding=places / math.prod(window.grid) - 1,
        problem=window.block_sparse_problem(tile_q, tile_kv),
    )


def end_to_end(speedup: float, attention_share: float, sparse_share: float = 1.0) -> float:
    """Speed-up of a whole run in which attention alone became faster (Amdahl).

    Args:
        speedup: Of an attention call.
        attention_share: Share of the dense run's time that is spent in it, 0..1.
        sparse_share: Share of the steps that run sparse, 0..1.
    """
    for name, share in (("attention_share", attention_share), ("sparse_share", sparse_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share}: a share lies between 0 and 1")
    share = attention_share * sparse_share
    return 1 / (1 - share + share / speedup)


def sweep(
    grid: Sequence[int],
    tile_q: Sequence[int],
    tile_kv: Sequence[int] | None = None,
    *,
    density: float | None = None,
    border: str = "shift",
    tolerance: float = 0.1,
    count: int = 20,
) -> list[Simulation]:
    """The settings near a density that lose least to partly visible tiles.

    Tried are all windows of whole key tiles on every axis, each with stride 1 and with its smallest
    perfectly block-sparse stride. Those whose `Simulation.bound_worst` comes closest to
    `Simulation.bound_flops` stand first, among equals those nearest in density and then those that
    reach similarly far on every axis.

    Args:
        grid: Tokens along each axis.
        tile_q: Tokens per query tile.
        tile_kv: Tokens per key tile; None means ``tile_q``.
        density: Wanted share of visible keys; None samples all that was tried.
        border: ``"snap"`` for windows that keep to key tile edges; see `gna_plan`.
        tolerance: How far from it a setting may lie, relative.
        count: At most so many.
    """
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density={density}: a share of the keys lies in (0, 1]")
    whole = Window(tuple(grid), WHOLE)
    tile_q = _checked("tile_q", tile_q, whole)
    tile_kv = _checked("tile_kv", tile_q if tile_kv is None else tile_kv, whole)
    snaps = tile_kv if border == "snap" else (1,) * len(grid)
    options = [_options(*axis) for axis in zip(grid, tile_q, tile_kv, snaps)]
    # Per axis and combination, as logarithms: the product over the axes is a sum.
    shares = _combined([[axis.density for axis in column] for column in options])
    visits = _combined(
        [
            [tile_ranges(axis, q, kv).touched.max() for axis in column]
            for column, q, kv in zip(options, tile_q, tile_kv)
        ]
    )
    if density is None:
        total = shares[0].size
        found = np.linspace(0, total - 1, min(count, total)).astype(int)
    else:
        reached = np.exp(shares.sum(0)).ravel()
        waste = (visits - shares).sum(0).ravel()
        uneven = shares[[n > 1 for n in grid]].std(0).ravel()
        distance = abs(reached - density)
        found = np.flatnonzero(distance <= tolerance * density)
        order = np.lexsort((uneven[found], distance[found].round(9), waste[found].round(9)))
        found = found[order][:count]
    indices = zip(*np.unravel_index(found, shares[0].shape))
    windows = [Window.from_axes([column[i] for column, i in zip(options, at)]) for at in indices]
    return [simulate(window, tile_q, tile_kv) for window in windows]


def _options(length: int, tile_q: int, tile_kv: int, snap: int) -> list[AxisWindow]:
    """The settings of one axis that `sweep` tries."""
    sizes = [size for size in range(tile_kv, length, tile_kv) if size > 1]
    axes = [AxisWindow(length, size, snap=snap) for size in sizes]
    menu = axis_menu(length, tile_q, tile_kv, snap=snap)
    return axes + [axis for axis in menu if axis not in axes]


def _combined(values: Sequence[Sequence[float]]) -> np.ndarray:
    return np.log(np.stack(np.meshgrid(*values, indexing="ij")))


def _tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def _checked(name: str, tile: Sequence[int], window: Window) -> tuple[int, ...]:
    if len(tile) != len(window.grid) or min(tile) < 1:
        raise ValueError(
            f"{name}={tuple(tile)}: a grid of {len(window.grid)} axes needs as many numbers, "
            "each at least 1"
        )
    return tuple(tile)
