"""Means, deviations and variances of groups of tokens, read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048  # in registers at a time; twice as many spill on some devices


@triton.jit
def _pool_kernel(
    X, REAL, MEAN, COUNT, DEVIATION, VARIANCE,
    stride_xb, stride_xs, stride_xh, tokens, groups, heads,
    SIZE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_REAL: tl.constexpr, HAS_DEVIATION: tl.constexpr, HAS_VARIANCE: tl.constexpr,
):  # fmt: skip
    """Grid (groups, heads, batch)."""
    group, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = column < DIM
    x = X + sample.to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh + column[None, :]

    total = tl.zeros([COLUMNS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for start in range(0, SIZE, ROWS):
        token = group * SIZE + start + row
        here = (start + row < SIZE) & (token < tokens)
        if HAS_REAL:
            here &= tl.load(REAL + token, mask=here, other=0) != 0
        at = x + token.to(tl.int64)[:, None] * stride_xs
        value = tl.load(at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value, 0)
        count += here.to(tl.float32)
    number = tl.sum(count, 0)
    share = 1.0 / tl.maximum(number, 1.0)
    mean = total * share
    out = ((sample.to(tl.int64) * groups + group) * heads + head) * DIM + column
    tl.store(MEAN + out, mean, mask=inside)
    tl.store(COUNT + group, number, mask=(head == 0) & (sample == 0))

    if HAS_DEVIATION or HAS_VARIANCE:
        absolute = tl.zeros([COLUMNS], tl.float32)
        square = tl.zeros([COLUMNS], tl.float32)
        # The tokens are still in the cache.
        for start in range(0, SIZE, ROWS):
            token = group * SIZE + start + row
            here = (start + row < SIZE) & (token < tokens)
            if HAS_REAL:
                here &= tl.load(REAL + token, mask=here, other=0) != 0
            at = x + token.to(tl.int64)[:, None] * stride_xs
            value = tl.load(at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
            away = tl.where(here[:, None], value - mean[None, :], 0.0)
            if HAS_DEVIATION:
                absolute += tl.sum(tl.abs(away), 0)
            if HAS_VARIANCE:
                square += tl.sum(away * away, 0)
        if HAS_DEVIATION:
            tl.store(DEVIATION + out, absolute * share, mask=inside)
        if HAS_VARIANCE:
            tl.store(VARIANCE + out, square * share, mask=inside)


@torch.library.custom_op("gen_accel::pool", mutates_args=())
def pool(
    x: Tensor, size: int, real: Tensor | None, deviation: bool, variance: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gen_accel.kernels.tail.group_means` in one pass; what was not asked for is empty."""
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, tokens, heads, dim = x.shape
    groups = triton.cdiv(tokens, size)
    outputs = _outputs(x, size, deviation, variance)
    mean, count, spread, square = outputs
    if real is not None:
        real = real.to(torch.uint8).contiguous()
    columns = triton.next_power_of_2(dim)
    rows = min(triton.next_power_of_2(size), max(1, _ELEMENTS // columns))
    with torch.cuda.device_of(x):
        _pool_kernel[(groups, heads, batch)](
            x, x if real is None else real, mean, count, spread, square,
            x.stride(0), x.stride(1), x.stride(2), tokens, groups, heads,
            SIZE=size, DIM=dim, ROWS=rows, COLUMNS=columns, HAS_REAL=real is not None,
            HAS_DEVIATION=deviation, HAS_VARIANCE=variance,
            num_warps=4,
        )  # fmt: skip
    return outputs


@pool.register_fake
def _(x, size, real, deviation, variance):
    return _outputs(x, size, deviation, variance)


def _outputs(
    x: Tensor, size: int, deviation: bool, variance: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, heads, dim = x.shape
    groups = -(-tokens // size)
    shape = (batch, groups, heads, dim)

    def new(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    return (
        new(*shape),
        new(groups),
        new(*shape) if deviation else new(0),
        new(*shape) if variance else new(0),
    )
