"""Statistics of groups of neighbouring tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.kernels.fused import fused


class Groups(NamedTuple):
    """What `group_means` found.

    Attributes:
        mean: fp32 ``[B, G, H, D]`` (fp64 of fp64), 0 where no token counts.
        count: fp32 ``[G]``, tokens that count.
        deviation: Mean absolute deviations from the mean, same shape as ``mean``, or None.
        variance: Mean squared deviations, likewise.
    """

    mean: Tensor
    count: Tensor
    deviation: Tensor | None = None
    variance: Tensor | None = None


def group_means(
    x: Tensor,
    size: int,
    real: Tensor | None = None,
    *,
    deviation: bool = False,
    variance: bool = False,
) -> Groups:
    """Means over groups of ``size`` neighbouring tokens, the last group as short as it is.

    Args:
        x: ``[B, S, H, D]``.
        size: Tokens per group.
        real: bool ``[S]``, tokens that count; None: all.
        deviation: Also measure mean absolute deviations.
        variance: Also measure variances.
    """
    if fused(x) and x.numel():
        from gen_accel.kernels.triton.pool import pool

        mean, count, spread, square = pool(x, size, real, deviation, variance)
        return Groups(mean, count, spread if deviation else None, square if variance else None)
    tokens = x.shape[1]
    groups = -(-tokens // size)
    padding = groups * size - tokens
    weight = x.new_ones(tokens, dtype=torch.float32) if real is None else real.float()
    # One fp32 copy; fp64 keeps its digits.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if padding:
        x, weight = F.pad(x, (0, 0, 0, 0, 0, padding)), F.pad(weight, (0, padding))
    x, weight = x.unflatten(1, (groups, size)), weight.view(groups, size)
    count = weight.sum(1)
    share = (weight / count.clamp_min(1)[:, None])[None, :, :, None, None].to(x.dtype)
    even = real is None and not padding

    def mean_of(values: Tensor) -> Tensor:
        return values.mean(2) if even else (values * share).sum(2)

    mean = mean_of(x)
    if not deviation and not variance:
        return Groups(mean, count)
    away = x - mean[:, :, None]
    square = mean_of(away.square()) if variance else None
    return Groups(mean, count, mean_of(away.abs_()) if deviation else None, square)
