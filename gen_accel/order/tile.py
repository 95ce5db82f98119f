"""Tile order: small boxes of the video stand together, so that one block is one box.

In raster order 128 neighbouring tokens are a thin line, and a window that is local in space touches
nearly every block. Tiles make a window a box of whole blocks (GNA, arXiv 2504.16922, appendix B.2;
Sliding Tile Attention, arXiv 2502.04507). Attention does not notice an order that
q, k and v share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.tiling import group_lengths, tile_edges, unroll


@dataclass(frozen=True)
class TileOrder:
    """One tiling for all heads.

    The ordered sequence is ``[tiles, text before, text after]``. Every tile takes one block of
    ``lanes(grid)`` places, so each begins on a block edge. Its tokens come first; the lanes that
    remain (at ragged borders, or when ``block`` is larger than a tile) repeat the tile's first
    token, which keeps every number finite and every maximum what it was. Block lists must hide them
    as keys; as queries `restore` drops them.

    Args:
        tile: Tokens per tile along (frames, height, width); an axis shorter than that is one tile.
        dilation: Tokens of an axis that are equal modulo this stand together.
        block: Places per tile; None takes what the largest tile needs, which wastes nothing where
            tiles divide the grid. Carriers that want powers of two get them here.
    """

    tile: tuple[int, int, int]
    dilation: tuple[int, int, int] = (1, 1, 1)
    block: int | None = None

    def __post_init__(self) -> None:
        for name in ("tile", "dilation"):
            sizes = getattr(self, name)
            if len(sizes) != 3 or min(sizes) < 1:
                raise ValueError(
                    f"{name}={sizes}: give (frames, height, width), each at least 1; "
                    "an image has 1 on the frames"
                )

    def lanes(self, grid: TokenGrid) -> int:
        """Places per tile, which is the block size."""
        volume = math.prod(
            min(tile, group_lengths(length, dilation)[0])
            for length, tile, dilation in zip(grid, self.tile, self.dilation)
        )
        if self.block is not None and self.block < volume:
            raise ValueError(
                f"block={self.block}: a tile of {'x'.join(map(str, self.tile))} holds {volume} "
                f"tokens of grid {grid}; use block={volume} or more, or a smaller tile"
            )
        return int(volume if self.block is None else self.block)

    def tiles(self, grid: TokenGrid) -> tuple[int, int, int]:
        """Number of tiles along each axis."""
        frames, height, width = (len(edges) - 1 for edges in self._edges(grid))
        return frames, height, width

    def places(self, grid: TokenGrid) -> int:
        """Places the video takes, padding included; the text begins behind them."""
        return math.prod(self.tiles(grid)) * self.lanes(grid)

    def coordinates(self, grid: TokenGrid) -> np.ndarray:
        """Unrolled (frame, row, column) at every place; int64 ``[3, places]``, -1 in padding."""
        lanes, edges = self.lanes(grid), self._edges(grid)
        tile, inside, count = [], [], []
        for length, cut in zip(grid, edges):
            place = np.arange(length)
            tile.append(np.searchsorted(cut, place, side="right") - 1)
            inside.append(place - cut[tile[-1]])
            count.append(np.diff(cut)[tile[-1]])
        _, rows, columns = self.tiles(grid)
        at_tile = _raster(np.ix_(*tile), rows, columns)
        lane = _raster(np.ix_(*inside), *np.ix_(*count)[1:])
        coordinates = np.full((3, self.places(grid)), -1)
        coordinates[:, (at_tile * lanes + lane).ravel()] = np.indices(grid).reshape(3, -1)
        return coordinates

    def permutation(self, grid: TokenGrid) -> np.ndarray:
        """Raster index of the token at every place, -1 in padding; int64 ``[places]``."""
        coordinates = self.coordinates(grid)
        axes = [unroll(length, dilation) for length, dilation in zip(grid, self.dilation)]
        position = tuple(axis[at] for axis, at in zip(axes, coordinates))
        return np.where(coordinates[0] < 0, -1, _raster(position, grid.height, grid.width))

    def reorder(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Put the tokens into tiles.

        Args:
            x: ``[batch, tokens, heads, head_dim]`` in the model's order.
            layout: Where video and text stand in ``x``.

        Returns:
            ``[batch, places + text, heads, head_dim]``; a view of ``[batch, heads, tokens,
            head_dim]`` memory, which is what the carriers read fastest.
        """
        index = _indices(self, layout.grid, layout.text_before, layout.text_after, x.device)[0]
        self._check(x, layout, layout.tokens)
        return torch.index_select(x.transpose(1, 2), 2, index).transpose(1, 2)

    def restore(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Undo `reorder`: back to the model's order, contiguous ``[batch, tokens, heads, dim]``."""
        index, inverse = _indices(
            self, layout.grid, layout.text_before, layout.text_after, x.device
        )
        self._check(x, layout, len(index))
        return torch.index_select(x, 1, inverse)

    def _edges(self, grid: TokenGrid) -> list[np.ndarray]:
        for name, length, dilation in zip(("frames", "height", "width"), grid, self.dilation):
            if dilation > length:
                raise ValueError(
                    f"dilation={dilation} on {name} of length {length}: it cannot exceed the axis; "
                    f"the nearest legal one is {length}"
                )
        return [tile_edges(*axis) for axis in zip(grid, self.tile, self.dilation)]

    def _check(self, x: Tensor, layout: TokenLayout, tokens: int) -> None:
        if x.shape[1] != tokens:
            raise ValueError(
                f"tensor {tuple(x.shape)}: tiles {self.tile} of grid {layout.grid} with "
                f"{layout.text} text tokens need [batch, {tokens}, heads, head_dim]"
            )


def _raster(place: tuple[np.ndarray, ...], rows: int | np.ndarray, columns: int | np.ndarray):
    frame, row, column = place
    return (frame * rows + row) * columns + column


@lru_cache(maxsize=32)
def _indices(
    order: TileOrder, grid: TokenGrid, before: int, after: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which token stands at each ordered place, and at which place each token stands."""
    permutation, lanes = order.permutation(grid), order.lanes(grid)
    # Padding reads what the tile's first lane reads.
    video = np.where(permutation < 0, permutation[::lanes].repeat(lanes), permutation)
    text = np.r_[:before, before + grid.numel : before + grid.numel + after]
    index = np.concatenate([before + video, text])
    real = np.concatenate([permutation >= 0, np.ones(len(text), bool)])
    inverse = np.empty(before + grid.numel + after, np.int64)
    inverse[index[real]] = np.flatnonzero(real)
    # Cached: made under inference_mode, they could never serve a call that needs a gradient.
    with torch.inference_mode(False):
        return torch.from_numpy(index).to(device), torch.from_numpy(inverse).to(device)
