"""The portable carrier: gather the kept key blocks, then batched matrix products.

Query blocks ("rows") that keep equally many blocks form one batch, whatever their head, so nothing
is padded; rows of a head that keep the same blocks share one gathered copy. Memory is that of the
inputs and a few megabytes per thread: a long list is walked in spans, with FlashAttention's running
maximum and sum.

Half precision on a CPU is computed in fp32 unless the machine multiplies it clearly faster (AMX,
AVX512-BF16): that is measured once, and ``precision=`` overrules it.
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

_HALF = (torch.bfloat16, torch.float16)
_NUMBERS_PER_THREAD = 2**20  # scores, keys and values alive at a time, to stay near the L2 cache
_ROWS_PER_LIST = 16  # that share a gathered copy
_DENSE_BLOCK = 128
# exp(60) times a million keys is far from the fp32 limit, and exp(-60) far from its denormals.
_SAFE_SCORE = 60.0


def missing() -> str | None:
    """Nothing is needed beyond torch."""
    return None


def limits(call: Call) -> str | None:
    """Only dense calls have a gradient."""
    if not _is_dense(call) and torch.is_grad_enabled() and any(x.requires_grad for x in call[:3]):
        return (
            "q, k or v require a gradient, which this carrier does not have: "
            "call it under torch.no_grad(), or use impl='reference'"
        )
    return None


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """See `carrier.Carrier.run`."""
    # precision="bf16" rounds the inputs also where fp32 is what then computes with them.
    q, k, v = (x.to(call.compute) if call.compute in _HALF else x for x in call[:3])
    dtype = _compute_dtype(call)
    if _is_dense(call):
        q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=call.scale)
        return out.transpose(1, 2).to(call.q.dtype), None

    blocks = _every_block(call) if call.blocks is None else call.blocks
    batch, tokens, heads, _ = q.shape
    problem = _Problem(q, k, v, blocks, call.scale, dtype, call.return_lse)
    for group in _groups(blocks, batch, heads, problem.safe_heads()):
        problem.solve(group)
    out = problem.out.view(batch, heads, -1, q.shape[3])[:, :, :tokens].transpose(1, 2)
    lse = problem.lse
    if lse is not None:
        lse = lse.view(batch, heads, -1)[..., :tokens].float().contiguous()
    return out.to(call.q.dtype), lse


def _is_dense(call: Call) -> bool:
    return call.blocks is None and not call.return_lse


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
    if call.return_lse or (call.blocks is not None and call.blocks.mask_mod is not None):
        return torch.float32  # these need the scores themselves, which half precision would spoil
    if call.compute is None and call.q.device.type == "cpu" and not _half_pays(dtype):
        return torch.float32
    return dtype


@functools.cache
def _half_pays(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies ``dtype`` at least 1.25 times as fast as fp32."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(4, 128, 64, dtype=dtype), torch.ones(4, 64, 1024, dtype=dtype)
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
        safe: Whether no score can overflow, see `_Problem.safe_heads`.
    """

    rows: np.ndarray
    columns: np.ndarray
    partial: int
    ragged: bool
    safe: bool


