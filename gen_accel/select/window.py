"""Window selection: which keys a query sees by where they stand, nothing else.

Generalized Neighborhood Attention (arXiv 2504.16922) with the exact rule of NATTEN 0.21: per axis a
window, a stride, a dilation and a causal flag; a key is visible when it is on every axis. Sliding
windows, blocked attention (Swin), HaloNet, Sliding Tile Attention and sparse-global attention are
settings of it. Everything here is arithmetic on single axes; no N x N mask exists anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from gen_accel.order.tiling import Axis, group_lengths, tile_edges, unroll

WHOLE = -1
"""Window of an axis that is not restricted, however long it is."""

_AXES = ("frames", "height", "width")


@dataclass(frozen=True)
class AxisWindow:
    """The window rule on one axis.

    Queries come in runs of ``stride`` that share one window of ``size`` keys around the middle of
    the run (right of it when the run is even; an even window has one key more on the left). At the
    borders the window is shifted inwards, never cut. ``dilation`` applies the rule to every
    residue class of positions on its own. A causal window begins where the last query of the run
    needs it to, and ends with the query itself.

    Args:
        length: Tokens on the axis.
        size: Keys each query sees, 2..length, or `WHOLE`.
        stride: Queries that share a window, 1..size.
        dilation: Distance of neighbouring keys; ``size * dilation <= length``.
        causal: No key after the query.
        snap: Windows are shifted inwards at the border of the axis padded to a multiple of this,
            and cut at its end. This is our own border rule, not GNA: it keeps windows on tile edges
            where the tile does not divide the axis; queries at the far border see fewer keys.
        name: What error messages call the axis.
    """

    length: int
    size: int = WHOLE
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    snap: int = 1
    name: str = "axis"

    def __post_init__(self) -> None:
        if self.length < 1 or self.snap < 1:
            raise ValueError(f"length={self.length}, snap={self.snap}: each is at least 1")
        problem = self._problem()
        if problem is not None:
            near = nearest_legal(self.length, self.size, self.stride, self.dilation)
            size = "-1 (the whole axis)" if near.size == WHOLE else str(near.size)
            raise ValueError(
                f"{problem}; nearest legal setting: "
                f"window={size}, stride={near.stride}, dilation={near.dilation}"
            )

    def _problem(self) -> str | None:
        where = f"on {self.name} of length {self.length}"
        if self.size != WHOLE:
            if self.length == 1:
                return f"window={self.size} {where}: a single token has no window, drop the axis"
            if self.size > self.length:
                return f"window={self.size} {where}: a window cannot exceed its axis"
            if self.size < 2:
                return f"window={self.size} {where}: a window has at least 2 keys"
        if not 1 <= self.stride <= self.width:
            return f"stride={self.stride} {where}: a stride is 1..window, and window={self.width}"
        if self.dilation < 1:
            return f"dilation={self.dilation} {where}: a dilation is at least 1"
        if self.width * self.dilation > self.length:
            return (
                f"window={self.width} with dilation={self.dilation} {where}: "
                f"together they span {self.width * self.dilation} tokens"
            )
        return None

    @property
    def width(self) -> int:
        """Keys per query: ``size``, or the length of a whole axis."""
        return self.length if self.size == WHOLE else self.size

    @property
    def is_whole(self) -> bool:
        """Whether every query sees every key of the axis."""
        return self.width == self.length and not self.causal

    @property
    def start(self) -> Axis:
        """First visible key of each query, both in unrolled places; ``[length]``, ascending."""
        return _intervals(self)[0]

    @property
    def end(self) -> Axis:
        """One past the last visible key of each query; ``[length]``, ascending."""
        return _intervals(self)[1]

    def keys(self, position: int) -> np.ndarray:
        """Positions of the keys that the query at ``position`` sees, ascending."""
        positions = unroll(self.length, self.dilation)
        place = int(np.flatnonzero(positions == position)[0])
        return positions[self.start[place] : self.end[place]]

    def edges(self, tile: int) -> Axis:
        """Where the tiles begin, in unrolled places; see `tile_edges`."""
        return tile_edges(self.length, tile, self.dilation)

    @property
    def density(self) -> float:
        """Share of all (query, key) pairs that are visible."""
        return float((self.end - self.start).sum()) / self.length**2


def nearest_legal(length: int, size: int, stride: int = 1, dilation: int = 1) -> AxisWindow:
    """The legal setting next to an illegal one: clamp the window, then the other two to it."""
    if length == 1:
        return AxisWindow(length)
    if size != WHOLE:
        size = min(max(size, 2), length)
    width = length if size == WHOLE else size
    dilation = min(max(dilation, 1), length // width)
    return AxisWindow(length, size, min(max(stride, 1), width), dilation)


@lru_cache(maxsize=4096)
def _intervals(axis: AxisWindow) -> tuple[Axis, Axis]:
    lengths = group_lengths(axis.length, axis.dilation)
    offset = np.repeat(np.cumsum(lengths) - lengths, lengths)
    length = np.repeat(lengths, lengths)
    place = np.arange(axis.length) - offset
    # "snap" pretends that the axis went on to the next tile edge.
    snap = 1 if axis.causal or axis.is_whole else axis.snap
    border = -(-length // snap) * snap
    first = place // axis.stride * axis.stride
    if axis.causal:
        lead = np.minimum(first + axis.stride - 1, border - 1)
        start = np.maximum(lead - axis.width + 1, 0)
        end = place + 1
    else:
        lead = np.minimum(first + axis.stride // 2, border - 1)
        start = np.clip(lead - axis.width // 2, 0, border - axis.width)
        end = np.minimum(start + axis.width, length)
    start, end = start + offset, end + offset
    start.flags.writeable = end.flags.writeable = False
    return start, end


# ---- tiles ---------------------------------------------------------------------------------------


class TileRanges(NamedTuple):
    """Key tiles of each query tile on one axis: touched are ``first..stop``, and of these
    ``full_first..full_stop`` are visible to every query of the tile.

    Ranges suffice, because windows only move forward; in N dimensions they make boxes.
    Each ``[query tiles]``.
    """

    first: Axis
    stop: Axis
    full_first: Axis
    full_stop: Axis

    @property
    def touched(self) -> Axis:
        """Number of key tiles with a visible pair."""
        return self.stop - self.first

    @property
    def full(self) -> Axis:
        """Number of key tiles whose pairs are all visible."""
        return self.full_stop - self.full_first


@lru_cache(maxsize=8192)
def tile_ranges(axis: AxisWindow, tile_q: int, tile_kv: int | None = None) -> TileRanges:
    """Which key tiles the query tiles of an axis visit.

    Args:
        axis: The window rule.
        tile_q: Queries per tile.
        tile_kv: Keys per tile; None means ``tile_q``.
    """
    queries, keys = axis.edges(tile_q), axis.edges(tile_kv or tile_q)
    head, last = queries[:-1], queries[1:] - 1
    first = np.searchsorted(keys, axis.start[head], side="right") - 1
    stop = np.searchsorted(keys, axis.end[last], side="left")
    # Seen by all of the tile: from the last query's start to the first query's end.
    full_first = np.searchsorted(keys, axis.start[last], side="left")
    full_stop = np.searchsorted(keys, axis.end[head], side="right") - 1
    return TileRanges(first, stop, full_first, np.maximum(full_first, full_stop))


def block_sparse_problem(axis: AxisWindow, tile_q: int, tile_kv: int | None = None) -> str | None:
    """Why some key tile is visited in part on this axis, or None: perfectly block-sparse.

    Exact, where NATTEN's closed form errs on both sides (its query tiles of length 1).
    """
    tile_kv = tile_kv or tile_q
    ranges = tile_ranges(axis, tile_q, tile_kv)
    if not (ranges.touched - ranges.full).any():
        return None
    if axis.causal:
        return f"{axis.name}: causal"
    queries = axis.edges(tile_q)
    if (axis.start[queries[:-1]] != axis.start[queries[1:] - 1]).any():
        return f"{axis.name}: stride {axis.stride} splits query tiles of {tile_q}"
    if axis.snap == 1 and any(n % tile_kv for n in group_lengths(axis.length, axis.dilation)):
        return f"{axis.name}: key tiles of {tile_kv} do not divide length {axis.length}"
    return (
        f"{axis.name}: windows of {axis.width} with stride {axis.stride} "
        f"are not on the edges of key tiles of {tile_kv}"
    )


# ---- all axes together ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A window on a grid of one, two or three axes, slowest axis first.

    Single numbers hold for every axis; as stride and dilation, for every axis with a window. On an
    image (a grid whose first axis has length 1) two entries are those of height and width.

    Args:
        grid: Tokens along each axis.
        size: Keys per axis; ``-1`` (`WHOLE`) leaves an axis unrestricted.
        stride: Queries per axis that share a window.
        dilation: Distance of neighbouring keys per axis.
        causal: No key after the query, per axis.
        snap: Tile on whose edges windows stay at ragged borders, see `AxisWindow`; 1 is GNA's rule.

    Attributes:
        axes: The rule of each axis.
    """

    grid: tuple[int, ...]
    size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    snap: int | tuple[int, ...] = 1
    axes: tuple[AxisWindow, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.grid) <= 3:
            raise ValueError(f"grid={self.grid}: one to three axes, slowest first")
        object.__setattr__(self, "grid", tuple(self.grid))
        unrestricted = {"size": WHOLE, "stride": 1, "dilation": 1, "causal": False, "snap": 1}
        for name, fill in unrestricted.items():
            given: Any = getattr(self, name)
            sizes: Any = self.size
            if name in ("stride", "dilation") and not isinstance(given, Sequence):
                given = tuple(fill if size == WHOLE else given for size in sizes)
            object.__setattr__(self, name, self._per_axis(name, given, fill))
        columns: Any = (self.grid, self.size, self.stride, self.dilation, self.causal, self.snap)
        axes = tuple(AxisWindow(*axis) for axis in zip(*columns, _AXES[-len(self.grid) :]))
        object.__setattr__(self, "axes", axes)

    @classmethod
    def from_axes(cls, axes: Sequence[AxisWindow]) -> Window:
        """The window with these rules, slowest axis first."""
        names = ("length", "size", "stride", "dilation", "causal", "snap")
        columns: Any = (tuple(getattr(axis, name) for axis in axes) for name in names)
        return cls(*columns)

    def _per_axis(self, name: str, given: Any, fill: int) -> tuple[int, ...]:
        values = _spread(given, self.grid)
        if len(values) == len(self.grid) - 1 and self.grid[0] == 1:
            values = (fill, *values)
        if len(values) != len(self.grid):
            raise ValueError(
                f"{name}={given}: {len(values)} entries for a grid of {len(self.grid)} axes; "
                "give one number, or one per axis"
            )
        return values

    @property
    def density(self) -> float:
        """Share of all (query, key) pairs that are visible; text is not counted."""
        return math.prod(axis.density for axis in self.axes)

    def block_sparse_problem(
        self, tile_q: Sequence[int], tile_kv: Sequence[int] | None = None
    ) -> str | None:
        """Why some key tile is visited in part, or None: perfectly block-sparse."""
        problems = map(block_sparse_problem, self.axes, tile_q, tile_kv or tile_q)
        return "; ".join(filter(None, problems)) or None

    def is_block_sparse(self, tile_q: Sequence[int], tile_kv: Sequence[int] | None = None) -> bool:
        """Whether every visited key tile is visible to its whole query tile."""
        return self.block_sparse_problem(tile_q, tile_kv) is None


