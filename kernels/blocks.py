"""Block lists: which key blocks each query block sees, in FlexAttention's convention."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gen_accel.kernels.fused import fused
from gen_accel.kernels.route import to_lists

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# A compiled graph can carry numbers and tensors, not functions: it carries the rule's number. An
# entry lives as long as its rule, so a number that is found here is never stale.
RULES: weakref.WeakValueDictionary[int, MaskMod] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Intervals:
    """An element rule as data, for carriers that cannot call a ``mask_mod``.

    A key is visible when its place lies in the query's interval on every axis, or when it is free.

    Attributes:
        key: Places of the keys, int32 ``[axes, kv_len]``, from 0.
        low: First visible place per query, int32 ``[axes, H|1, q_len]``.
        high: One past the last visible place, same shape.
        free: Keys from this index on are always visible.
    """

    key: Tensor
    low: Tensor
    high: Tensor
    free: int

    def to(self, device: torch.device | str) -> Intervals:
        """The same on another device."""
        key = self.key.to(device)
        if key is self.key:
            return self
        return Intervals(key, self.low.to(device), self.high.to(device), self.free)

    def rule(self) -> MaskMod:
        """The ``mask_mod``; its attribute ``intervals`` is this object."""
        # Split here: FlexAttention compiles plain look-ups only.
        free, shared = self.free, self.low.shape[1] == 1
        keys = self.key.unbind()
        lows, highs = ((x[:, 0] if shared else x).unbind() for x in (self.low, self.high))

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            query = (q,) if shared else (h, q)
            inside = [
                (low[query] <= key[kv]) & (key[kv] < high[query])
                for key, low, high in zip(keys, lows, highs)
            ]
            return functools.reduce(torch.bitwise_and, inside) | (kv >= free)

        visible.intervals = self  # type: ignore[attr-defined]
        return visible


@dataclass(frozen=True, eq=False)
class Blocks:
    """Key blocks per (batch, head, query block), as counts and index lists.

    *Full* blocks are attended without any element mask, *partial* ones through ``mask_mod``. Keys
    at or beyond ``kv_len`` do not exist, whatever the lists say, so a ragged last block needs no
    mask. The lists are those of ``torch.nn.attention.flex_attention.BlockMask``; no N x N mask is
    ever built.

    Attributes:
        full_kv_num_blocks: int32 ``[B|1, H|1, nQ]``, how many entries of each full list count.
        full_kv_indices: int32 ``[B|1, H|1, nQ, K]``, ascending block indices; the rest is padding
            with valid (in-range) indices.
        q_len: Number of queries.
        kv_len: Number of keys.
        block_q: Queries per block; ``nQ = ceil(q_len / block_q)``.
        block_kv: Keys per block; ``nKV = ceil(kv_len / block_kv)``.
        kv_num_blocks: As above for the partial blocks, or None when there are none.
        kv_indices: As above for the partial blocks, or None.
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, the element rule of the partial blocks. Made of
            elementwise tensor operations and table look-ups, so that it works on scalars (as
            FlexAttention calls it) and on index tensors that broadcast against each other. Blocks
            with a rule are made outside of compiled code; those without may be made in it.
        rule: Number under which `RULES` finds ``mask_mod``; 0 without one.
    """

    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    kv_num_blocks: Tensor | None = None
    kv_indices: Tensor | None = None
    mask_mod: MaskMod | None = None
    rule: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        if self.mask_mod is not None:
            RULES[id(self.mask_mod)] = self.mask_mod
            object.__setattr__(self, "rule", id(self.mask_mod))
        if (self.kv_num_blocks is None) != (self.kv_indices is None):
            raise ValueError("kv_num_blocks and kv_indices belong together: give both or neither")
        if self.kv_num_blocks is not None and self.mask_mod is None:
            raise ValueError(
                "partial blocks need a mask_mod; blocks without an element rule are full"
            )
        for counts, lists in (
            (self.full_kv_num_blocks, self.full_kv_indices),
            (self.kv_num_blocks, self.kv_indices),
        ):
            if counts is None or lists is None:
                continue
            if counts.ndim != 3 or lists.ndim != 4 or lists.shape[:3] != counts.shape:
                raise ValueError(
                    f"counts {tuple(counts.shape)} and lists {tuple(lists.shape)}: expected "
                    "[B|1, H|1, nQ] and [B|1, H|1, nQ, K]"
                )
            if counts.shape[2] != self.num_q_blocks:
                raise ValueError(
                    f"{counts.shape[2]} query blocks listed, but q_len={self.q_len} and "
                    f"block_q={self.block_q} make {self.num_q_blocks}"
                )

    @property
    def num_q_blocks(self) -> int:
        """ceil(q_len / block_q)."""
        return -(-self.q_len // self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        """ceil(kv_len / block_kv)."""
        return -(-self.kv_len // self.block_kv)

    @property
    def device(self) -> torch.device:
        """Device of the lists."""
        return self.full_kv_num_blocks.device

    @classmethod
    def from_mask(
        cls,
        full: Tensor,
        *,
        q_len: int,
        kv_len: int,
        block_size: int | tuple[int, int],
        partial: Tensor | None = None,
        mask_mod: MaskMod | None = None,
        width: int | None = None,
    ) -> Blocks:
        """Build the lists from block masks.

        Args:
            full: bool ``[B|1, H|1, nQ, nKV]``, blocks attended whole.
            q_len: Number of queries.
            kv_len: Number of keys.
            block_size: Tokens per block, one number or (query, key).
            partial: bool, same shape, blocks attended through ``mask_mod``; disjoint from ``full``.
            mask_mod: Element rule of the partial blocks.
            width: Length of the lists, at least that of the longest; None finds it, for which a GPU
                has to be waited for.
        """
        block_q, block_kv = (block_size, block_size) if isinstance(block_size, int) else block_size
        num_q, num_kv = -(-q_len // block_q), -(-kv_len // block_kv)
        if full.ndim != 4 or full.shape[2:] != (num_q, num_kv):
            raise ValueError(
                f"block mask {tuple(full.shape)}: q_len={q_len}, kv_len={kv_len} in blocks of "
                f"{block_q}x{block_kv} need [B|1, H|1, {num_q}, {num_kv}]"
            )
        counts, lists = _to_lists(full, width)
        blocks = cls(counts, lists, q_len, kv_len, block_q, block_kv)
        if partial is None or not bool(partial.any()):
            return blocks
        if bool((partial & full).any()):
            raise ValueError("a block is listed as full and as partial; it can be one of them")
        counts, lists = _to_lists(partial, width)
        return replace(blocks, kv_num_blocks=counts, kv_indices=lists, mask_mod=mask_mod)

    def mask(self, which: str = "all") -> Tensor:
        """The ``"full"``, ``"partial"`` or ``"all"`` blocks as bool ``[B|1, H|1, nQ, nKV]``."""
        full = _to_mask(self.full_kv_num_blocks, self.full_kv_indices, self.num_kv_blocks)
        if which == "full":
            return full
        if self.kv_num_blocks is None or self.kv_indices is None:
            return full if which == "all" else torch.zeros_like(full)
        partial = _to_mask(self.kv_num_blocks, self.kv_indices, self.num_kv_blocks)
        return partial if which == "partial" else full | partial

    def kept(self) -> Tensor:
        """`density` as a 0-D tensor where the lists are, for which nothing has to be waited for."""
        kept = _mean(self.full_kv_num_blocks)
        if self.kv_num_blocks is not None:
            kept = kept + _mean(self.kv_num_blocks)
        return kept / self.num_kv_blocks

    def density(self) -> float:
        """Kept share of all (query block, key block) pairs, partial blocks counted whole."""
        return float(self.kept())

    @property
    def nbytes(self) -> int:
        """Memory of the lists, in bytes."""
        lists = (
            self.full_kv_num_blocks,
            self.full_kv_indices,
            self.kv_num_blocks,
            self.kv_indices,
        )
        return sum(t.numel() * t.element_size() for t in lists if t is not None)

    def to(self, device: torch.device | str) -> Blocks:
        """The same lists on another device; a rule of `Intervals` goes with them."""
        move = lambda t: None if t is None else t.to(device)  # noqa: E731
        rule, intervals = self.mask_mod, getattr(self.mask_mod, "intervals", None)
        if intervals is not None and (moved := intervals.to(device)) is not intervals:
            rule = moved.rule()
        return replace(
            self,
            mask_mod=rule,
            full_kv_num_blocks=self.full_kv_num_blocks.to(device),
            full_kv_indices=self.full_kv_indices.to(device),
            kv_num_blocks=move(self.kv_num_blocks),
            kv_indices=move(self.kv_indices),
        )


def _mean(counts: Tensor) -> Tensor:
    # Apple's MPS has no fp64; a sum of integers is exact without it.
    return counts.sum(dtype=torch.int64).float() / counts.numel()


def _to_lists(mask: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    counts = mask.sum(-1, dtype=torch.int32)
    if width is None:
        width = max(1, int(counts.max())) if counts.numel() else 1
    if fused(mask):
        return to_lists(mask, width)
    # A stable descending sort of 0/1 puts the kept indices first, in ascending order.
    order = torch.argsort(mask.to(torch.uint8), dim=-1, descending=True, stable=True)
    return counts, order[..., :width].to(torch.int32).contiguous()


def _to_mask(counts: Tensor, lists: Tensor, width: int) -> Tensor:
    listed = torch.arange(lists.shape[-1], device=lists.device) < counts[..., None]
    mask = torch.zeros(*lists.shape[:3], width + 1, dtype=torch.bool, device=lists.device)
    # Padding entries are sent to an extra column that is cut off again.
    mask.scatter_(-1, torch.where(listed, lists, width).long(), True)
    return mask[..., :width]
