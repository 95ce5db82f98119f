"""Which blocks touch in the video: masks that any token order needs, computed once per grid.

In raster order the blocks next to a block are its neighbours in the list; in a curve or tile order
they are somewhere else, and the first frame is spread over the whole sequence.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gen_accel.layout import TokenGrid


def block_neighbours(permutation: np.ndarray | Tensor, grid: TokenGrid, block: int) -> Tensor:
    """Pairs of blocks that contain cells which touch, diagonally too (26 neighbours).

    Args:
        permutation: Raster index of the token at every place, -1 in padding; ``[places]``, see
            ``CurveOrder.permutation``, ``TileOrder.permutation`` and `axis_permutation`.
        grid: Video tokens.
        block: Places per block; the last block may be short.

    Returns:
        Bool ``[blocks, blocks]`` on the CPU, symmetric, with a true diagonal (but for blocks of
        nothing but padding). Shared by all callers: do not write to it.

    Raises:
        ValueError: The permutation does not hold every cell of the grid once.
    """
    return _neighbours(_key(permutation), grid, block)


def frame_blocks(
    permutation: np.ndarray | Tensor, grid: TokenGrid, block: int, frame: int = 0
) -> Tensor:
    """Blocks that contain tokens of one frame.

    Args:
        permutation: As in `block_neighbours`.
        grid: Video tokens.
        block: Places per block.
        frame: Which frame; negative ones count from the end.

    Returns:
        Bool ``[blocks]`` on the CPU. Shared by all callers: do not write to it.

    Raises:
        ValueError: See `block_neighbours`; or there is no such frame.
    """
    if not -grid.frames <= frame < grid.frames:
        raise ValueError(f"frame={frame}: grid {grid} has frames 0..{grid.frames - 1}")
    return _frame(_key(permutation), grid, block, frame)


def _key(permutation: np.ndarray | Tensor) -> bytes:
    """A permutation as a key of a cache, for arrays are not hashable."""
    if isinstance(permutation, Tensor):
        permutation = permutation.cpu().numpy()
    return permutation.astype(np.int64, copy=False).tobytes()


@lru_cache(maxsize=32)
def _neighbours(key: bytes, grid: TokenGrid, block: int) -> Tensor:
    block_of, blocks = _block_of(key, grid, block)
    touch = np.zeros((blocks, blocks), bool)
    # Half of the directions: the others are the transpose.
    for step in itertools.product((0, 1), (-1, 0, 1), (-1, 0, 1)):
        here = tuple(slice(max(-s, 0), n - max(s, 0)) for s, n in zip(step, grid))
        there = tuple(slice(max(s, 0), n - max(-s, 0)) for s, n in zip(step, grid))
        touch[block_of[here], block_of[there]] = True
    return _shared(touch | touch.T)


@lru_cache(maxsize=32)
def _frame(key: bytes, grid: TokenGrid, block: int, frame: int) -> Tensor:
    block_of, blocks = _block_of(key, grid, block)
    touch = np.zeros(blocks, bool)
    touch[block_of[frame]] = True
    return _shared(touch)


def _block_of(key: bytes, grid: TokenGrid, block: int) -> tuple[np.ndarray, int]:
    """Block of each cell, ``[F, H, W]``, and the number of blocks."""
    if block < 1:
        raise ValueError(f"block={block}: a block has at least one place")
    permutation = np.frombuffer(key, np.int64)
    places = np.flatnonzero(permutation >= 0)
    cells = permutation[places]
    block_of = np.full(grid.numel, -1)
    if len(cells) == grid.numel and cells.max() < grid.numel:
        block_of[cells] = places // block
    if (block_of < 0).any():
        raise ValueError(
            f"permutation of {len(cells)} tokens: it has to hold each of the {grid.numel} cells of "
            f"grid {grid} once"
        )
    return block_of.reshape(grid), -(-len(permutation) // block)


def _shared(mask: np.ndarray) -> Tensor:
    # Cached: made under inference_mode, it could never serve a call that needs a gradient.
    with torch.inference_mode(False):
        return torch.from_numpy(mask)
