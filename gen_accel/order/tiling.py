"""One axis of a token grid, cut into tiles.

With dilation d an axis falls apart into d groups (position modulo d) that never see each other.
*Unrolled*, the groups stand one behind the other; there a dilated window is a plain interval, and
everything that follows forgets that there was a dilation.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

Axis = np.ndarray
"""One integer per place of an axis, or per tile of one; read-only."""


@lru_cache(maxsize=4096)
def group_lengths(length: int, dilation: int = 1) -> Axis:
    """Positions in each dilation group, ``[dilation]``."""
    return _fixed((length - np.arange(dilation) + dilation - 1) // dilation)


@lru_cache(maxsize=4096)
def unroll(length: int, dilation: int = 1) -> Axis:
    """``positions[u]``: which position of the axis stands at unrolled place ``u``; ``[length]``."""
    return _fixed(np.concatenate([np.arange(g, length, dilation) for g in range(dilation)]))


@lru_cache(maxsize=4096)
def tile_edges(length: int, tile: int, dilation: int = 1) -> Axis:
    """Unrolled places where a tile begins, and the end; ``[tiles + 1]``.

    Every group is cut from its own beginning; its last tile may be short.
    """
    lengths = group_lengths(length, dilation)
    begins = np.cumsum(lengths) - lengths
    cuts = [begin + np.arange(0, n, tile) for begin, n in zip(begins, lengths)]
    return _fixed(np.concatenate([*cuts, [length]]))


def _fixed(values: np.ndarray) -> Axis:
    # Shared through the caches, so nobody may write to them.
    values = values.astype(np.int64)
    values.flags.writeable = False
    return values
