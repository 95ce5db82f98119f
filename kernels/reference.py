"""Block-sparse attention, written down: the definition every carrier is tested against."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.carrier import Call
from gen_accel.kernels.quant import (
    P_LEVELS,
    P_TILE,
    Precision,
    quantise,
    round_weights,
    score_shift,
    shift_stand_ins,
)
from gen_accel.kernels.tail import Pooled, Rectified, Tail, merge

_ROWS = 128  # queries at a time when there are no blocks to say it
_SMALLEST = torch.finfo(torch.float32).tiny


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks | None,
    scale: float,
    tail: Tail | None = None,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T over the visible keys) v, and what the tail adds to it.

    Computed in fp32, or fp64 for fp64 inputs, one query block at a time, so that N x N elements
    never exist together. Differentiable, unless quantised.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Skv, H, D]``.
        v: ``[B, Skv, H, D]``.
        blocks: Visible blocks, or None for all.
        scale: Factor of the scores.
        tail: What stands in for the hidden blocks, see `gen_accel.kernels.tail`.
        precision: Quantise, see `gen_accel.kernels.quant`; None: do not. Stand-ins are scored with
            the queries that the codes stand for, and their values are not rounded.

    Returns:
        out ``[B, Sq, H, D]`` in q's dtype, and the natural log-sum-exp of the scaled scores, fp32
        ``[B, H, Sq]``. A query without a visible key has out = 0 and lse = -inf.
    """
    exact = _Exact if precision is None else functools.partial(_Integers, precision=precision)
    product = exact(q, k, v, scale, tile=P_TILE if blocks is None else blocks.block_kv)
    visible = None if blocks is None else _Visible(blocks, q.shape[0], q.shape[2])
    rows = _ROWS if blocks is None else blocks.block_q
    pooled = tail if blocks is not None and isinstance(tail, Pooled) else None
    if pooled is not None:
        stand_in_values = pooled.value.transpose(1, 2).to(product.dtype)
    outs, lses = [], []
    for start in range(0, q.shape[1], rows):
        queries = torch.arange(start, min(start + rows, q.shape[1]), device=q.device)
        scores = product.scores(queries)
        if visible is not None:
            scores = scores.masked_fill(~visible(queries), -torch.inf)
        part, lse = product.weigh(scores)
        if visible is not None and pooled is not None:
            more = _stand_ins(product.q[:, :, queries], product.shifted(pooled), scale)
            more = more.masked_fill(visible.listed(queries, pooled), -torch.inf)
            part, lse = merge(part, lse, *_softmax(more, stand_in_values))
        if blocks is not None and isinstance(tail, Rectified):
            row = start // rows
            part = tail.ratio[:, :, row, None, None] * part + tail.shift[:, :, row, None]
        outs.append(part)
        lses.append(lse)
    out = torch.cat(outs, 2).transpose(1, 2).to(q.dtype).contiguous()
    return out, (torch.cat(lses, 2) + product.shift).float()


class _Exact:
    """Both products in one float dtype."""

    shift: Tensor | float = 0.0

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, tile: int) -> None:
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = (x.transpose(1, 2).to(self.dtype) for x in (q, k, v))
        self.scale = scale

    def scores(self, queries: Tensor) -> Tensor:
        """``[B, H, queries, Skv]``."""
        return self.scale * self.q[:, :, queries] @ self.k.mT

    def weigh(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Output ``[B, H, queries, D]`` and log-sum-exp ``[B, H, queries]``."""
        return _softmax(scores, self.v)

    def shifted(self, pooled: Pooled) -> Pooled:
        """Stand-ins whose scores compare with those of the keys."""
        return pooled


class _Integers:
    """Products of the codes of `quant`; in fp32 they are the integers."""

    dtype = torch.float32

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, tile: int, precision: Precision
    ) -> None:
        self.precision, self.scale = precision, scale
        self.codes = quantise(q, k, v, precision)
        self.shift = score_shift(q, self.codes.k_mean, scale)
        self.q = self.codes.queries().transpose(1, 2)
        self.k = self.codes.k.codes.transpose(1, 2).float()
        self.smooth_k = k.transpose(1, 2).float()
        if self.codes.k_mean is not None:
            self.smooth_k = self.smooth_k - self.codes.k_mean
        values = self.codes.v
        # Keys of a tile share the scale of their values, too.
        self.tile = min(P_TILE, tile, P_TILE if values is None else values.rows)
        self.v = (v if values is None else values.codes).transpose(1, 2).float()

    def scores(self, queries: Tensor) -> Tensor:
        q, k = self.codes.q, self.codes.k
        row, key = queries // q.rows, torch.arange(self.k.shape[2], device=queries.device) // k.rows
        integers = q.codes[:, queries].transpose(1, 2).float() @ self.k.mT
        scores = integers * (self.scale * q.scale[:, :, row, None] * k.scale[:, :, None, key])
        if self.codes.q_mean is None:
            return scores
        return scores + self.scale * self.codes.q_mean[:, :, row] @ self.smooth_k.mT

    def weigh(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        kind, values = self.precision.pv, self.codes.v
        if kind is None or values is None:
            return _softmax(scores, self.v)
        keys = scores.shape[-1]
        tiles = F.pad(scores, (0, -keys % self.tile), value=-torch.inf)
        tiles = tiles.unflatten(-1, (-1, self.tile))
        top = self._top(tiles)  # what the weights of a tile are relative to
        codes = round_weights(torch.exp(tiles - _finite(top)[..., None]), kind)
        peak = _finite(top.amax(-1, keepdim=True))
        share = torch.exp(top - peak) / P_LEVELS[kind]
        v = F.pad(self.v, (0, 0, 0, -keys % self.tile)).unflatten(2, (-1, self.tile))
        group = torch.arange(v.shape[2], device=v.device) * self.tile // values.rows
        products = torch.einsum("bhqtk,bhtkd->bhqtd", codes, v) * values.scale[:, :, None, group]
        total = (codes.sum(-1) * share).sum(-1)
        out = (products * share[..., None]).sum(3) / total.clamp_min(_SMALLEST)[..., None]
        return out, total.log() + peak[..., 0]

    def _top(self, tiles: Tensor) -> Tensor:
        """``[B, H, queries, tiles]``."""
        top = tiles.amax(-1)
        if self.precision.p_scale == "row":
            return top.amax(-1, keepdim=True).expand_as(top)
        if self.precision.p_scale == "block":
            lse = _finite(tiles.flatten(-2).logsumexp(-1, keepdim=True))
            weights = top - lse  # logarithms
            groups = F.pad(weights, (0, 0, 0, -weights.shape[2] % 64), value=-torch.inf)
            highest = groups.unflatten(2, (-1, 64)).amax(3).repeat_interleave(64, 2)
            return highest[:, :, : top.shape[2]] + lse
        return top

    def shifted(self, pooled: Pooled) -> Pooled:
        return shift_stand_ins(pooled, self.codes.k_mean)


def _softmax(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - _finite(lse)[..., None]) @ values, lse


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(x == -torch.inf, 0)


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
    out, lse = attention(q, k, v, call.blocks, call.scale, call.tail, call.precision)
    return out.to(call.q.dtype), lse if call.return_lse else None
