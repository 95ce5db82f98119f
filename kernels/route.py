"""Routing: scores of block pairs to block lists, without a word to the host.

Shapes depend on arguments alone, never on what was found in a tensor, so a call neither waits for
the GPU nor breaks a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen_accel.kernels.fused import fused


def route(
    scores: Tensor,
    *,
    keep: int | None = None,
    beta: float | None = None,
    forced: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The key blocks that each query block sees: those with the highest scores, and forced ones.

    Args:
        scores: fp32 ``[B, H, nQ, nKV]``, higher is better. A block with -inf or NaN is never
            chosen.
        keep: How many blocks a row chooses; of equal scores the first ones.
        beta: A row chooses what lies above ``mean + beta * std`` of its finite scores. With
            ``keep`` as well, a row takes what either chooses.
        forced: bool, broadcasts to ``scores``: blocks that are seen in addition to those.

    Returns:
        ``full_kv_num_blocks`` and ``full_kv_indices`` of a `Blocks`: int32 ``[B, H, nQ]`` and int32
        ``[B, H, nQ, K]``, ascending and padded with zeros. K is ``keep`` where only that is given,
        otherwise nKV.

    Raises:
        ValueError: Nothing says what to choose, or an argument is out of range.
    """
    columns = scores.shape[-1]
    if scores.ndim != 4 or scores.dtype != torch.float32:
        raise ValueError(
            f"scores are {scores.dtype} {tuple(scores.shape)}: they must be float32 "
            "[B, H, nQ, nKV]; cast them"
        )
    if keep is None and beta is None and forced is None:
        raise ValueError("keep, beta and forced are None: one of them must choose the blocks")
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: it must be at least 1; None chooses none by rank")
    keep = min(keep or 0, columns)
    width = keep if beta is None and forced is None else columns
    if fused(scores):
        from gen_accel.kernels.triton import route as kernel

        if columns <= kernel.MAX_COLUMNS:
            return kernel.route(scores, keep, beta, forced, width)
    return to_lists(_choose(scores, keep, beta, forced), width)


def to_lists(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Counts int32 ``[..., rows]`` and ascending indices int32 ``[..., rows, width]`` of a mask.

    Args:
        mask: bool ``[..., rows, columns]``, at most ``width`` True per row.
        width: Length of the lists; what is left of it is zero.
    """
    if fused(mask):
        from gen_accel.kernels.triton import route as kernel

        if mask.shape[-1] <= kernel.MAX_COLUMNS:
            return kernel.to_lists(mask, width)
    place = mask.cumsum(-1, dtype=torch.int64)
    counts = place[..., -1].to(torch.int32)
    # What is not in the mask goes to an extra column that is cut off again.
    place = torch.where(mask, place - 1, width)
    column = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    lists = column.new_zeros(*mask.shape[:-1], width + 1)
    lists.scatter_(-1, place, column.expand(mask.shape))
    return counts, lists[..., :width].contiguous()


def _choose(scores: Tensor, keep: int, beta: float | None, forced: Tensor | None) -> Tensor:
    real = scores > -torch.inf  # False for NaN
    chosen = torch.zeros_like(real)
    if keep:
        # Stable, so that of equal scores the first comes first. topk promises no such thing.
        ranked = scores.where(real, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        chosen.scatter_(-1, ranked[..., :keep], True)
    if beta is not None:
        finite = real & (scores < torch.inf)
        count = finite.sum(-1, keepdim=True).clamp_min(1)
        mean = scores.where(finite, 0.0).sum(-1, keepdim=True) / count
        square = (scores - mean).square_().where(finite, 0.0)
        std = (square.sum(-1, keepdim=True) / count).sqrt_()
        chosen |= scores > mean + beta * std
    chosen &= real
    return chosen if forced is None else chosen | forced
