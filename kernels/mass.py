"""Where the attention mass lies: post-softmax statistics per block, never an N x N matrix.

Rows are taken in chunks; a chunk's probabilities are reduced to blocks and thrown away, so memory
is ``chunk x keys``. Rows may be subsampled: the mass of a query block is a mean over its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gen_accel.kernels.fused import fused

_CHUNK_ELEMENTS = 1 << 24  # probabilities held at a time: 64 MiB in fp32


def sample_rows(blocks: int, block: int, per_block: int | None, device: torch.device) -> Tensor:
    """Row indices, equally many from each block, evenly spread; int64 ``[blocks * per_block]``."""
    count = block if per_block is None else min(per_block, block)
    inside = (torch.arange(count, device=device) * block) // count
    return (torch.arange(blocks, device=device)[:, None] * block + inside).flatten()


def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    block: int,
    blocks: int,
    rows_per_block: int | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Share of the softmax mass that each block of queries puts on each block of keys.

    Args:
        q: ``[batch, queries, heads, head_dim]``; its first ``blocks * block`` rows are measured.
        k: ``[batch, keys, heads, head_dim]``; every key is in the softmax, the first
            ``blocks * block`` are reported.
        block: Tokens per block.
        blocks: Number of whole blocks to report.
        rows_per_block: Rows sampled from each query block; None takes all of them.
        scale: Softmax scale, default ``head_dim ** -0.5``.
        lse: fp32 ``[batch, heads, queries]``, natural log-sum-exp of the scaled scores, where a
            dense call has given it; None computes it, which costs as much again.

    Returns:
        fp32 ``[heads, blocks, blocks]``, mean over batch and rows. A row sums to 1 minus the mass
        on keys that are not reported (text, the ragged tail).
    """
    batch, _, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    if fused(q, k):
        from gen_accel.kernels.triton import mass as kernel

        if kernel.takes(q, block):
            sampled = min(rows_per_block or block, block)
            return kernel.block_mass(q, k, lse, block, blocks, sampled, scale)
    rows = sample_rows(blocks, block, rows_per_block, q.device)
    per_block = rows.numel() // max(blocks, 1)
    mass = q.new_zeros(heads, blocks, blocks, dtype=torch.float32)
    # Whole query blocks per chunk, so that a chunk reduces by a reshape.
    step = max(1, _CHUNK_ELEMENTS // max(1, k.shape[1] * per_block)) * per_block
    for sample in range(batch):
        for head in range(heads):
            keys = k[sample, :, head].float().T
            for start in range(0, rows.numel(), step):
                chunk = rows[start : start + step]
                logits = (q[sample, chunk, head].float() * scale) @ keys
                if lse is None:
                    p = logits.softmax(-1)
                else:
                    p = torch.exp(logits - lse[sample, head, chunk, None])
                p = p[:, : blocks * block]
                tiles = p.view(-1, per_block, blocks, block).sum(-1).mean(1)
                first = start // per_block
                mass[head, first : first + tiles.shape[0]] += tiles
    return mass / batch


@dataclass(frozen=True)
class OrderStatistics:
    """Block statistics of one attention map under several token orders.

    Attributes:
        mass: fp32 ``[heads, orders, blocks, blocks]``, mean softmax mass per row.
        block: Tokens per block.
        below: fp32, same shape, share of the block's entries below ``eps``, or None.
        peak: fp32, same shape, largest entry of the block, or None.
    """

    mass: Tensor
    block: int
    below: Tensor | None = None
    peak: Tensor | None = None


def order_statistics(
    q: Tensor,
    k: Tensor,
    permutations: Tensor,
    *,
    block: int,
    rows: Tensor,
    eps: float | None = None,
    scale: float | None = None,
) -> OrderStatistics:
    """Compare token orders on the same sampled rows: one softmax, one reduction per order.

    Args:
        q: ``[batch, queries, heads, head_dim]``, video first, in raster order.
        k: ``[batch, keys, heads, head_dim]``, video first, in raster order.
        permutations: int64 ``[orders, video]``, raster index of the token at each place.
        block: Tokens per block; only whole blocks are counted.
        rows: int64, raster indices of the rows to look at.
        eps: Also report ``below`` and ``peak``, which cost several times the mass.
        scale: Softmax scale, default ``head_dim ** -0.5``.
    """
    batch, _, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    orders, video = permutations.shape
    blocks = video // block
    whole = permutations[:, : blocks * block]
    # The query block each raster token falls into; the extra one gathers the ragged tail.
    homes = torch.empty_like(permutations)
    place = torch.arange(video, device=q.device)
    homes.scatter_(1, permutations, (place // block).expand(orders, -1))

    shape = (heads, orders, blocks + 1, blocks)
    mass = q.new_zeros(shape, dtype=torch.float32)
    below, peak = (q.new_zeros(shape if eps else 0, dtype=torch.float32) for _ in range(2))
    step = max(1, _CHUNK_ELEMENTS // k.shape[1])
    for start in range(0, rows.numel(), step):
        chunk = rows[start : start + step]
        for sample in range(batch):
            for head in range(heads):
                keys = k[sample, :, head].float().T
                p = ((q[sample, chunk, head].float() * scale) @ keys).softmax(-1)
                for order in range(orders):
                    home = homes[order, chunk]
                    # index_select is several times as fast as indexing with brackets.
                    tiles = p.index_select(1, whole[order]).view(-1, blocks, block)
                    mass[head, order].index_add_(0, home, tiles.sum(-1))
                    if eps is None:
                        continue
                    below[head, order].index_add_(0, home, (tiles < eps).float().mean(-1))
                    peak[head, order].scatter_reduce_(
                        0, home[:, None].expand(-1, blocks), tiles.amax(-1), "amax"
                    )
    seen = torch.stack([home.bincount(minlength=blocks + 1) for home in homes[:, rows]])
    count = (seen * batch).clamp_(min=1)[None, :, :blocks, None]
    mean = mass[:, :, :blocks] / count
    if eps is None:
        return OrderStatistics(mean, block)
    return OrderStatistics(mean, block, below[:, :, :blocks] / count, peak[:, :, :blocks])
