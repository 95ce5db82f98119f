"""RMS norm, rotary embedding and token order in one read and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048  # of one head in registers at a time
_HEADS = 8  # walked by one program, which reads the angles of its tokens once


@triton.jit
def _prepare_kernel(
    X, OUT, STRIDES, INDEX, COS, SIN, WEIGHT,
    stride_xb, stride_xt, stride_xh, stride_ob, stride_ot, stride_oh,
    stride_cos, stride_cos_pair, stride_sin, stride_sin_pair,
    rows, heads, before, video, plane, line, rope_start, rope_tokens, eps,
    BACK: tl.constexpr, HAS_STRIDES: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_ROPE: tl.constexpr, HALVES: tl.constexpr,
    HAS_NORM: tl.constexpr, ACROSS: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, groups of heads, batch).

    Tokens are read and places written, or with BACK the other way round. A row is a place where an
    index is given for `prepare`, a token otherwise. A norm ACROSS heads wants all heads in one
    group, which are then read twice, the second time from the cache.
    """
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    source = row
    target = row
    if HAS_INDEX:
        source = tl.load(INDEX + row, mask=inside, other=0).to(tl.int32)

    half: tl.constexpr = WIDTH // 2
    channel = tl.arange(0, WIDTH)
    pair = tl.arange(0, half)
    whole = inside[:, None] & (channel < DIM)[None, :]
    paired = inside[:, None] & (pair < DIM // 2)[None, :]
    if HAS_ROPE:
        angle = source - rope_start
        turned = paired & ((angle >= 0) & (angle < rope_tokens))[:, None]
        at = angle.to(tl.int64)[:, None]
        # 1 and 0 leave the other tokens as they are.
        cos = tl.load(COS + at * stride_cos + pair[None, :] * stride_cos_pair, turned, 1.0)
        sin = tl.load(SIN + at * stride_sin + pair[None, :] * stride_sin_pair, turned, 0.0)
        cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    if HAS_STRIDES:
        raster = row - before
        frame, rest = raster // plane, raster % plane
        y, x = rest // line, rest % line
        text = tl.where(raster < 0, video + row, row)
        is_video = (raster >= 0) & (raster < video)

    if ACROSS:
        squares = tl.zeros([ROWS], tl.float32)
        x_rows = X + sample * stride_xb + source.to(tl.int64)[:, None] * stride_xt
        for head in range(heads):
            x_row = x_rows + tl.cast(head, tl.int64) * stride_xh
            value = tl.load(x_row + channel[None, :], whole, 0.0).to(tl.float32)
            squares += tl.sum(value * value, 1)
        scale = tl.rsqrt(squares / (heads * DIM) + eps)

    first = tl.program_id(1) * HEADS
    for head in range(first, tl.minimum(first + HEADS, heads)):
        if HAS_STRIDES:
            strides = STRIDES + head * 3
            place = frame * tl.load(strides) + y * tl.load(strides + 1) + x * tl.load(strides + 2)
            place = tl.where(is_video, place, text)
            source = place if BACK else row
            target = row if BACK else place
        offset = sample * stride_xb + tl.cast(head, tl.int64) * stride_xh
        x_row = X + offset + source.to(tl.int64)[:, None] * stride_xt
        offset = sample * stride_ob + tl.cast(head, tl.int64) * stride_oh
        out_row = OUT + offset + target.to(tl.int64)[:, None] * stride_ot
        weights = WEIGHT + (head * DIM if ACROSS else 0)
        if HAS_ROPE and HALVES:
            real = tl.load(x_row + pair[None, :], paired, 0.0).to(tl.float32)
            imag = tl.load(x_row + DIM // 2 + pair[None, :], paired, 0.0).to(tl.float32)
            if HAS_NORM:
                if not ACROSS:
                    squares = tl.sum(real * real + imag * imag, 1)
                    scale = tl.rsqrt(squares / DIM + eps)
                few = pair < DIM // 2
                weight = tl.load(weights + pair, few, 0.0).to(tl.float32)
                real = real * scale[:, None] * weight[None, :]
                weight = tl.load(weights + DIM // 2 + pair, few, 0.0).to(tl.float32)
                imag = imag * scale[:, None] * weight[None, :]
            out_type = OUT.dtype.element_ty
            tl.store(out_row + pair[None, :], (real * cos - imag * sin).to(out_type), paired)
            turned_imag = (imag * cos + real * sin).to(out_type)
            tl.store(out_row + DIM // 2 + pair[None, :], turned_imag, paired)
        else:
            value = tl.load(x_row + channel[None, :], whole, 0.0)
            if HAS_NORM:
                value = value.to(tl.float32)
                if not ACROSS:
                    scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)
                weight = tl.load(weights + channel, channel < DIM, 0.0).to(tl.float32)
                value = value * scale[:, None] * weight[None, :]
            if HAS_ROPE:
                pairs = tl.reshape(value.to(tl.float32), [ROWS, half, 2])
                real, imag = tl.split(pairs)
                pairs = tl.join(real * cos - imag * sin, imag * cos + real * sin)
                value = tl.reshape(pairs, [ROWS, WIDTH])
            tl.store(out_row + channel[None, :], value.to(OUT.dtype.element_ty), whole)


@torch.library.custom_op("gen_accel::prepare", mutates_args=())
def prepare(
    x: Tensor, strides: Tensor | None, token: Tensor | None, place: Tensor | None,
    grid: list[int], cos: Tensor | None, sin: Tensor | None, rope_start: int, halves: bool,
    weight: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """`gen_accel.kernels.prepare.prepare`."""
    out = _prepared(x, token)
    rope, norm = (cos, sin, rope_start, halves), (weight, eps)
    _launch(x, out.transpose(1, 2), strides, token, grid, rope, norm)
    return out


@prepare.register_fake
def _(x, strides, token, place, grid, cos, sin, rope_start, halves, weight, eps):
    return _prepared(x, token)


@torch.library.custom_op("gen_accel::restore", mutates_args=())
def restore(
    x: Tensor, strides: Tensor | None, token: Tensor | None, place: Tensor | None, grid: list[int]
) -> Tensor:
    """`gen_accel.kernels.prepare.restore`."""
    out = _restored(x, place)
    _launch(x.transpose(1, 2), out, strides, place, grid, back=True)
    return out


@restore.register_fake
def _(x, strides, token, place, grid):
    return _restored(x, place)


def _prepared(x: Tensor, token: Tensor | None) -> Tensor:
    batch, tokens, heads, dim = x.shape
    return x.new_empty(batch, heads, tokens if token is None else len(token), dim)


def _restored(x: Tensor, place: Tensor | None) -> Tensor:
    batch, heads, places, dim = x.shape
    return x.new_empty(batch, places if place is None else len(place), heads, dim)


def _launch(
    x, out, strides, index, grid, rope=(None, None, 0, False), norm=(None, 0.0), back=False
) -> None:
    """Copy ``x`` to ``out``, both ``[batch, tokens or places, heads, head_dim]``."""
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, rows, heads, dim = out.shape if back or index is not None else x.shape
    (cos, sin, rope_start, halves), (weight, eps) = rope, norm
    across = weight is not None and len(weight) != dim
    together = heads if across else _HEADS
    frames, height, wide, before = grid or (0, 1, 1, 0)
    width = max(2, triton.next_power_of_2(dim))
    tile = min(triton.next_power_of_2(rows), max(1, _ELEMENTS // width))
    cos_strides = (0, 0) if cos is None else cos.stride()
    sin_strides = (0, 0) if sin is None else sin.stride()
    # Pointers that are not read still need a tensor.
    with torch.cuda.device_of(x):
        _prepare_kernel[(triton.cdiv(rows, tile), triton.cdiv(heads, together), batch)](
            x, out, x if strides is None else strides, x if index is None else index,
            x if cos is None else cos, x if sin is None else sin, x if weight is None else weight,
            *x.stride()[:3], *out.stride()[:3], *cos_strides, *sin_strides,
            rows, heads, before, frames * height * wide, height * wide, wide,
            rope_start, 0 if cos is None else cos.shape[0], eps,
            BACK=back, HAS_STRIDES=strides is not None, HAS_INDEX=index is not None,
            HAS_ROPE=cos is not None, HALVES=halves, HAS_NORM=weight is not None, ACROSS=across,
            ROWS=tile, HEADS=together, DIM=dim, WIDTH=width, num_warps=4,
        )  # fmt: skip
