"""GNA's rule once more, query by query and as N x N masks: what the library is held against."""

from __future__ import annotations

from functools import cache

import numpy as np


def visible_keys(length, query, window, stride=1, dilation=1, causal=False, snap=1):
    """Positions that the query sees on one axis, in the words of the specification."""
    group = list(range(query % dilation, length, dilation))
    index = query // dilation
    stop = len(group) if causal else -(-len(group) // snap) * snap
    run = [i for i in range(stop) if i // stride == index // stride]
    if causal:
        seen = [i for i in range(run[0] + stride - window, index + 1) if i >= 0]
        if run[-1] == len(group) - 1:  # the last run may be short
            seen = [i for i in range(run[-1] - window + 1, index + 1) if i >= 0]
    else:
        middle = min(run[0] + stride // 2, run[-1])
        seen = list(range(middle - window // 2, middle - window // 2 + window))
        while seen[0] < 0:
            seen = [i + 1 for i in seen]
        while seen[-1] >= stop:
            seen = [i - 1 for i in seen]
    return [group[i] for i in seen if i < len(group)]


@cache
def axis_mask(length, window, stride=1, dilation=1, causal=False, snap=1):
    """bool ``[length, length]``; a window of -1 is the whole axis."""
    mask = np.zeros((length, length), bool)
    if window == -1 or (window == length and not causal):
        mask[:] = True
        return mask
    for query in range(length):
        mask[query, visible_keys(length, query, window, stride, dilation, causal, snap)] = True
    return mask


def grid_mask(window):
    """bool ``[N, N]`` of a `Window`, tokens in raster order."""
    places = np.indices(window.grid).reshape(len(window.grid), -1)
    mask = np.ones((places.shape[1],) * 2, bool)
    for a, place in enumerate(places):
        axis = axis_mask(
            window.grid[a], window.size[a], window.stride[a], window.dilation[a],
            window.causal[a], window.snap[a],
        )  # fmt: skip
        mask &= axis[place[:, None], place]
    return mask


def random_setting(rng, tokens, causal=0.3):
    """A legal (grid, size, stride, dilation, causal) of one to three axes, mostly ragged."""
    axes = int(rng.integers(1, 4))
    grid = []
    for left in range(axes, 0, -1):
        most = max(2, int((tokens / np.prod(grid, initial=1)) ** (1 / left) * 1.6))
        grid.append(int(rng.integers(1 if left > 1 else 2, most + 1)))
    columns = []
    for length in grid:
        if length == 1 or rng.random() < 0.1:
            columns.append((-1, 1, 1, False))
            continue
        dilation = int(rng.integers(1, length // 2 + 1)) if rng.random() < 0.4 else 1
        size = int(rng.integers(2, length // dilation + 1))
        columns.append((size, int(rng.integers(1, size + 1)), dilation, rng.random() < causal))
    return (tuple(grid), *(tuple(column) for column in zip(*columns)))
