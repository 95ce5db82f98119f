"""Static selection: block masks calibrated once from real attention maps (PAROAttention).

The paper keeps the blocks whose post-softmax sum passes a threshold, and does not publish how the
threshold reaches a density. Ours: one threshold per layer, shared by its heads, so that heads with
spread-out attention get more blocks than heads with compact attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen_accel.kernels.mass import OrderStatistics


def keep_blocks(mass: Tensor, density: float, *, always: Tensor | None = None) -> Tensor:
    """The heaviest blocks of a layer, as many as the density allows.

    Args:
        mass: ``[heads, blocks, blocks]``, mean softmax mass per row of a query block.
        density: Share of all blocks to keep, counted over the heads together.
        always: bool, broadcastable to ``mass``, blocks kept whatever their mass; they count.

    Returns:
        bool, shape of ``mass``. Every query block keeps at least its heaviest key block.
    """
    heads, rows, cols = mass.shape
    # One block per row, or the row would have no softmax to run.
    keep = torch.zeros_like(mass, dtype=torch.bool).scatter_(
        -1, mass.argmax(-1, keepdim=True), True
    )
    if always is not None:
        keep |= always
    budget = round(density * heads * rows * cols) - int(keep.sum())
    if budget > 0:
        rest = mass.masked_fill(keep, -1.0).flatten()
        heaviest = rest.topk(min(budget, rest.numel()), sorted=False).indices
        keep.view(-1)[heaviest] = True
    return keep


def mass_kept(mass: Tensor, keep: Tensor) -> Tensor:
    """Share of the reported mass that the kept blocks hold, per head; ``[heads]`` in 0..1."""
    total = mass.sum((-2, -1)).clamp_min(torch.finfo(mass.dtype).tiny)
    return (mass * keep).sum((-2, -1)) / total


def score_by_mass(stats: OrderStatistics, density: float) -> Tensor:
    """The direct criterion: softmax mass held by the heaviest ``density`` share of the blocks.

    Returns:
        ``[heads, orders]``, higher is better.
    """
    mass = stats.mass.flatten(2)
    count = max(1, round(density * mass.shape[-1]))
    total = mass.sum(-1).clamp_min(torch.finfo(mass.dtype).tiny)
    return mass.topk(count, dim=-1).values.sum(-1) / total


def score_by_paper(
    stats: OrderStatistics, *, sigma: float = 0.9, alpha: float = 0.5, as_printed: bool = False
) -> Tensor:
    """PAROAttention's criterion (equations 1-3), with two corrections of ours.

    A block counts as sparse when at least ``sigma`` of its entries are below eps; its incoherence
    is max / mean. Both are divided by their sum over the orders and mixed by ``alpha``, which the
    paper does not report. As printed, the order with *fewer* sparse blocks would win; we take
    ``1 - sparse`` unless ``as_printed``. The paper's eps of 1e-3 is scaled with 1/N (`paper_eps`),
    or it would saturate on long sequences.

    Returns:
        ``[heads, orders]``, higher is better.
    """
    if stats.below is None or stats.peak is None:
        raise ValueError(
            "eps=None: the paper's score needs order_statistics(..., eps=paper_eps(N))"
        )
    sparse = (stats.below >= sigma).float().mean((-2, -1))
    mean = (stats.mass / stats.block).clamp_min(1e-30)
    incoherence = (stats.peak / mean).mean((-2, -1))
    share = sparse if as_printed else 1 - sparse
    cost = alpha * _normalised(share) + (1 - alpha) * _normalised(incoherence)
    return -cost


def paper_eps(tokens: int) -> float:
    """Threshold of an empty entry: the paper's 1e-3 at its 17,776 tokens, scaled with 1/N."""
    return 18.0 / tokens


def _normalised(score: Tensor) -> Tensor:
    return score / score.sum(-1, keepdim=True).clamp_min(1e-30)
