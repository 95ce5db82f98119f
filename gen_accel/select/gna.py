"""From a window to block lists: tile order, full and partial blocks, text beside the grid."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_accel.kernels.blocks import Blocks, Intervals, MaskMod
from gen_accel.layout import TokenGrid
from gen_accel.order.tile import TileOrder
from gen_accel.order.tiling import Axis, group_lengths
from gen_accel.select.window import WHOLE, AxisWindow, Window, tile_ranges

BORDERS = ("shift", "snap")
RIMS = ("mask", "whole")
_NOWHERE = 2**30  # coordinate of a padded key: beyond every window
_MASK_COST = 1.5  # of a partial block against a full one, as NATTEN's kernels measure it


def gna_plan(
    grid: Sequence[int],
    window: int | Sequence[int] | Window | Sequence[Window],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    tile: str | Sequence[int] = "auto",
    block: int | None = None,
    border: str = "shift",
    rim: str = "mask",
    text: int = 0,
    text_keys: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[TileOrder, Blocks]:
    """Token order and block lists of a window.

    q, k and v go through ``order.reorder``, k and v are cut to ``blocks.kv_len``, and the result
    through ``order.restore``. Text stands in the same softmax: every query sees all of it, and text
    queries see everything.

    A block is one tile. Blocks that are visible as a whole are full and cost no mask; those at the
    rim of a window, and those with padding lanes, are partial. Where ``window`` is perfectly
    block-sparse for ``tile`` and the tile has no padding, none is partial.

    Args:
        grid: Video tokens (frames, height, width), (height, width) or (width,).
        window: Keys per axis, ``-1`` for a whole axis; or a `Window`, or one for each head, in
            place of the four settings.
        stride: Queries per axis that share a window.
        dilation: Distance of neighbouring keys per axis; the same for all heads.
        causal: No key after the query, per axis.
        tile: Tokens per tile along the axes of ``grid``, or ``"auto"``, see `auto_tile`.
        block: Places per tile, see `TileOrder`; with ``"auto"`` also the largest tile.
        border: ``"shift"``, GNA's rule; or ``"snap"``, *not* GNA: windows are shifted inwards at
            the tile edge behind the border instead of at the border, so that they stay
            block-sparse where the tile does not divide the axis.
        rim: ``"mask"``, the window; or ``"whole"``, *not* GNA: blocks that a window touches are
            seen whole, which approximates dense attention best and needs no masks.
        text: Text tokens in the sequence, padding included.
        text_keys: How many of them are real, counted from the first; None means all.
        device: Where the lists and the tables of the element rule live.

    Returns:
        The order, and the blocks for ``q_len = order.places(grid) + text`` queries.

    Raises:
        ValueError: An illegal setting, with the nearest legal one.
    """
    if border not in BORDERS:
        raise ValueError(f"border={border!r}: choose from {', '.join(map(repr, BORDERS))}")
    if rim not in RIMS:
        raise ValueError(f"rim={rim!r}: choose from {', '.join(map(repr, RIMS))}")
    text_keys = text if text_keys is None else text_keys
    if not 0 <= text_keys <= text:
        raise ValueError(f"text_keys={text_keys}: between 0 and text={text}")
    windows = head_windows(grid, window, stride, dilation, causal)
    video = TokenGrid(*windows[0].grid)
    shape = auto_tile(windows, block, border) if tile == "auto" else tile_shape(tile, len(grid))
    if border == "snap":
        windows = [replace(w, snap=shape) for w in windows]
    frames, height, width = (axis.dilation for axis in windows[0].axes)
    order = TileOrder(shape, (frames, height, width), block)
    whole = rim == "whole"
    return order, _blocks(order, video, windows, whole, text, text_keys, torch.device(device))


def auto_tile(
    windows: Sequence[Window], block: int | None = None, border: str = "shift"
) -> tuple[int, int, int]:
    """The tile on which the windows visit the fewest places.

    All shapes of half to all of ``block`` tokens (128 without one) are tried; a partial block
    counts one and a half times. A shape on which the windows are perfectly block-sparse wins by
    itself, because then nothing is visited that is not visible. Ties go to the larger and then to
    the rounder tile.

    Args:
        windows: Windows on three axes that share one tile, one per head.
        block: Places per tile, which padding fills up; None for tiles without padding lanes.
        border: See `gna_plan`.
    """
    limit = block or 128
    lengths = [int(group_lengths(a.length, a.dilation)[0]) for a in windows[0].axes]
    least = min(limit, math.prod(lengths)) / 2
    rules = [list(axis) for axis in zip(*(w.axes for w in set(windows)))]

    @functools.cache
    def pairs(axis: int, tile: int) -> np.ndarray:
        """Touched and full (query tile, key tile) pairs of each window on an axis."""
        snap = tile if border == "snap" else 1
        ranges = [tile_ranges(replace(rule, snap=snap), tile) for rule in rules[axis]]
        return np.array([[r.touched.sum(), r.full.sum()] for r in ranges], dtype=float)

    def cost(tile: tuple[int, int, int]) -> float:
        touched, full = np.prod([pairs(*axis) for axis in enumerate(tile)], 0).sum(0)
        volume = math.prod(tile)
        if block is not None and block > volume:
            full = 0  # padding lanes must be hidden
        return (full + _MASK_COST * (touched - full)) * (block or volume) ** 2

    shapes = [
        (f, h, w)
        for f in range(1, min(lengths[0], limit) + 1)
        for h in range(1, min(lengths[1], limit // f) + 1)
        for w in range(1, min(lengths[2], limit // (f * h)) + 1)
        if f * h * w >= least
    ]
    return min(shapes, key=lambda tile: (cost(tile), -math.prod(tile), sum(tile), tile))


# ---- arguments -----------------------------------------------------------------------------------


def head_windows(
    grid: Sequence[int],
    window: Any,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> list[Window]:
    """The window of every head, on three axes; one window when the heads share it.

    Arguments and errors as `gna_plan`.
    """
    settings: tuple[Any, Any, Any] = (stride, dilation, causal)
    given = [window] if isinstance(window, Window) else window
    if not (isinstance(given, Sequence) and given and isinstance(given[0], Window)):
        given = [Window(tuple(grid), window, *settings)]
    elif settings != (1, 1, False):
        raise ValueError(
            "stride, dilation and causal beside a Window: it has its own; set them there"
        )
    for w in given:
        if w.grid != tuple(grid):
            raise ValueError(
                f"a Window for grid {w.grid} on grid {tuple(grid)}: make it for this one"
            )
    windows = [_in_front(w, 3 - len(grid)) for w in given]
    dilations = {w.dilation for w in windows}
    if len(dilations) > 1:
        raise ValueError(
            f"dilations {sorted(dilations)} in one layer: they decide the token order, which heads "
            "share; give all heads one dilation"
        )
    return windows if len(set(windows)) > 1 else windows[:1]


def _in_front(window: Window, axes: int) -> Window:
    """The same window with unrestricted axes of length 1 in front."""
    return Window.from_axes([AxisWindow(1)] * axes + list(window.axes))


def tile_shape(tile: Any, axes: int) -> tuple[int, int, int]:
    """A tile on three axes."""
    if isinstance(tile, str) or not isinstance(tile, Sequence) or len(tile) != axes:
        raise ValueError(f"tile={tile!r}: 'auto', or {axes} numbers for a grid of {axes} axes")
    frames, height, width = (1,) * (3 - axes) + tuple(tile)
    return frames, height, width


# ---- lists and rule ------------------------------------------------------------------------------


def _blocks(
    order: TileOrder,
    grid: TokenGrid,
    windows: list[Window],
    whole: bool,
    text: int,
    text_keys: int,
    device: torch.device,
) -> Blocks:
    coordinates, lanes = order.coordinates(grid), order.lanes(grid)
    places = coordinates.shape[1]
    tiles = places // lanes
    shape = len(windows), tiles + -(-text // lanes), tiles + -(-text_keys // lanes)
    touched, full = np.ones(shape, bool), np.ones(shape, bool)
    for head, window in enumerate(windows):
        ranges = [tile_ranges(axis, tile) for axis, tile in zip(window.axes, order.tile)]
        touched[head, :tiles, :tiles] = _box([(r.first, r.stop) for r in ranges])
        full[head, :tiles, :tiles] = _box([(r.full_first, r.full_stop) for r in ranges])
    if whole:
        full, windows = touched.copy(), [Window(tuple(grid), WHOLE)]
    padded = (coordinates[0] < 0).reshape(tiles, lanes).any(1)
    full[:, :, :tiles] &= ~padded
    return Blocks.from_mask(
        torch.from_numpy(full)[None].to(device),
        partial=torch.from_numpy(touched & ~full)[None].to(device),
        mask_mod=_rule(windows, coordinates, lanes, text, text_keys, device),
        q_len=places + text,
        kv_len=places + text_keys,
        block_size=lanes,
    )


def _box(ranges: list[tuple[Axis, Axis]]) -> np.ndarray:
    """``[query tiles, key tiles]``: the key tiles in the range of every axis."""
    box = np.ones((1, 1), bool)
    for first, stop in ranges:
        tile = np.arange(len(first))
        box = np.kron(box, (tile >= first[:, None]) & (tile < stop[:, None]))
    return box


def _rule(
    windows: list[Window],
    coordinates: np.ndarray,
    lanes: int,
    text: int,
    text_keys: int,
    device: torch.device,
) -> MaskMod:
    """The element rule: a key lies in the query's interval on every axis, or is text."""
    places = coordinates.shape[1]
    place = np.arange(places)
    real = np.where(coordinates[0] < 0, place // lanes * lanes, place)  # as `TileOrder` fills them
    # An axis without a limit hides nothing but padding, and one axis is enough for that.
    limited = [a for a in range(3) if not all(w.axes[a].is_whole for w in windows)] or [2]

    def table(video: np.ndarray, tokens: int, value: int) -> Tensor:
        rest = np.full((*video.shape[:-1], tokens), value)
        return torch.from_numpy(np.concatenate([video, rest], -1).astype(np.int32)).to(device)

    key, low, high = [], [], []
    for a in limited:
        here = coordinates[a]
        key.append(table(np.where(here < 0, _NOWHERE, here), text_keys, 0))
        axes = [w.axes[a] for w in windows]
        low.append(table(np.stack([axis.start[here[real]] for axis in axes]), text, 0))
        high.append(table(np.stack([axis.end[here[real]] for axis in axes]), text, axes[0].length))
    return Intervals(torch.stack(key), torch.stack(low), torch.stack(high), places).rule()