# ---- settings with a name ------------------------------------------------------------------------


def neighborhood(grid: Sequence[int], size: int | Sequence[int]) -> Window:
    """Neighborhood attention: every query has a window of its own."""
    return Window(tuple(grid), _spread(size, grid))


def strided(grid: Sequence[int], size: int | Sequence[int], stride: int | Sequence[int]) -> Window:
    """Strided neighborhood attention: runs of ``stride`` queries share a window."""
    return Window(tuple(grid), _spread(size, grid), _spread(stride, grid))


def blocked(grid: Sequence[int], size: int | Sequence[int]) -> Window:
    """Blocked attention (Swin's windows without the shift): a block sees itself.

    Exact where the window divides the axis; else the last, short block sees the last ``size``
    tokens, where Swin pads.
    """
    return strided(grid, size, size)


def halo(grid: Sequence[int], block: int | Sequence[int], margin: int | Sequence[int]) -> Window:
    """HaloNet: a block sees itself and a margin around it.

    Interior blocks are exact; at the border HaloNet masks what is missing, GNA shifts the window.
    """
    blocks, margins = _spread(block, grid), _spread(margin, grid)
    return strided(grid, tuple(b + 2 * m for b, m in zip(blocks, margins)), blocks)


def sliding_tile(
    grid: Sequence[int], tile: int | Sequence[int], tiles: int | Sequence[int]
) -> Window:
    """Sliding Tile Attention: a tile sees ``tiles`` tiles around it, per axis.

    Exact, borders included, where the tile divides the axis. The number of tiles must be odd: the
    authors' own mask treats an even one as the next odd. `WHOLE` sees the whole axis.
    """
    sizes, strides = [], []
    for length, t, m, name in zip(
        grid, _spread(tile, grid), _spread(tiles, grid), _AXES[-len(grid) :]
    ):
        if m != WHOLE and (m < 1 or m % 2 == 0):
            odd = max(m + 1, 1)
            nearest = odd if odd * t <= length else WHOLE
            raise ValueError(
                f"tiles={m} on {name}: a sliding window has an odd number of tiles, the query's "
                f"own in the middle; nearest legal setting: {nearest}"
            )
        sizes.append(m if m == WHOLE else m * t)
        strides.append(1 if m == WHOLE else t)
    return Window(tuple(grid), tuple(sizes), tuple(strides))


def sparse_global(grid: Sequence[int], size: int | Sequence[int]) -> Window:
    """Every query sees ``size`` keys per axis, spread over the whole of it."""
    sizes = _spread(size, grid)
    dilation = tuple(1 if w == WHOLE else max(1, n // max(w, 1)) for n, w in zip(grid, sizes))
    return Window(tuple(grid), sizes, dilation=dilation)


def causal(
    grid: Sequence[int], size: int | Sequence[int], stride: int | Sequence[int] = 1
) -> Window:
    """A causal sliding window on the slowest axis; the other axes are not causal."""
    flags = (True, *(False for _ in grid[1:]))
    return Window(tuple(grid), _spread(size, grid), _spread(stride, grid), causal=flags)


def _spread(value: int | Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,) * len(grid)
