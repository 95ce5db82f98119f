"""From block lists to the kernel's work: tiles of queries, their lists, and the order they run in.

All of it is made on the lists' device without waiting for it, once per `Blocks`.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels.blocks import Blocks, Intervals
from gen_accel.kernels.route import to_lists

# Time of a key block in a 64-row tile against half of one in a 128-row tile: it reads the keys for
# half as many queries, and one warp group has nobody to overlap its softmax with. A guess.
_SMALL_TILE_COST = 1.25
_SMALL = 64  # queries of the smallest tile


class Tiles(NamedTuple):
    """Tiles of one height that one launch computes.

    Attributes:
        rows: Queries per tile that count; the kernel computes the power of two above them.
        group: Mask rows that share a list; 1 where lists are those of the `Blocks`.
        counts: int32 ``[B|1, H|1, T|1]``, key blocks that need no rule.
        lists: int32 ``[B|1, H|1, T|1, K]``.
        rule_counts: Likewise those that need one, or None.
        rule_lists: int32 ``[B|1, H|1, T, R]``, or None.
        rule_rows: int32, same shape: bit r says that mask row r of the tile sees the block whole,
            bit ``group + r`` that it sees it through the rule. None without groups.
        items: int32 ``[B * H * tiles]``: ``(batch * H + head) * tiles + tile``, in the order in
            which they run: heads one by one, longest lists first.
        number: int32 ``[1]``, how many of the items count.
    """

    rows: int
    group: int
    counts: Tensor
    lists: Tensor
    rule_counts: Tensor | None
    rule_lists: Tensor | None
    rule_rows: Tensor | None
    items: Tensor
    number: Tensor


_made: weakref.WeakKeyDictionary[Blocks, dict] = weakref.WeakKeyDictionary()


def make_tiles(blocks: Blocks, batch: int, heads: int, rows: int) -> tuple[Tiles, ...]:
    """The tiles of a call, ``rows`` queries high.

    Lower mask rows are merged: their lists are united, and the blocks that not all of them see go
    through a rule. Where two neighbours of 64 have little in common, they get a tile each. Rows of
    other sizes than powers of two are tiles of their own, whatever ``rows`` says.
    """
    if blocks.block_q & (blocks.block_q - 1):
        rows = blocks.block_q  # no power of two: neither merged nor cut
    found = _made.setdefault(blocks, {})
    key = (batch, heads, rows)
    if key not in found:
        found[key] = _make(blocks, batch, heads, rows)
    return found[key]


def every_tile(q_len: int, kv_len: int, block: int, batch: int, heads: int, rows: int,
               device: torch.device) -> Tiles:  # fmt: skip
    """The tiles of a dense call, which share one list of all key blocks."""
    number = -(-kv_len // block)
    count = torch.full((1, 1, 1), number, dtype=torch.int32, device=device)
    row = torch.arange(number, dtype=torch.int32, device=device)[None, None, None]
    items = torch.arange(batch * heads * -(-q_len // rows), dtype=torch.int32, device=device)
    return Tiles(rows, 1, count, row, None, None, None, items, _number(items))


def _make(blocks: Blocks, batch: int, heads: int, rows: int) -> tuple[Tiles, ...]:
    small = max(blocks.block_q, _SMALL)
    if small >= rows:
        lists = _lists(blocks, rows)
        return (_queue(blocks, lists, rows, batch, heads, None),)
    high, low = _lists(blocks, rows), _lists(blocks, small)
    united, apart = _length(high), _length(low).float()
    odd = -apart.shape[2] % 2
    pair = torch.nn.functional.pad(apart, (0, odd)).unflatten(2, (-1, 2)).sum(3)
    together = united * 2 <= _SMALL_TILE_COST * pair
    if odd:  # the neighbour of the last tile does not exist
        together[..., -1] = True
    alone = ~together.repeat_interleave(2, -1)[..., : apart.shape[2]]
    return (
        _queue(blocks, high, rows, batch, heads, together),
        _queue(blocks, low, small, batch, heads, alone),
    )


class _Lists(NamedTuple):
    group: int
    counts: Tensor
    lists: Tensor
    rule_counts: Tensor | None = None
    rule_lists: Tensor | None = None
    rule_rows: Tensor | None = None


def _length(lists: _Lists) -> Tensor:
    return lists.counts if lists.rule_counts is None else lists.counts + lists.rule_counts


def _lists(blocks: Blocks, rows: int) -> _Lists:
    """Lists for tiles of ``rows`` queries; those of the blocks themselves where they are higher."""
    if rows <= blocks.block_q:
        own = blocks.full_kv_num_blocks.contiguous(), blocks.full_kv_indices.contiguous()
        if blocks.kv_num_blocks is None or blocks.kv_indices is None:
            return _Lists(1, *own)
        return _Lists(1, *own, blocks.kv_num_blocks.contiguous(), blocks.kv_indices.contiguous())
    group = rows // blocks.block_q
    whole, part = blocks.mask("full"), blocks.mask("partial")
    # Rows behind the last repeat it: they are never stored.
    row = torch.arange(-(-blocks.num_q_blocks // group) * group, device=blocks.device)
    row = row.clamp_(max=blocks.num_q_blocks - 1).view(-1, group)
    all_see = torch.stack([whole[:, :, row[:, r]] for r in range(group)]).all(0)
    bits = torch.zeros(all_see.shape, dtype=torch.int32, device=blocks.device)
    for r in range(group):
        bits |= whole[:, :, row[:, r]].int() << r | part[:, :, row[:, r]].int() << (group + r)
    bits.masked_fill_(all_see, 0)
    width = blocks.full_kv_indices.shape[-1]
    more = 0 if blocks.kv_indices is None else blocks.kv_indices.shape[-1]
    ruled, rules = to_lists(bits != 0, min(blocks.num_kv_blocks, group * (width + more)))
    return _Lists(group, *to_lists(all_see, width), ruled, rules, bits.gather(-1, rules.long()))


def _queue(
    blocks: Blocks, lists: _Lists, rows: int, batch: int, heads: int, chosen: Tensor | None
) -> Tiles:
    tiles = -(-blocks.q_len // rows)
    length = _length(lists)
    if rows < blocks.block_q:
        length = length.repeat_interleave(blocks.block_q // rows, -1)
    length = length[..., :tiles].expand(batch, heads, -1).flatten(0, 1)
    longest = blocks.num_kv_blocks + 1
    head = torch.arange(batch * heads, device=blocks.device)[:, None]
    turn = head * longest + (longest - 1 - length)
    if chosen is None:
        items = turn.flatten().argsort().int()
        return Tiles(rows, *lists, items, _number(items))
    used = chosen.expand(batch, heads, -1).flatten(0, 1)
    items = torch.where(used, turn, batch * heads * longest).flatten().argsort().int()
    return Tiles(rows, *lists, items, used.sum(dtype=torch.int32).view(1))


def _number(items: Tensor) -> Tensor:
    return torch.full((1,), items.numel(), dtype=torch.int32, device=items.device)


# ---- which blocks are listed, as bits ------------------------------------------------------------

_bits: weakref.WeakKeyDictionary[Blocks, Tensor] = weakref.WeakKeyDictionary()


def listed_bits(blocks: Blocks) -> Tensor:
    """int32 ``[B|1, H|1, nQ, ceil(nKV / 32)]``: bit j % 32 of word j // 32 is key block j."""
    if blocks not in _bits:
        mask = blocks.mask()
        mask = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 32)).unflatten(-1, (-1, 8))
        bit = torch.arange(8, dtype=torch.uint8, device=mask.device)
        # Bytes make words by themselves: the lowest stands first.
        octets = (mask.view(torch.uint8) << bit).sum(-1, dtype=torch.uint8)
        _bits[blocks] = octets.view(torch.int32)
    return _bits[blocks]


