"""Softmax mass per pair of blocks, recomputed tile by tile from the rows' log-sum-exps."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = math.log2(math.e)
_MAX_BLOCK = 128  # a block is one side of a tile, and larger tiles spill
_MAX_BYTES = 256  # of a head's row: two stages of keys then fit in the 99 KiB of sm_89 and sm_120


@triton.jit
def _mass_kernel(
    Q, K, LSE, MASS, scale,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    queries, keys, blocks, heads,
    BLOCK: tl.constexpr, SAMPLED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    HAS_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of TILE_Q / ROWS query blocks, heads, batch).

    A query block is ROWS rows of the tile, SAMPLED of them real; a key block COLUMNS columns, BLOCK
    of them real. ``scale`` includes log2(e).
    """
    tile, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    side_q: tl.constexpr = TILE_Q // ROWS
    side_k: tl.constexpr = TILE_K // COLUMNS
    channel = tl.arange(0, WIDTH)
    row, column = tl.arange(0, TILE_Q), tl.arange(0, TILE_K)

    block_q = tile * side_q + row // ROWS
    inside = row % ROWS
    real_q = (inside < SAMPLED) & (block_q < blocks)
    token_q = block_q * BLOCK + inside * BLOCK // SAMPLED
    q = Q + sample.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q += token_q.to(tl.int64)[:, None] * stride_qs + channel[None, :]
    q = tl.load(q, mask=real_q[:, None] & (channel < DIM)[None, :], other=0.0)

    k = K + sample.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    k += channel[:, None]
    if HAS_LSE:
        known = LSE + (sample.to(tl.int64) * heads + head) * queries + token_q
        lse = tl.load(known, mask=real_q, other=0.0) * 1.4426950408889634
    else:
        top = tl.full([TILE_Q], -float("inf"), tl.float32)
        total = tl.zeros([TILE_Q], tl.float32)
        for start in range(0, keys, TILE_K):
            token = start + column
            real_k = token < keys
            at = k + token.to(tl.int64)[None, :] * stride_ks
            key = tl.load(at, mask=real_k[None, :] & (channel < DIM)[:, None], other=0.0)
            logit = tl.dot(q, key, input_precision=PRECISION) * scale
            logit = tl.where(real_k[None, :], logit, -float("inf"))
            higher = tl.maximum(top, tl.max(logit, 1))
            total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logit - higher[:, None]), 1)
            top = higher
        lse = top + tl.log2(total)

    out_q = tile * side_q + tl.arange(0, side_q)
    out = MASS + ((sample.to(tl.int64) * heads + head) * blocks + out_q)[:, None] * blocks
    for first in range(0, blocks, side_k):
        block_k = first + column // COLUMNS
        inside_k = column % COLUMNS
        real_k = (inside_k < BLOCK) & (block_k < blocks)
        token = block_k * BLOCK + inside_k
        at = k + token.to(tl.int64)[None, :] * stride_ks
        key = tl.load(at, mask=real_k[None, :] & (channel < DIM)[:, None], other=0.0)
        logit = tl.dot(q, key, input_precision=PRECISION) * scale
        p = tl.where(real_q[:, None] & real_k[None, :], tl.exp2(logit - lse[:, None]), 0.0)
        mass = tl.sum(tl.reshape(p, [TILE_Q, side_k, COLUMNS]), 2)
        mass = tl.sum(tl.reshape(mass, [side_q, ROWS, side_k]), 1) / SAMPLED
        out_k = first + tl.arange(0, side_k)
        here = (out_q < blocks)[:, None] & (out_k < blocks)[None, :]
        tl.store(out + out_k[None, :], mass, mask=here)


def takes(q: Tensor, block: int) -> bool:
    """Whether the kernel serves this head size, dtype and block."""
    return block <= _MAX_BLOCK and q.shape[3] * q.element_size() <= _MAX_BYTES


@torch.library.custom_op("gen_accel::block_mass", mutates_args=())
def block_mass(
    q: Tensor, k: Tensor, lse: Tensor | None, block: int, blocks: int, sampled: int, scale: float
) -> Tensor:
    """`gen_accel.kernels.mass.block_mass` with ``sampled`` rows of each query block."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    batch, _, heads, dim = q.shape
    mass = q.new_empty(batch, heads, blocks, blocks, dtype=torch.float32)
    rows, columns = triton.next_power_of_2(sampled), triton.next_power_of_2(block)
    # The tile of scores is 64 x 128 or its transpose, or 128 x 128 where all rows of such a block
    # are measured: 16 warps then, for 8 would spill.
    tile_k = max(64, columns)
    tile_q = max(64 if tile_k > 64 else 128, rows)
    with torch.cuda.device_of(q):
        _mass_kernel[(triton.cdiv(blocks * rows, tile_q), heads, batch)](
            q, k, mass if lse is None else lse.contiguous(), mass, scale * _LOG2_E,
            *q.stride()[:3], *k.stride()[:3],
            q.shape[1], k.shape[1], blocks, heads,
            BLOCK=block, SAMPLED=sampled, ROWS=rows, COLUMNS=columns, TILE_Q=tile_q, TILE_K=tile_k,
            DIM=dim, WIDTH=max(16, triton.next_power_of_2(dim)),
            HAS_LSE=lse is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=16 if tile_q == tile_k == 128 else 8, num_stages=2,
        )  # fmt: skip
    return mass.mean(0)


@block_mass.register_fake
def _(q, k, lse, block, blocks, sampled, scale):
    return q.new_empty(q.shape[2], blocks, blocks, dtype=torch.float32)
