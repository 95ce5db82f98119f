"""Curve order: the video along one space-filling curve, so that any run of tokens is compact.

A generalised Hilbert curve for boxes of any size: a box is cut into a few smaller ones, each
travelled from one corner to the far end of one of its edges, and so on down to single lines (the
idea is Cerveny's "gilbert" curve; Rectified SpaAttn, arXiv 2511.19835, orders tokens by it). Our
cuts mind parity: a path along an edge exists exactly when the edge is even or the whole box is odd
(colour the cells like a chess board), and every box here is cut into boxes of which that is true.
So neighbours on the curve are neighbours in the video, without exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.axis import inverse_permutation

_AXES = "WHF"  # as the paper prefers them; an image's major axis is its width


@dataclass(frozen=True)
class CurveOrder:
    """One curve for all heads.

    The ordered sequence is ``[video along the curve, text before, text after]``.

    Args:
        major: Axis whose two ends the curve connects, ``"W"``, ``"H"`` or ``"F"``. Where no such
            curve exists (an odd axis of an even grid), the next of W, H, F that has one.
    """

    major: str = "W"

    def __post_init__(self) -> None:
        if self.major not in _AXES or len(self.major) != 1:
            raise ValueError(f"major={self.major!r}: name one axis, W, H or F")

    def permutation(self, grid: TokenGrid) -> np.ndarray:
        """Raster index of the token at every place; int64 ``[F*H*W]``, read-only."""
        return _permutation(self.major, grid)

    def reorder(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Put the tokens on the curve.

        Args:
            x: ``[batch, tokens, heads, head_dim]`` in the model's order.
            layout: Where video and text stand in ``x``.

        Returns:
            Same shape; a view of ``[batch, heads, tokens, head_dim]`` memory, which is what the
            carriers read fastest.
        """
        index, _ = self._indices(x, layout)
        return torch.index_select(x.transpose(1, 2), 2, index).transpose(1, 2)

    def restore(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Undo `reorder`: back to the model's order, contiguous ``[batch, tokens, heads, dim]``."""
        _, inverse = self._indices(x, layout)
        return torch.index_select(x, 1, inverse)

    def _indices(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        if x.shape[1] != layout.tokens:
            raise ValueError(
                f"tensor {tuple(x.shape)}: grid {layout.grid} with {layout.text} text tokens needs "
                f"[batch, {layout.tokens}, heads, head_dim]"
            )
        return _indices(self, layout.grid, layout.text_before, layout.text_after, x.device)


@lru_cache(maxsize=32)
def _indices(
    order: CurveOrder, grid: TokenGrid, before: int, after: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which token stands at each ordered place, and at which place each token stands."""
    video, end = before + order.permutation(grid), before + grid.numel
    # Cached: made under inference_mode, they could never serve a call that needs a gradient.
    with torch.inference_mode(False):
        index = torch.from_numpy(np.r_[video, :before, end : end + after])
        return index.to(device), inverse_permutation(index).to(device)


@lru_cache(maxsize=16)
def _permutation(major: str, grid: TokenGrid) -> np.ndarray:
    sizes = dict(zip("FHW", grid))
    names = sorted(_AXES, key=lambda axis: axis != major)
    fits = [a for a in names if sizes[a] > 1 and (sizes[a] % 2 == 0 or grid.numel % 2)]
    first = (fits or names)[0]
    names.sort(key=lambda axis: axis != first)
    place = _curve(*(sizes[axis] for axis in names))
    frame, row, column = (place[:, names.index(axis)] for axis in "FHW")
    permutation = (frame * grid.height + row) * grid.width + column
    permutation.flags.writeable = False
    return permutation


# ---- the curve -----------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A box inside a box: the corner it is entered at, unit vectors from there, lengths on these.

    It is left at the far end of its first edge.
    """

    corner: np.ndarray
    edges: tuple[np.ndarray, np.ndarray, np.ndarray]
    lengths: tuple[int, int, int]


def _curve(w: int, h: int, d: int) -> np.ndarray:
    """Cells of a box from its origin to the far end of its first axis; int64 ``[cells, 3]``."""

    @cache  # few shapes make up a large box
    def travel(w: int, h: int, d: int) -> np.ndarray:
        if h == d == 1:
            return np.arange(w)[:, None] * np.eye(1, 3, dtype=np.int64)
        parts = _cut(w, h, d)
        return np.concatenate([p.corner + travel(*p.lengths) @ np.stack(p.edges) for p in parts])

    return travel(w, h, d)


def _cut(w: int, h: int, d: int) -> list[_Part]:
    """Cut a box of which the curve's condition is true (w even, or all odd) into such boxes."""
    a, b, c = np.eye(3, dtype=np.int64)
    if h < d:
        h, d, b, c = d, h, c, b
    n = _even_half(h)
    # Cuts keep the parts' edges within 4/3 of each other, measured to give compact blocks.
    if w > 3 and 3 * w > 4 * h:  # long: one half behind the other
        m = _even_half(w)
        return [
            _Part(0 * a, (a, b, c), (m, h, d)),
            _Part(m * a, (a, b, c), (w - m, h, d)),
        ]
    if d == 1 or 3 * h > 4 * d or w * h * d % 2:  # flat: up, across and down
        m = w // 2
        return [
            _Part(0 * a, (b, a, c), (n, m, d)),
            _Part(n * b, (a, b, c), (w, h - n, d)),
            _Part((w - 1) * a + (n - 1) * b, (-b, -a, c), (n, w - m, d)),
        ]
    # Like a cube: up, back, across in the back, to the front and down.
    if d % 2:
        h, d, b, c = d, h, c, b
    n, k, m = _even_half(h), _even_half(d), w // 2
    if d % 2 and m % 2 == 0:
        m -= 1  # h and d are odd: both halves of w have to be
    return [
        _Part(0 * a, (b, c, a), (n, k, m)),
        _Part(n * b, (c, a, b), (d, m, h - n)),
        _Part((n - 1) * b + (d - 1) * c, (a, -b, -c), (w, n, d - k)),
        _Part((w - 1) * a + n * b + (d - 1) * c, (-c, -a, b), (d, w - m, h - n)),
        _Part((w - 1) * a + (n - 1) * b, (-b, c, -a), (n, k, w - m)),
    ]


def _even_half(n: int) -> int:
    """About half of n and even; of 2, which has no such half, 1."""
    return (n // 2 + 1) // 2 * 2 if n > 2 else 1
