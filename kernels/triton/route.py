"""Rows of scores to block lists, one row per program, held in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 8192  # a row is one tile


@triton.jit
def _sortable(x):
    """int32 in the order of the floats; both zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _route_kernel(
    SCORES, FORCED, COUNTS, LISTS, beta,
    stride_sb, stride_sh, stride_sq, stride_sk, stride_fb, stride_fh, stride_fq, stride_fk,
    columns, width, keep,
    HAS_KEEP: tl.constexpr, HAS_BETA: tl.constexpr, HAS_FORCED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, heads, batch)."""
    row, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    chosen = tl.zeros([COLUMNS], tl.int1)
    if HAS_KEEP or HAS_BETA:
        at = SCORES + sample.to(tl.int64) * stride_sb + head.to(tl.int64) * stride_sh
        at += row.to(tl.int64) * stride_sq + column * stride_sk
        score = tl.load(at, mask=inside, other=-float("inf"))
        real = score > -float("inf")  # False for NaN

    if HAS_KEEP:
        # The largest threshold that ``keep`` keys reach, bit by bit: a radix select, not a sort.
        lowest: tl.constexpr = -(2**31)
        key = tl.where(real, _sortable(score), lowest)
        threshold = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= keep, 0, lowest)
        for bit in range(31):
            higher = threshold | (1 << (30 - bit))
            threshold = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= keep, higher, threshold)
        above, equal = key > threshold, key == threshold
        left = keep - tl.sum(above.to(tl.int32), 0)
        chosen = (above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))) & real

    if HAS_BETA:
        finite = real & (score < float("inf"))
        number = tl.maximum(tl.sum(finite.to(tl.float32), 0), 1.0)
        # Rounded to nearest: in a row of equal scores none may come out above the mean.
        mean = tl.div_rn(tl.sum(tl.where(finite, score, 0.0), 0), number)
        away = tl.where(finite, score - mean, 0.0)
        std = tl.sqrt(tl.sum(away * away, 0) / number)
        chosen |= real & (score > mean + beta * std)

    if HAS_FORCED:
        at = FORCED + sample.to(tl.int64) * stride_fb + head.to(tl.int64) * stride_fh
        at += row.to(tl.int64) * stride_fq + column * stride_fk
        chosen |= tl.load(at, mask=inside, other=0) != 0

    place = tl.cumsum(chosen.to(tl.int32), 0)
    chosen &= place <= width  # a list that is too short may not spoil the next one
    count = tl.sum(chosen.to(tl.int32), 0)
    out = (sample.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(0) + row
    tl.store(COUNTS + out, count)
    lists = LISTS + out * width
    tl.store(lists + place - 1, column, mask=chosen)
    tl.store(
        lists + column, tl.zeros([COLUMNS], tl.int32), mask=(column >= count) & (column < width)
    )


@torch.library.custom_op("gen_accel::route", mutates_args=())
def route(
    scores: Tensor, keep: int, beta: float | None, forced: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """`gen_accel.kernels.route.route`; ``keep=0`` chooses none by rank."""
    return _launch(scores, keep, beta, forced, width)


@torch.library.custom_op("gen_accel::to_lists", mutates_args=())
def to_lists(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`gen_accel.kernels.route.to_lists`."""
    rows = mask.reshape(1, 1, -1, mask.shape[-1]).view(torch.uint8)
    counts, lists = _launch(rows, 0, None, rows, width)
    return counts.view(mask.shape[:-1]), lists.view(*mask.shape[:-1], width)


def _launch(
    scores: Tensor, keep: int, beta: float | None, forced: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    columns = scores.shape[3]
    counts, lists = _outputs(scores, width)
    # A bool has no pointer type of its own in a kernel's signature; its bytes do.
    mask = scores if forced is None else forced.view(torch.uint8).expand(scores.shape)
    size = triton.next_power_of_2(columns)
    with torch.cuda.device_of(scores):
        _route_kernel[(scores.shape[2], scores.shape[1], scores.shape[0])](
            scores, mask, counts, lists, 0.0 if beta is None else beta,
            *scores.stride(), *mask.stride(), columns, width, keep,
            HAS_KEEP=keep > 0, HAS_BETA=beta is not None, HAS_FORCED=forced is not None,
            COLUMNS=size,
            # Few warps: the sums run over the row, and within a warp they need no shared memory.
            num_warps=max(1, min(8, size // 1024)),
        )  # fmt: skip
    return counts, lists


@route.register_fake
def _(scores, keep, beta, forced, width):
    return _outputs(scores, width)


@to_lists.register_fake
def _(mask, width):
    counts, lists = _outputs(mask.reshape(1, 1, -1, mask.shape[-1]), width)
    return counts.view(mask.shape[:-1]), lists.view(*mask.shape[:-1], width)


def _outputs(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    def new(*shape: int) -> Tensor:
        return scores.new_empty(shape, dtype=torch.int32)

    return new(*scores.shape[:3]), new(*scores.shape[:3], width)