# ---- the element rule in one word per token ------------------------------------------------------


class Packed(NamedTuple):
    """Intervals of all axes in one 32-bit word per token.

    Each axis has a field with a guard bit above it. The keys' guard bits are set, so in
    ``key - low`` the guard of an axis survives exactly where the key is not below ``low``: one
    subtraction compares all axes.

    Attributes:
        key: int32 ``[kv_len]``.
        low: int32 ``[H|1, q_len]``.
        high: Same shape.
        guard: The guard bits.
        free: See `Intervals`.
    """

    key: Tensor
    low: Tensor
    high: Tensor
    guard: int
    free: int


_packed: weakref.WeakKeyDictionary[Intervals, Packed | None] = weakref.WeakKeyDictionary()


def pack(intervals: Intervals) -> Packed | None:
    """One word per token, or None where the axes do not fit into it."""
    if intervals not in _packed:
        _packed[intervals] = _pack(intervals)
    return _packed[intervals]


def _pack(intervals: Intervals) -> Packed | None:
    limits = intervals.high.flatten(1).amax(1).tolist()
    fields = [int(limit).bit_length() for limit in limits]
    if sum(fields) + len(fields) > 32:
        return None
    device = intervals.key.device
    key = torch.zeros(intervals.key.shape[1], dtype=torch.int64, device=device)
    low = torch.zeros(intervals.low.shape[1:], dtype=torch.int64, device=device)
    high, guard, shift = torch.zeros_like(low), 0, 0
    for axis, (limit, bits) in enumerate(zip(limits, fields)):
        guard |= 1 << (shift + bits)
        # Places at or beyond the limit are seen by nobody, so the limit can stand for them.
        key |= intervals.key[axis].long().clamp(0, limit) << shift
        low |= intervals.low[axis].long().clamp(0, limit) << shift
        high |= intervals.high[axis].long().clamp(0, limit) << shift
        shift += bits + 1
    return Packed(_word(key | guard), _word(low), _word(high), _signed(guard), intervals.free)


def _word(x: Tensor) -> Tensor:
    return torch.where(x >= 2**31, x - 2**32, x).int().contiguous()


def _signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x
