"""What an order leaves to do in a call when the video came in it; see `gen_accel.hoist`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gen_accel.layout import TokenGrid, TokenLayout


class Permuting(Protocol):
    """An order that is one permutation for all heads: `CurveOrder`, `TileOrder`."""

    def __hash__(self) -> int:
        """Orders are keys of caches."""

    def permutation(self, grid: TokenGrid) -> np.ndarray:
        """Raster index of the token at every place, -1 in padding."""

    def reorder(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """From the model's order."""

    def restore(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Back to it."""


@dataclass(frozen=True)
class Hoisted:
    """The rest of an order: text in front of the video goes behind it.

    Args:
        order: The order in which the video stands already.
    """

    order: Permuting

    def permutation(self, grid: TokenGrid) -> np.ndarray:
        """Raster index of the token at every place."""
        return self.order.permutation(grid)

    def reorder(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """``[text before, video, text after]`` to ``[video, text before, text after]``.

        Args:
            x: ``[batch, tokens, heads, head_dim]`` in the model's order, the video in `order`.
            layout: Where video and text stand in ``x``.

        Returns:
            ``x`` itself where no text is in front; else a view of ``[batch, heads, tokens,
            head_dim]`` memory, which is what the carriers read fastest.
        """
        before = layout.text_before
        if not before:
            return x
        parts = x.transpose(1, 2).split([before, layout.grid.numel, layout.text_after], 2)
        return torch.cat([parts[1], parts[0], parts[2]], 2).transpose(1, 2)

    def restore(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Undo `reorder`; contiguous where something moves."""
        before = layout.text_before
        if not before:
            return x
        parts = x.split([layout.grid.numel, before, layout.text_after], 1)
        return torch.cat([parts[1], parts[0], parts[2]], 1)
