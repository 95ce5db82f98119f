"""Block-sparse attention, written down: the definition every carrier is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.carrier import Call
from gen_accel.kernels.tail import Pooled, Rectified, Tail

_ROWS = 128  # queries at a time when there are no blocks to say it


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None, scale: float, tail: Tail | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T over the visible keys) v, and what the tail adds to it.

    Computed in fp32, or fp64 for fp64 inputs, one query block at a time, so that N x N elements
    never exist together. Differentiable.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Skv, H, D]``.
        v: ``[B, Skv, H, D]``.
        blocks: Visible blocks, or None for all.
        scale: Factor of the scores.
        tail: What stands in for the hidden blocks, see `gen_accel.kernels.tail`.

    Returns:
        out ``[B, Sq, H, D]`` in q's dtype, and the natural log-sum-exp of the scaled scores, fp32
        ``[B, H, Sq]``. A query without a visible key has out = 0 and lse = -inf.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    qh, kh, vh = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    visible = None if blocks is None else _Visible(blocks, q.shape[0], q.shape[2])
    rows = _ROWS if blocks is None else blocks.block_q
    pooled = tail if blocks is not None and isinstance(tail, Pooled) else None
    if pooled is not None:
        vh = torch.cat([vh, pooled.value.transpose(1, 2).to(dtype)], 2)
    outs, lses = [], []
    for start in range(0, q.shape[1], rows):
        queries = torch.arange(start, min(start + rows, q.shape[1]), device=q.device)
        scores = scale * qh[:, :, queries] @ kh.transpose(-1, -2)
        if visible is not None:
            scores = scores.masked_fill(~visible(queries), -torch.inf)
            if pooled is not None:
                more = _stand_ins(qh[:, :, queries], pooled, scale)
                more = more.masked_fill(visible.listed(queries, pooled), -torch.inf)
                scores = torch.cat([scores, more], -1)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        part = weights @ vh
        if blocks is not None and isinstance(tail, Rectified):
            row = start // rows
            part = tail.ratio[:, :, row, None, None] * part + tail.shift[:, :, row, None]
        outs.append(part)
        lses.append(lse)
    out = torch.cat(outs, 2).transpose(1, 2).to(q.dtype).contiguous()
    return out, torch.cat(lses, 2).float()


def _stand_ins(q: Tensor, pooled: Pooled, scale: float) -> Tensor:
    """Scores ``[B, H, queries, stand-ins]``."""
    scores = scale * q @ pooled.key.to(q.dtype).permute(0, 2, 3, 1) + pooled.bias
    if pooled.variance is not None:
        variance = pooled.variance.to(q.dtype).permute(0, 2, 3, 1)
        scores = scores + scale**2 / 2 * q.square() @ variance
    return scores


class _Visible:
    """Element mask ``[B|1, H|1, queries, kv_len]`` of some queries of one block."""

    def __init__(self, blocks: Blocks, batch: int, heads: int) -> None:
        self.blocks = blocks
        self.full, self.partial = blocks.mask("full"), blocks.mask("partial")
        index = lambda n: torch.arange(n, device=blocks.device)  # noqa: E731
        self.b = index(batch)[:, None, None, None]
        self.h = index(heads)[:, None, None]
        # Keys at or beyond kv_len have no column, which is all that a ragged last block needs.
        self.key = index(blocks.kv_len)

    def __call__(self, queries: Tensor) -> Tensor:
        row, column = queries[:1] // self.blocks.block_q, self.key // self.blocks.block_kv
        visible = self.full[:, :, row][..., column]
        if self.blocks.mask_mod is None:
            return visible
        rule = self.blocks.mask_mod(self.b, self.h, queries[:, None], self.key)
        return visible | (self.partial[:, :, row][..., column] & rule)

    def listed(self, queries: Tensor, pooled: Pooled) -> Tensor:
        """``[B|1, H|1, 1, stand-ins]``: those whose key block is listed, which hides them."""
        block = torch.arange(pooled.bias.numel(), device=self.key.device) // pooled.per_block
        row = queries[:1] // self.blocks.block_q
        return (self.full | self.partial)[:, :, row][..., block]


def missing() -> str | None:
    """Nothing is needed beyond torch."""
    return None


def limits(call: Call) -> str | None:
    """It takes every call."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """`attention` on the inputs rounded to ``call.compute``."""
    q, k, v = (x if call.compute is None else x.to(call.compute) for x in call[:3])
    out, lse = attention(q, k, v, call.blocks, call.scale, call.tail)
    return out.to(call.q.dtype), lse if call.return_lse else None
