"""Rotary embedding, token order, smoothing and rounding in one read and one write.

Sums and maxima over all keys need a read of their own: `_scan`. All arithmetic is that of
`kernels.quant`, operation by operation, so the kernels are compiled without fused multiply-adds and
give the same codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.operands import KEYS, Operands
from gen_accel.kernels.prepare import Places, Rope, _flatten, _flatten_rope
from gen_accel.kernels.prepare import prepare as put_in_order
from gen_accel.kernels.quant import LEVELS, TINY, Codes, Precision

_SCANNED = 512  # tokens per program of a scan
_ELEMENTS = 2048  # of them in registers at a time


@triton.jit
def _rows_kernel(
    X, STRIDES, INDEX, COS, SIN, MEAN, CODES, SCALE, SHIFT,
    stride_xb, stride_xt, stride_xh, stride_cos, stride_cos_pair, stride_sin, stride_sin_pair,
    places, heads, before, frames, height, width, rope_start, rope_tokens, levels, tiny,
    HAS_STRIDES: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_ROPE: tl.constexpr,
    HALVES: tl.constexpr, SMOOTH: tl.constexpr, HAS_SHIFT: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Codes of queries or keys. Grid (groups, heads, batch)."""
    group, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = group * ROWS + tl.arange(0, ROWS)
    inside = place < places
    channel = tl.arange(0, WIDTH)
    x = _load(
        X, STRIDES, INDEX, COS, SIN, stride_xb, stride_xt, stride_xh,
        stride_cos, stride_cos_pair, stride_sin, stride_sin_pair, place, inside, head, sample,
        before, frames, height, width, rope_start, rope_tokens,
        HAS_STRIDES, HAS_INDEX, HAS_ROPE, HALVES, DIM, WIDTH,
    )  # fmt: skip
    pair = sample.to(tl.int64) * heads + head
    if SMOOTH or HAS_SHIFT:
        mean = tl.load(MEAN + pair * DIM + channel, mask=channel < DIM, other=0.0)[None, :]
    if HAS_SHIFT:
        tl.store(SHIFT + pair * places + place, tl.sum(x * mean, 1), mask=inside)
    if SMOOTH:
        x = tl.where(inside[:, None], x - mean, 0.0)
    peak = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), tiny)
    tl.store(SCALE + pair * tl.num_programs(0) + group, tl.div_rn(peak, levels))
    codes = _nearest(x * (tl.div_rn(1.0, peak) * levels)).to(tl.int8)
    at = (pair * places + place)[:, None] * DIM + channel[None, :]
    tl.store(CODES + at, codes, mask=inside[:, None] & (channel < DIM)[None, :])