def _groups(blocks: Blocks, batch: int, heads: int, safe: list[bool]) -> Iterator[_Group]:
    num_q, num_kv = blocks.num_q_blocks, blocks.num_kv_blocks
    cut = num_kv - 1 if blocks.kv_len % blocks.block_kv else -1
    full = _lists(blocks.full_kv_num_blocks, blocks.full_kv_indices, batch, heads)
    partial = _lists(blocks.kv_num_blocks, blocks.kv_indices, batch, heads)
    partial = partial or [full[0][:0]] * len(full)

    rows_of: dict[tuple, list[int]] = defaultdict(list)
    for row in range(len(full)):
        if partial[row].size + full[row].size:
            rows_of[row // num_q, partial[row].tobytes(), full[row].tobytes()].append(row)

    alike: dict[tuple, list[list[int]]] = defaultdict(list)
    for (head, *_), rows in rows_of.items():
        first = rows[0]
        ragged = full[first].size > 0 and full[first][-1] == cut
        for i in range(0, len(rows), _ROWS_PER_LIST):
            shared = rows[i : i + _ROWS_PER_LIST]
            key = len(shared), partial[first].size, full[first].size, ragged, safe[head]
            alike[key].append(shared)

    for (_, num_partial, _, ragged, is_safe), entries in alike.items():
        rows = np.array(entries)
        columns = np.stack([np.concatenate((partial[r], full[r])) for r in rows[:, 0]])
        yield _Group(rows, columns + rows[:, :1] // num_q * num_kv, num_partial, ragged, is_safe)


def _lists(counts: Tensor | None, lists: Tensor | None, batch: int, heads: int) -> list[np.ndarray]:
    """The list of every row, without its padding."""
    if counts is None or lists is None:
        return []
    padded = lists.expand(batch, heads, -1, -1).flatten(0, 2).cpu().numpy()
    lengths = counts.expand(batch, heads, -1).flatten().tolist()
    return [row[:length] for row, length in zip(padded, lengths)]


# ---- the arithmetic ------------------------------------------------------------------------------


class _Problem:
    """Inputs as tiles ``[rows or columns, tokens, head_dim]``, results, and buffers."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Blocks,
        scale: float,
        dtype: torch.dtype,
        return_lse: bool,
    ) -> None:
        self.blocks, self.scale, self.heads = blocks, scale, q.shape[2]
        self.q = _tile(q, blocks.block_q, dtype)
        self.k, self.v = (_tile(x, blocks.block_kv, dtype) for x in (k, v))
        self.out = torch.zeros_like(self.q)
        self.lse = self.q.new_full(self.q.shape[:2], -torch.inf) if return_lse else None
        self.buffers: dict[str, Tensor] = {}

    def safe_heads(self) -> list[bool]:
        """Per head: |score| <= |q| |k| is so small that the softmax needs no maximum."""
        q_norm, k_norm = (torch.linalg.vector_norm(x, dim=-1) for x in (self.q, self.k))
        q_norm = q_norm.view(-1, self.blocks.num_q_blocks * self.blocks.block_q).amax(1)
        k_norm = k_norm.view(-1, self.blocks.num_kv_blocks * self.blocks.block_kv).amax(1)
        return (abs(self.scale) * q_norm * k_norm < _SAFE_SCORE).tolist()

    def solve(self, group: _Group) -> None:
        """Fill in the rows of one group."""
        attend = self._fused if self.q.dtype in _HALF else self._matmul
        for rows, columns in zip(
            self._chunks(group.rows, group), self._chunks(group.columns, group)
        ):
            flat = rows.flatten()
            q = self.q.index_select(0, flat).view(len(rows), -1, self.q.shape[2])
            out, lse = attend(q, rows, columns, group)
            self.out.index_copy_(0, flat, out.view(-1, *self.out.shape[1:]))
            if self.lse is not None and lse is not None:
                self.lse.index_copy_(0, flat, lse.view(-1, self.lse.shape[1]))

    def _chunks(self, x: np.ndarray, group: _Group) -> Iterator[Tensor]:
        """As many lists at a time as the budget takes, the same number for every thread."""
        threads = torch.get_num_threads()
        queries = group.rows.shape[1] * self.blocks.block_q
        columns = _NUMBERS_PER_THREAD // self._numbers_per_column(queries)
        per_thread = max(1, columns // group.columns.shape[1])
        even = len(x) // threads * threads
        for part in torch.from_numpy(x).to(self.q.device, torch.int64).split(even or len(x)):
            yield from part.split(per_thread * threads)

    def _numbers_per_column(self, queries: int) -> int:
        return self.blocks.block_kv * (queries + 2 * self.q.shape[2])

    def _fused(
        self, q: Tensor, rows: Tensor, columns: Tensor, group: _Group
    ) -> tuple[Tensor, Tensor | None]:
        """Half precision: the scores must not be rounded to it, and fused attention does not."""
        k, v = self._gather(columns, group.ragged)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=self.scale)
        return out[:, 0], None

    def _matmul(
        self, q: Tensor, rows: Tensor, columns: Tensor, group: _Group
    ) -> tuple[Tensor, Tensor | None]:
        lists, queries, dim = q.shape
        length = columns.shape[1]
        budget = _NUMBERS_PER_THREAD * torch.get_num_threads()
        span = max(1, budget // (lists * self._numbers_per_column(queries)))
        out = self._buffer("out", lists, queries, dim)
        total = q.new_zeros(lists, queries, 1)
        peak = None if group.safe else q.new_full(total.shape, torch.finfo(q.dtype).min)
        for start in range(0, length, span):
            stop = min(start + span, length)
            k, v = self._gather(columns[:, start:stop], group.ragged and stop == length)
            s = self._buffer("scores", lists, queries, k.shape[1])
            # Powers of two: torch's exp is MKL's, 50 times slower where the result underflows.
            torch.baddbmm(s, q, k.mT, beta=0, alpha=self.scale * math.log2(math.e), out=s)
            if start < group.partial:
                hidden = self._hidden(rows, columns[:, start : min(stop, group.partial)])
                s[..., : hidden.shape[2]].masked_fill_(hidden, -torch.inf)
            if peak is not None:
                higher = torch.maximum(peak, s.amax(-1, keepdim=True))
                if start > 0:
                    fade = torch.exp2(peak - higher)
                    out.mul_(fade)
                    total.mul_(fade)
                s.sub_(higher)
                peak = higher
            total.add_(s.exp2_().sum(-1, keepdim=True))
            torch.baddbmm(out, s, v, beta=int(start > 0), out=out)
        lse = None
        if self.lse is not None:
            lse = math.log(2) * (total.log2() if peak is None else total.log2() + peak)
        # Rows of partial blocks can be empty; their 0 / 0 is 0.
        return out.div_(total.clamp_min_(torch.finfo(q.dtype).tiny)), lse

    def _gather(self, columns: Tensor, ragged: bool) -> tuple[Tensor, Tensor]:
        """Keys and values ``[lists, tokens, head_dim]`` of the columns."""
        tokens = columns.shape[1] * self.blocks.block_kv
        if ragged:
            tokens -= -self.blocks.kv_len % self.blocks.block_kv
        index, gathered = columns.flatten(), []
        for name, tiles in (("k", self.k), ("v", self.v)):
            buffer = self._buffer(name, len(index), *tiles.shape[1:])
            torch.index_select(tiles, 0, index, out=buffer)
            gathered.append(buffer.view(len(columns), -1, tiles.shape[2])[:, :tokens])
        return gathered[0], gathered[1]

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

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Memory that is used again for every shape: fresh pages cost more than they hold."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.q.new_empty(size)
        return self.buffers[name][:size].view(shape)


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
