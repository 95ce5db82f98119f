"""Raster order: the video as the model has it; only text in front of it moves behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen_accel.layout import TokenGrid, TokenLayout


@dataclass(frozen=True)
class RasterOrder:
    """The order to compare with: ``[video, text before, text after]``."""

    def permutation(self, grid: TokenGrid) -> np.ndarray:
        """Raster index of the token at every place; int64 ``[F*H*W]``."""
        return np.arange(grid.numel)

    def reorder(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """``[batch, tokens, heads, head_dim]``, the text behind the video; a view if it was."""
        video, text = layout.text_before, layout.text_before + layout.grid.numel
        if not video:
            return x
        return torch.cat([x[:, video:text], x[:, :video], x[:, text:]], 1)

    def restore(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Undo `reorder`; contiguous."""
        video, text = layout.grid.numel, layout.grid.numel + layout.text_before
        if not layout.text_before:
            return x.contiguous()
        return torch.cat([x[:, video:text], x[:, :video], x[:, text:]], 1)
