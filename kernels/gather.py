"""The portable carrier: gather the kept key blocks, then batched matrix products.

Query blocks ("rows") that keep equally many blocks form one batch, whatever their head, so nothing
is padded; rows of a head that keep the same blocks share one gathered copy. Memory is that of the
inputs and a few megabytes per thread: a long list is walked in spans, with FlashAttention's running
maximum and sum.

Half precision on a CPU is computed in fp32 unless the machine multiplies it clearly faster (AMX,
AVX512-BF16): that is measured once, and ``precision=`` overrules it.

Quantised calls are emulated: the same numbers as `gen_accel.kernels.quant` defines, multiplied in
fp32, which takes longer than not quantising.
"""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.carrier import Call
from gen_accel.kernels.quant import (
    P_LEVELS,
    P_TILE,
    dequantise,
    round_weights,
    shift_stand_ins,
)
from gen_accel.kernels.tail import Pooled, Rectified, apply_tail

_HALF = (torch.bfloat16, torch.float16)
_NUMBERS_PER_THREAD = 2**20  # scores, keys and values alive at a time, to stay near the L2 cache
_ROWS_PER_LIST = 16  # that share a gathered copy
_DENSE_BLOCK = 128
_LOG2_E = math.log2(math.e)
_NO_ROWS = np.empty(0, np.int64)
# exp(60) times a million keys is far from the fp32 limit, and exp(-60) far from its denormals.
_SAFE_SCORE = 60.0


def missing() -> str | None:
    """Nothing is needed beyond torch."""
    return None


def limits(call: Call) -> str | None:
    """Only dense calls have a gradient, and weights are rounded by tiles only."""
    if call.precision is not None and call.precision.p_scale != "tile":
        return f"p_scale={call.precision.p_scale!r}: use impl='reference'"
    if not _is_dense(call) and torch.is_grad_enabled() and any(x.requires_grad for x in call[:3]):
        return (
            "q, k or v require a gradient, which this carrier does not have: "
            "call it under torch.no_grad(), or use impl='reference'"
        )
    return None


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """See `carrier.Carrier.run`."""
    if call.precision is not None:
        return _emulate(call)
    rectified = isinstance(call.tail, Rectified)
    if call.blocks is not None and not rectified and _keeps_all(call.blocks):
        call = call._replace(blocks=None, tail=None)
    # precision="bf16" rounds the inputs also where fp32 is what then computes with them.
    q, k, v = (x.to(call.compute) if call.compute in _HALF else x for x in call[:3])
    dtype = _compute_dtype(call)
    if _is_dense(call):
        q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=call.scale)
        return out.transpose(1, 2).to(call.q.dtype), None
    out, lse = _attend(call._replace(q=q, k=k, v=v), dtype, q)
    return out.to(call.q.dtype), None if lse is None else lse.float()


def _emulate(call: Call) -> tuple[Tensor, Tensor | None]:
    """A quantised call, with what its codes stand for."""
    assert call.precision is not None
    plain = dequantise(*call[:3], call.scale, call.precision)
    tail = call.tail
    if isinstance(tail, Pooled):
        tail = shift_stand_ins(tail, plain.k_mean)
    changed = call._replace(q=plain.q, k=plain.k, v=plain.v, tail=tail)
    out, lse = _attend(changed, torch.float32, plain.queries, call.precision.pv)
    return out.to(call.q.dtype), None if lse is None else lse + plain.shift