@triton.jit
def _values_kernel(
    X, STRIDES, INDEX, COS, SIN, PEAK, CODES, SCALE,
    stride_xb, stride_xt, stride_xh, stride_cos, stride_cos_pair, stride_sin, stride_sin_pair,
    places, heads, before, frames, height, width, rope_start, rope_tokens, levels, tiny,
    HAS_STRIDES: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_ROPE: tl.constexpr,
    HALVES: tl.constexpr, BY_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Codes of values, as `operands.turn` stores them. Grid (groups, heads, batch)."""
    group, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Which of 16 keys stands where, see `operands.turn`: position 4t + 2b + e holds 8b + 2t + e.
    position = tl.arange(0, ROWS)
    key = position // 16 * 16 + position // 2 % 2 * 8 + position // 4 % 4 * 2 + position % 2
    place = group * ROWS + key
    inside = place < places
    channel = tl.arange(0, WIDTH)
    x = _load(
        X, STRIDES, INDEX, COS, SIN, stride_xb, stride_xt, stride_xh,
        stride_cos, stride_cos_pair, stride_sin, stride_sin_pair, place, inside, head, sample,
        before, frames, height, width, rope_start, rope_tokens,
        HAS_STRIDES, HAS_INDEX, HAS_ROPE, HALVES, DIM, WIDTH,
    )  # fmt: skip
    pair = sample.to(tl.int64) * heads + head
    if BY_BLOCK:
        peak = tl.maximum(tl.max(tl.abs(x), 0), tiny)
        scale = SCALE + (pair * tl.num_programs(0) + group) * DIM + channel
        tl.store(scale, tl.div_rn(peak, levels), mask=channel < DIM)
    else:
        peak = tl.load(PEAK + pair * DIM + channel, mask=channel < DIM, other=1.0)
    x = x * (tl.div_rn(1.0, peak) * levels)[None, :]
    if CODES.dtype.element_ty == tl.int8:
        codes = _nearest(x).to(tl.int8)
    else:
        codes = tl.minimum(tl.maximum(x, -levels), levels).to(CODES.dtype.element_ty)
    length = tl.num_programs(0) * ROWS
    at = (pair * DIM + channel)[:, None] * length + group * ROWS + position[None, :]
    tl.store(CODES + at, tl.trans(codes), mask=(channel < DIM)[:, None])


@triton.jit
def _scan_kernel(
    X, STRIDES, INDEX, COS, SIN, OUT,
    stride_xb, stride_xt, stride_xh, stride_cos, stride_cos_pair, stride_sin, stride_sin_pair,
    places, heads, before, frames, height, width, rope_start, rope_tokens,
    HAS_STRIDES: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_ROPE: tl.constexpr,
    HALVES: tl.constexpr, PEAK: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums over TOKENS places, or with PEAK largest magnitudes. Grid (spans, heads, batch)."""
    span, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = tl.arange(0, WIDTH)
    found = tl.zeros([WIDTH], tl.float32)
    for start in range(0, TOKENS, ROWS):
        place = span * TOKENS + start + tl.arange(0, ROWS)
        x = _load(
            X, STRIDES, INDEX, COS, SIN, stride_xb, stride_xt, stride_xh,
            stride_cos, stride_cos_pair, stride_sin, stride_sin_pair,
            place, place < places, head, sample,
            before, frames, height, width, rope_start, rope_tokens,
            HAS_STRIDES, HAS_INDEX, HAS_ROPE, HALVES, DIM, WIDTH,
        )  # fmt: skip
        if PEAK:
            found = tl.maximum(found, tl.max(tl.abs(x), 0))
        else:
            found += tl.sum(x, 0)
    row = (sample.to(tl.int64) * heads + head) * tl.num_programs(0) + span
    tl.store(OUT + row * DIM + channel, found, mask=channel < DIM)


@triton.jit
def _nearest(x):
    """Nearest integers, even on a tie: 1.5 * 2^23 pushes the fraction out of fp32."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _load(
    X, STRIDES, INDEX, COS, SIN, stride_xb, stride_xt, stride_xh,
    stride_cos, stride_cos_pair, stride_sin, stride_sin_pair, place, inside, head, sample,
    before, frames, height, width, rope_start, rope_tokens,
    HAS_STRIDES: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_ROPE: tl.constexpr,
    HALVES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What `prepare.prepare` puts at some places of a head: fp32 ``[places, WIDTH]``."""
    token = place
    if HAS_INDEX:
        token = tl.load(INDEX + place, mask=inside, other=0).to(tl.int32)
    if HAS_STRIDES:
        # Strides of an axis order are a mixed radix, so each coordinate is one of its digits.
        strides = STRIDES + head * 3
        frame = place // tl.load(strides) % frames
        y = place // tl.load(strides + 1) % height
        x = place // tl.load(strides + 2) % width
        video = frames * height * width
        raster = before + (frame * height + y) * width + x
        text = tl.where(place < video + before, place - video, place)
        token = tl.where(place < video, raster, text)
    channel = tl.arange(0, WIDTH)
    here = inside[:, None] & (channel < DIM)[None, :]
    row = X + sample.to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh
    row += token.to(tl.int64)[:, None] * stride_xt
    value = tl.load(row + channel[None, :], mask=here, other=0.0).to(tl.float32)
    if HAS_ROPE:
        # Each channel's partner is read a second time, from the cache.
        half: tl.constexpr = DIM // 2
        first = channel < half if HALVES else channel % 2 == 0
        if HALVES:
            partner = tl.where(first, channel + half, channel - half)
            pair = channel % half
        else:
            partner = channel ^ 1
            pair = channel // 2
        other = tl.load(row + partner[None, :], mask=here, other=0.0).to(tl.float32)
        angle = token - rope_start
        turned = here & ((angle >= 0) & (angle < rope_tokens))[:, None]
        at = angle.to(tl.int64)[:, None]
        cos = tl.load(COS + at * stride_cos + pair[None, :] * stride_cos_pair, turned, 1.0)
        sin = tl.load(SIN + at * stride_sin + pair[None, :] * stride_sin_pair, turned, 0.0)
        sin = tl.where(first[None, :], -sin.to(tl.float32), sin.to(tl.float32))
        value = value * cos.to(tl.float32) + other * sin
        # As if it had been stored.
        value = value.to(X.dtype.element_ty).to(tl.float32)
    return value


class _Order(NamedTuple):
    """`Places` and `Rope` in pieces, see `kernels.prepare`."""

    strides: Tensor | None
    token: Tensor | None
    grid: list[int]
    cos: Tensor | None = None
    sin: Tensor | None = None
    rope_start: int = 0
    halves: bool = False

    def places(self, x: Tensor) -> int:
        """Tokens in this order."""
        return x.shape[1] if self.token is None else len(self.token)


def operands(
    q: Tensor, k: Tensor, v: Tensor, precision: Precision,
    places: Places | None = None, rope: Rope | None = None,
) -> Operands:  # fmt: skip
    """`gen_accel.kernels.operands.operands`."""
    rows = (precision.q_rows, precision.k_rows)
    by_block = precision.v_scale == "block"
    how = (precision.pv or "", *rows, by_block, precision.smooth_k)
    q_codes, q_scale, k_codes, k_scale, v_codes, v_scale, mean, shift = quantise(
        q, k, v, *how, *_flatten(places), *_flatten_rope(rope)
    )
    values = codes = None
    if precision.pv is None:
        values = v if places is None else put_in_order(v, places).transpose(1, 2)
    else:
        kind = torch.float8_e4m3fn if precision.pv == "fp8" else torch.int8
        codes = Codes(v_codes.view(kind), v_scale, KEYS if by_block else k_codes.shape[2])
    return Operands(
        Codes(q_codes.transpose(1, 2), q_scale, precision.q_rows),
        Codes(k_codes.transpose(1, 2), k_scale, precision.k_rows),
        codes,
        values,
        mean if precision.smooth_k else None,
        shift,
        q.dtype,
    )


@torch.library.custom_op("gen_accel::quantise", mutates_args=())
def quantise(
    q: Tensor, k: Tensor, v: Tensor,
    pv: str, q_rows: int, k_rows: int, by_block: bool, smooth: bool,
    strides: Tensor | None, token: Tensor | None, place: Tensor | None, grid: list[int],
    cos: Tensor | None, sin: Tensor | None, rope_start: int, halves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes ``[B, H, places, D]`` and scales of q and k, those of v as bytes, mean, shift."""
    order = _Order(strides, token, grid, cos, sin, rope_start, halves)
    still = _Order(strides, token, grid)
    found = _outputs(q, k, v, pv, q_rows, k_rows, by_block, order)
    q_codes, q_scale, k_codes, k_scale, v_codes, v_scale, mean, shift = found
    if smooth:
        sums = _scan(k, order, peak=False).sum(2, keepdim=True)
        torch.div(sums, order.places(k), out=mean)
    else:
        mean.zero_()
    for x, rows, codes, scale, keys in (
        (q, q_rows, q_codes, q_scale, False), (k, k_rows, k_codes, k_scale, True),
    ):  # fmt: skip
        own = {"MEAN": mean, "CODES": codes, "SCALE": scale, "SHIFT": shift}
        own |= {"SMOOTH": keys, "HAS_SHIFT": not keys}
        _launch(_rows_kernel, scale.shape[2], x, order, rows, levels=LEVELS["int8"], **own)
    if pv:
        peak = v_scale if by_block else _scan(v, still, peak=True).amax(2).clamp_min(TINY)
        if not by_block:
            torch.div(peak[:, :, None], LEVELS[pv], out=v_scale)
        kind = torch.float8_e4m3fn if pv == "fp8" else torch.int8
        own = {"PEAK": peak, "CODES": v_codes.view(kind), "SCALE": v_scale, "BY_BLOCK": by_block}
        groups = v_codes.shape[3] // KEYS
        _launch(_values_kernel, groups, v, still, KEYS, levels=LEVELS[pv], **own)
    return found


@quantise.register_fake
def _(q, k, v, pv, q_rows, k_rows, by_block, smooth, strides, token, place, grid, *rope):
    return _outputs(q, k, v, pv, q_rows, k_rows, by_block, _Order(strides, token, grid))


def _outputs(q, k, v, pv, q_rows, k_rows, by_block, order):
    batch, _, heads, dim = q.shape
    q_len, kv_len = order.places(q), order.places(k)
    whole = -(-kv_len // KEYS)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.new_empty((batch, heads, *shape), dtype=dtype)

    return (
        new(q_len, dim, dtype=torch.int8), new(-(-q_len // q_rows)),
        new(kv_len, dim, dtype=torch.int8), new(-(-kv_len // k_rows)),
        new(dim, whole * KEYS if pv else 0, dtype=torch.int8),
        new((whole if by_block else 1) if pv else 0, dim),
        new(1, dim), new(q_len),
    )  # fmt: skip


def _scan(x: Tensor, order: _Order, peak: bool) -> Tensor:
    """``[B, H, spans, D]``."""
    batch, _, heads, dim = x.shape
    spans = triton.cdiv(order.places(x), _SCANNED)
    out = x.new_empty(batch, heads, spans, dim, dtype=torch.float32)
    rows = max(1, _ELEMENTS // triton.next_power_of_2(dim))
    _launch(_scan_kernel, spans, x, order, rows, OUT=out, PEAK=peak, TOKENS=_SCANNED)
    return out


def _launch(kernel: Any, groups: int, x: Tensor, order: _Order, rows: int, **own: Any) -> None:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, _, heads, dim = x.shape
    frames, height, width, before = order.grid or (1, 1, 1, 0)
    channels = max(2, triton.next_power_of_2(dim))
    cos, sin = order.cos, order.sin
    if "levels" in own:
        own["tiny"] = TINY
    # Pointers that are not read still need a tensor.
    with torch.cuda.device_of(x):
        kernel[(groups, heads, batch)](
            X=x, STRIDES=x if order.strides is None else order.strides,
            INDEX=x if order.token is None else order.token,
            COS=x if cos is None else cos, SIN=x if sin is None else sin,
            stride_xb=x.stride(0), stride_xt=x.stride(1), stride_xh=x.stride(2),
            stride_cos=0 if cos is None else cos.stride(0),
            stride_cos_pair=0 if cos is None else cos.stride(1),
            stride_sin=0 if sin is None else sin.stride(0),
            stride_sin_pair=0 if sin is None else sin.stride(1),
            places=order.places(x), heads=heads, before=before,
            frames=frames, height=height, width=width,
            rope_start=order.rope_start, rope_tokens=0 if cos is None else cos.shape[0],
            HAS_STRIDES=order.strides is not None, HAS_INDEX=order.token is not None,
            HAS_ROPE=cos is not None, HALVES=order.halves,
            ROWS=rows, DIM=dim, WIDTH=channels, **own,
            num_warps=min(16, max(4, rows * channels // 1024)), enable_fp_fusion=False,
        )  # fmt: skip
