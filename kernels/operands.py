"""The codes of a call as 8-bit matrix products read them, made in one pass over q, k and v."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels.fused import fused
from gen_accel.kernels.prepare import Places, Rope, prepare
from gen_accel.kernels.quant import Codes, Precision, quantise, score_shift

KEYS = 64  # values come in whole tiles of that many keys


class Operands(NamedTuple):
    """Codes in the kernel's layout.

    Attributes:
        q: Codes ``[B, Sq, H, D]`` int8, any strides.
        k: Codes ``[B, Skv, H, D]`` int8, likewise.
        v: Codes ``[B, H, D, S]``, tokens as `turn` orders them; or None where values keep 16 bits.
        values: ``[B, Skv, H, D]``, the values where they keep 16 bits, else None.
        k_mean: fp32 ``[B, H, 1, D]``, or None.
        shift: fp32 ``[B, H, Sq]``: q . k_mean.
        dtype: What the call's tensors were.
    """

    q: Codes
    k: Codes
    v: Codes | None
    values: Tensor | None
    k_mean: Tensor | None
    shift: Tensor
    dtype: torch.dtype


def operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Precision,
    places: Places | None = None,
    rope: Rope | None = None,
) -> Operands:
    """Rotate q and k, put all tokens in order, smooth the keys, quantise.

    Args:
        q: ``[B, Sq, H, D]``, in the model's order.
        k: ``[B, Skv, H, D]``.
        v: ``[B, Skv, H, D]``.
        precision: With int8 scores.
        places: Where tokens go; None keeps the order.
        rope: Rotary embedding, or None.

    Returns:
        The codes of `quant.quantise` on what `prepare` makes of the tensors.
    """
    if fused(q, k, v):
        from gen_accel.kernels.triton.quantise import operands as kernel

        return kernel(q, k, v, precision, places, rope)
    dtype = q.dtype
    if places is not None or rope is not None:
        q, k = (prepare(x, places, rope).transpose(1, 2) for x in (q, k))
        v = prepare(v, places).transpose(1, 2)
    codes = quantise(q, k, v, precision)
    shift = score_shift(q, codes.k_mean, 1.0)
    if not isinstance(shift, Tensor):
        shift = codes.q.scale.new_zeros(q.shape[0], q.shape[2], q.shape[1])
    if codes.v is None:
        return Operands(codes.q, codes.k, None, v, codes.k_mean, shift, dtype)
    values = codes.v._replace(codes=turn(codes.v.codes))
    return Operands(codes.q, codes.k, values, None, codes.k_mean, shift, dtype)


def turn(codes: Tensor) -> Tensor:
    """Codes of values channel by channel: ``[B, S, H, D]`` -> ``[B, H, D, S']``.

    8-bit products want both operands along the axis they sum over. A product leaves a thread the
    columns 2t, 2t + 1, 2t + 8 and 2t + 9 of each 16, and the next one takes its 4t .. 4t + 3: with
    the keys of each 16 in that order, weights go from one to the other without leaving the thread
    (FlashAttention-3, arXiv 2407.08608). Behind the last token there are zeros.
    """
    batch, tokens, heads, dim = codes.shape
    whole = -(-tokens // KEYS) * KEYS
    # Not all operations know 8-bit floats, all know their bits.
    out = torch.zeros(batch, heads, dim, whole, dtype=torch.int8, device=codes.device)
    out[..., :tokens] = codes.view(torch.int8).permute(0, 2, 3, 1)
    return out.unflatten(3, (-1, 2, 4, 2)).transpose(4, 5).flatten(3).view(codes.dtype)