def _attend(
    call: Call, dtype: torch.dtype, queries: Tensor, rounding: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """The call block by block.

    Args:
        call: The call.
        dtype: To compute in.
        queries: What stand-ins are scored with, ``[B, Sq, H, D]``.
        rounding: Codes of the weights, see `round_weights`.
    """
    blocks = _every_block(call) if call.blocks is None else call.blocks
    batch, tokens, heads, _ = call.q.shape
    q = _tile(call.q, blocks.block_q, dtype)
    k, v = (_tile(x, blocks.block_kv, dtype) for x in (call.k, call.v))
    groups = list(_groups(blocks, batch, heads, _safe_heads(q, k, batch * heads, call.scale)))
    rows = np.concatenate([_NO_ROWS, *(group.rows.ravel() for group in groups)])
    # With the rows in the order in which they are computed, those of a chunk are a slice.
    order = torch.from_numpy(rows).to(q.device)
    problem = _Problem(q.index_select(0, order), k, v, blocks, call.scale, heads, rounding)
    problem.solve(groups)
    out = q.new_zeros(*q.shape[:2], v.shape[2]).index_copy_(0, order, problem.out)
    out = out.view(batch, heads, -1, v.shape[2])[:, :, :tokens]
    lse = None
    if call.return_lse or isinstance(call.tail, Pooled):
        lse = q.new_full(q.shape[:2], -torch.inf).index_copy_(0, order, problem.lse)
        lse = lse.view(batch, heads, -1)[..., :tokens]
    if call.tail is not None and call.blocks is not None:
        out, lse = apply_tail(out, lse, queries.transpose(1, 2), call.tail, blocks, call.scale)
    if lse is not None:
        lse = lse.contiguous()
    return out.transpose(1, 2), lse if call.return_lse else None


def _is_dense(call: Call) -> bool:
    return call.blocks is None and not call.return_lse


def _keeps_all(blocks: Blocks) -> bool:
    return bool((blocks.full_kv_num_blocks == blocks.num_kv_blocks).all())


def _every_block(call: Call) -> Blocks:
    q_len, kv_len = call.q.shape[1], call.k.shape[1]
    shape = (1, 1, -(-q_len // _DENSE_BLOCK), -(-kv_len // _DENSE_BLOCK))
    full = torch.ones(shape, dtype=torch.bool, device=call.q.device)
    return Blocks.from_mask(full, q_len=q_len, kv_len=kv_len, block_size=_DENSE_BLOCK)


# ---- in which numbers ----------------------------------------------------------------------------


def _compute_dtype(call: Call) -> torch.dtype:
    dtype = call.compute or call.q.dtype
    if dtype not in _HALF:
        return dtype
    if (
        call.return_lse
        or isinstance(call.tail, Pooled)
        or (call.blocks is not None and call.blocks.mask_mod is not None)
    ):
        return torch.float32  # these need the scores themselves, which half precision would spoil
    if call.compute is None and call.q.device.type == "cpu" and not _half_pays(dtype):
        return torch.float32
    return dtype


@functools.cache
def _half_pays(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies ``dtype`` at least 1.25 times as fast as fp32."""

    def seconds(dtype: torch.dtype) -> float:
        shapes = (4, 128, 64), (4, 64, 1024)
        a, b = (torch.ones(shape, dtype=dtype, device="cpu") for shape in shapes)
        times = []
        for _ in range(9):
            start = time.perf_counter()
            torch.bmm(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(dtype) * 1.25 <= seconds(torch.float32)


# ---- which rows together -------------------------------------------------------------------------


class _Group(NamedTuple):
    """Lists of one length. Rows count over batch x heads x query blocks, columns likewise.

    Attributes:
        rows: ``[lists, shared]``, the rows that have the list.
        columns: ``[lists, length]``, the key blocks of the list, partial ones first.
        partial: How many of the columns are partial.
        ragged: Whether the last column is full and yet the sequence ends inside it.
        safe: Whether no score can overflow, see `_safe_heads`.
    """

    rows: np.ndarray
    columns: np.ndarray
    partial: int
    ragged: bool
    safe: bool


def _groups(blocks: Blocks, batch: int, heads: int, safe: list[bool]) -> Iterator[_Group]:
    num_q, num_kv = blocks.num_q_blocks, blocks.num_kv_blocks
    cut = num_kv - 1 if blocks.kv_len % blocks.block_kv else -1
    full, full_counts = _rows(blocks.full_kv_indices, blocks.full_kv_num_blocks, batch, heads)
    partial, partial_counts = full[:, :0], [0] * len(full)
    if blocks.kv_indices is not None and blocks.kv_num_blocks is not None:
        partial, partial_counts = _rows(blocks.kv_indices, blocks.kv_num_blocks, batch, heads)

    rows_of: dict[tuple, list[int]] = defaultdict(list)
    for row, (n, m) in enumerate(zip(partial_counts, full_counts)):
        if n + m:
            lists = partial[row, :n].tobytes(), full[row, :m].tobytes()
            rows_of[row // num_q, n, m, lists].append(row)

    alike: dict[tuple, list[list[int]]] = defaultdict(list)
    for (head, n, m, _), rows in rows_of.items():
        ragged = m > 0 and full[rows[0], m - 1] == cut
        for i in range(0, len(rows), _ROWS_PER_LIST):
            shared = rows[i : i + _ROWS_PER_LIST]
            alike[len(shared), n, m, ragged, safe[head]].append(shared)

    for (_, n, m, ragged, is_safe), entries in alike.items():
        found = np.array(entries, np.int64)
        first = found[:, 0]
        columns = np.concatenate((partial[first, :n], full[first, :m]), axis=1)
        yield _Group(found, columns + first[:, None] // num_q * num_kv, n, ragged, is_safe)


def _rows(lists: Tensor, counts: Tensor, batch: int, heads: int) -> tuple[np.ndarray, list[int]]:
    """Lists ``[rows, width]`` and counts of all rows."""
    padded = lists.expand(batch, heads, -1, -1).flatten(0, 2).cpu().numpy()
    return padded, counts.expand(batch, heads, -1).flatten().tolist()


# ---- the arithmetic ------------------------------------------------------------------------------


def _safe_heads(q: Tensor, k: Tensor, heads: int, scale: float) -> list[bool]:
    """Per head: |score| <= |q| |k| is so small that the softmax needs no maximum."""
    q_norm, k_norm = (torch.linalg.vector_norm(x, dim=-1).view(heads, -1).amax(1) for x in (q, k))
    return (abs(scale) * q_norm * k_norm < _SAFE_SCORE).tolist()


class _Problem:
    """Tiles ``[rows or columns, tokens, head_dim]`` and what is computed from them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Blocks,
        scale: float,
        heads: int,
        rounding: str | None,
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.blocks, self.scale, self.heads, self.rounding = blocks, scale, heads, rounding
        self.out = q.new_empty(*q.shape[:2], v.shape[2])
        self.lse = q.new_empty(q.shape[:2])

    def solve(self, groups: list[_Group]) -> None:
        """Fill in ``out`` and ``lse``; the rows of the groups are those of ``q``, in turn."""
        attend = self._fused if self.q.dtype in _HALF else self._matmul
        if self.rounding is not None:
            attend = self._rounded
        start = 0
        for group in groups:
            for rows, columns in self._chunks(group):
                stop = start + rows.numel()
                q, out = (x[start:stop].view(len(rows), -1, x.shape[2]) for x in (self.q, self.out))
                attend(q, rows, columns, group, out, self.lse[start:stop].view(out.shape[:2]))
                start = stop

    def _chunks(self, group: _Group) -> Iterator[tuple[Tensor, Tensor]]:
        """As many lists at a time as the budget takes, the same number for every thread."""
        lists, length = group.columns.shape
        threads = torch.get_num_threads()
        size = threads * max(1, self._columns_per_thread(group) // length)
        even = lists // threads * threads
        rows, columns = (torch.from_numpy(x).to(self.q.device) for x in group[:2])
        for start in range(0, even, size):
            stop = min(start + size, even)
            yield rows[start:stop], columns[start:stop]
        if even < lists:
            yield rows[even:], columns[even:]

    def _columns_per_thread(self, group: _Group) -> int:
        queries = group.rows.shape[1] * self.blocks.block_q
        return _NUMBERS_PER_THREAD // (self.blocks.block_kv * (queries + 2 * self.q.shape[2]))

    def _fused(
        self, q: Tensor, rows: Tensor, columns: Tensor, group: _Group, out: Tensor, lse: Tensor
    ) -> None:
        """Half precision: the scores must not be rounded to it, and fused attention does not."""
        q, k, v = (x[:, None] for x in (q, *self._gather(columns, group.ragged)))
        out.copy_(F.scaled_dot_product_attention(q, k, v, scale=self.scale)[:, 0])

    def _matmul(
        self, q: Tensor, rows: Tensor, columns: Tensor, group: _Group, out: Tensor, lse: Tensor
    ) -> None:
        # torch's exp is MKL's: faster than exp2, but 50 times slower where the result underflows.
        base_e = group.safe and not group.partial
        scale = self.scale if base_e else self.scale * _LOG2_E
        total = peak = None
        for s, v in self._spans(q, rows, columns, group, scale):
            if not group.safe:
                highest = s.amax(-1, keepdim=True).clamp_min_(torch.finfo(s.dtype).min)
                if peak is not None and total is not None:
                    highest = torch.maximum(peak, highest)
                    fade = torch.exp2(peak - highest)
                    out.mul_(fade)
                    total.mul_(fade)
                s.sub_(highest)
                peak = highest
            summed = (s.exp_() if base_e else s.exp2_()).sum(-1, keepdim=True)
            torch.baddbmm(out, s, v, beta=int(total is not None), out=out)
            total = summed if total is None else total.add_(summed)
        assert total is not None
        torch.log2(total[..., 0], out=lse)
        if peak is not None:
            lse.add_(peak[..., 0])
        lse.div_(_LOG2_E)
        # Rows of partial blocks can be empty; their 0 / 0 is 0.
        out.div_(total.clamp_min_(torch.finfo(q.dtype).tiny))

    def _rounded(
        self, q: Tensor, rows: Tensor, columns: Tensor, group: _Group, out: Tensor, lse: Tensor
    ) -> None:
        """Weights relative to the maximum of each tile, so visiting order has no say in them."""
        kind, tile = self.rounding, min(P_TILE, self.blocks.block_kv)
        assert kind is not None
        total = q.new_zeros(*q.shape[:2], 1)
        peak = torch.full_like(total, torch.finfo(q.dtype).min)
        out.zero_()
        for s, v in self._spans(q, rows, columns, group, self.scale):
            keys = s.shape[2]
            tiles = F.pad(s, (0, -keys % tile), value=-torch.inf).unflatten(2, (-1, tile))
            top = tiles.amax(-1, keepdim=True)
            tiles = torch.exp(tiles - top.masked_fill(top == -torch.inf, 0))
            highest = torch.maximum(peak, top.amax(2))
            fade = torch.exp(peak - highest)
            share = torch.exp(top - highest[..., None]) / P_LEVELS[kind]
            weights = (round_weights(tiles, kind) * share).flatten(2)[..., :keys]
            total = total.mul_(fade).add_(weights.sum(-1, keepdim=True))
            torch.baddbmm(out.mul_(fade), weights, v, out=out)
            peak = highest
        lse.copy_((total.log() + peak)[..., 0])
        out.div_(total.clamp_min_(torch.finfo(q.dtype).tiny))

    def _spans(
        self, q: Tensor, rows: Tensor, columns: Tensor, group: _Group, scale: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores ``[lists, queries, keys]`` and values of as many blocks as the budget takes."""
        lists, length = columns.shape
        span = max(1, self._columns_per_thread(group) * torch.get_num_threads() // lists)
        for start in range(0, length, span):
            stop = min(start + span, length)
            k, v = self._gather(columns[:, start:stop], group.ragged and stop == length)
            s = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scale)
            if start < group.partial:
                hidden = self._hidden(rows, columns[:, start : min(stop, group.partial)])
                s[..., : hidden.shape[2]].masked_fill_(hidden, -torch.inf)
            yield s, v

    def _gather(self, columns: Tensor, ragged: bool) -> tuple[Tensor, Tensor]:
        """Keys and values ``[lists, tokens, head_dim]`` of the columns."""
        index, lists = columns.flatten(), len(columns)
        k, v = (x.index_select(0, index).view(lists, -1, x.shape[2]) for x in (self.k, self.v))
        if ragged:
            padding = -self.blocks.kv_len % self.blocks.block_kv
            k, v = k[:, :-padding], v[:, :-padding]
        return k, v

    def _hidden(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Elements ``[lists, queries, keys]`` of partial blocks that the rule hides."""
        blocks = self.blocks
        assert blocks.mask_mod is not None
        head = rows[:, :1, None] // blocks.num_q_blocks
        query = _tokens(rows % blocks.num_q_blocks, blocks.block_q)[:, :, None]
        key = _tokens(columns % blocks.num_kv_blocks, blocks.block_kv)[:, None]
        visible = blocks.mask_mod(
            head // self.heads,
            head % self.heads,
            # Padding lies outside the tables that a rule may look into.
            query.clamp(max=blocks.q_len - 1),
            key.clamp(max=blocks.kv_len - 1),
        )
        return (~visible | (key >= blocks.kv_len)).expand(len(rows), -1, key.shape[2])


def _tile(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """``[B, S, H, D]`` -> ``[B * H * ceil(S / block), block, D]``, zero-padded."""
    batch, tokens, heads, dim = x.shape
    if padding := -tokens % block:
        tiles = x.new_zeros(batch, heads, tokens + padding, dim, dtype=dtype)
        tiles[:, :, :tokens] = x.transpose(1, 2)
    else:
        tiles = x.transpose(1, 2).contiguous().to(dtype)
    return tiles.view(-1, block, dim)


def _tokens(blocks: Tensor, size: int) -> Tensor:
    """Token indices ``[n, m * size]`` of the blocks ``[n, m]``."""
    return (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(1)
