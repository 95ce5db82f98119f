"""The numbers of quantised attention: one contract that every carrier keeps.

Scores: ``(q - mean of its group) / scale`` and ``(k - mean of all keys) / scale`` rounded to
integers, one scale per group of neighbouring tokens, multiplied as integers. Output: the weights of
each tile of keys, relative to the tile's own maximum, rounded; values rounded with one scale per
channel; multiplied as integers, summed in fp32 over the tiles. The denominator sums the rounded
weights. Tokens are grouped as they stand in the call, so quantisation comes after reordering.

Integer products below 2^24 are exact in fp32: on a CPU, fp32 matrix products of the codes *are* the
integer products.

Sources: SageAttention (arXiv 2410.02367, 2411.10958) for groups and smoothing, PAROAttention (arXiv
2506.16054) for integer weights in blocks. Weights relative to the maximum of (row, tile) are ours:
finer than either, and free, because the partial product is rescaled in any case.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.kernels.pool import group_means
from gen_accel.kernels.tail import Pooled

P_TILE = 64  # keys of one tile of weights, or the key block where that is smaller
LEVELS = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # largest code of q, k and v
P_LEVELS = {"int8": 127.0, "int4": 15.0, "fp8": 448.0}  # weights have no sign: 4 bits count to 15
TINY = 2.0**-119  # in place of the maximum of a group of zeros: LEVELS / TINY is finite

EMULATED = "emulated: accuracy only, no speed"


class Precision(NamedTuple):
    """Which numbers a quantised call multiplies, and what shares a scale.

    Attributes:
        qk: Codes of q and k: ``"int8"`` or ``"int4"``.
        pv: Codes of weights and values: ``"fp8"`` (e4m3), ``"int8"``, ``"int4"``, or None: as in a
            call that is not quantised.
        q_rows: Queries that share a scale.
        k_rows: Keys that share a scale.
        p_scale: Weights are relative to the maximum ``"tile"``: of a row within a tile of keys;
            ``"row"``: of the whole row, what SageAttention's running maximum ends at; ``"block"``:
            of 64 rows by one tile, after the softmax, as PAROAttention. Only the reference knows
            the last two.
        v_scale: Values share a scale per channel over ``"channel"``: all keys; ``"block"``:
            ``k_rows`` keys.
        smooth_k: Subtract the mean of all keys, which no weight depends on.
        smooth_q: Subtract the mean of each group of queries; its scores come from unrounded keys.
    """

    qk: str = "int8"
    pv: str | None = None
    q_rows: int = 32
    k_rows: int = 64
    p_scale: str = "tile"
    v_scale: str = "channel"
    smooth_k: bool = True
    smooth_q: bool = False


PRECISIONS = {
    "int8": Precision(),
    "int8+fp8": Precision(pv="fp8"),
    "int8+int8": Precision(pv="int8", v_scale="block"),
    "int4": Precision("int4", "int8", v_scale="block", smooth_q=True),
    "int4+int4": Precision("int4", "int4", v_scale="block", smooth_q=True),
}


class Codes(NamedTuple):
    """A quantised tensor ``[B, S, H, D]``.

    Attributes:
        codes: Same shape; int8 (codes of 4 bits too) or float8_e4m3fn.
        scale: fp32 ``[B, H, groups]``, of values ``[B, H, groups, D]``.
        rows: Tokens per group.
    """

    codes: Tensor
    scale: Tensor
    rows: int

    def dequantise(self) -> Tensor:
        """fp32 ``[B, S, H, D]``."""
        scale = self.scale if self.scale.ndim == 4 else self.scale[..., None]
        return _ungroup(_group(self.codes, self.rows) * scale[:, :, :, None], self.codes.shape[1])


class Quantised(NamedTuple):
    """The tensors of one call.

    Attributes:
        q: Codes of the queries, less ``q_mean``.
        k: Codes of the keys, less ``k_mean``.
        v: Codes of the values, or None where they are not quantised.
        q_mean: fp32 ``[B, H, groups, D]``, or None.
        k_mean: fp32 ``[B, H, 1, D]``, or None.
    """

    q: Codes
    k: Codes
    v: Codes | None
    q_mean: Tensor | None = None
    k_mean: Tensor | None = None

    def queries(self) -> Tensor:
        """fp32 ``[B, S, H, D]``: what the queries were rounded to, their means included."""
        out = self.q.dequantise()
        if self.q_mean is None:
            return out
        return out + _ungroup(
            self.q_mean[:, :, :, None].expand(-1, -1, -1, self.q.rows, -1), out.shape[1]
        )


def quantise(q: Tensor, k: Tensor, v: Tensor, precision: Precision) -> Quantised:
    """Codes of one call's tensors, ``[B, S, H, D]``, tokens in the order they are attended in."""
    q_mean = _mean(q, precision.q_rows) if precision.smooth_q else None
    k_mean = _mean(k, k.shape[1]) if precision.smooth_k else None
    values = None
    if precision.pv is not None:
        rows = precision.k_rows if precision.v_scale == "block" else v.shape[1]
        values = quantise_values(v, precision.pv, rows)
    return Quantised(
        quantise_rows(q, precision.qk, precision.q_rows, q_mean),
        quantise_rows(k, precision.qk, precision.k_rows, k_mean),
        values,
        q_mean,
        k_mean,
    )


def quantise_rows(x: Tensor, kind: str, rows: int, mean: Tensor | None = None) -> Codes:
    """Codes with one scale per head and group of tokens: round to nearest, even on a tie.

    Args:
        x: ``[B, S, H, D]``.
        kind: ``"int8"`` or ``"int4"``.
        rows: Tokens per group; the last group is as short as it is.
        mean: fp32 ``[B, H, groups, D]``, or with one group for all, subtracted before.
    """
    groups = _group(x, rows)
    if mean is not None:
        groups = groups - mean[:, :, :, None]
        groups.flatten(2, 3)[:, :, x.shape[1] :] = 0  # no token there has a say in a maximum
    peak = groups.abs().amax((-1, -2)).clamp_min(TINY)
    codes = torch.round(groups * (LEVELS[kind] / peak)[..., None, None]).to(torch.int8)
    return Codes(_ungroup(codes, x.shape[1]), peak / LEVELS[kind], rows)


def quantise_values(v: Tensor, kind: str, rows: int) -> Codes:
    """Codes with one scale per head, group of tokens and channel."""
    groups = _group(v, rows)
    peak = groups.abs().amax(3).clamp_min(TINY)
    codes = groups * (LEVELS[kind] / peak)[:, :, :, None]
    if kind == "fp8":
        # A product may come out a unit above the largest number, and there is nothing above it.
        codes = codes.clamp(-LEVELS[kind], LEVELS[kind]).to(torch.float8_e4m3fn)
    else:
        codes = torch.round(codes).to(torch.int8)
    return Codes(_ungroup(codes, v.shape[1]), peak / LEVELS[kind], rows)


def round_weights(weights: Tensor, kind: str) -> Tensor:
    """Weights in 0..1 as codes, which stay fp32: 0..`P_LEVELS`."""
    codes = weights * P_LEVELS[kind]
    return codes.to(torch.float8_e4m3fn).to(weights.dtype) if kind == "fp8" else torch.round(codes)


class Dequantised(NamedTuple):
    """What the codes of a call stand for, in fp32: ordinary tensors with the same scores.

    Attributes:
        q: ``[B, Sq, H, D]``, or twice as many channels where queries are smoothed.
        k: ``[B, Skv, H, D]``, channels as ``q``.
        v: ``[B, Skv, H, D]``.
        queries: ``[B, Sq, H, D]``, what stand-ins are scored with.
        shift: What the log-sum-exp lacks, see `score_shift`.
        k_mean: See `Quantised`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    queries: Tensor
    shift: Tensor | float
    k_mean: Tensor | None


def dequantise(q: Tensor, k: Tensor, v: Tensor, scale: float, precision: Precision) -> Dequantised:
    """Tensors for carriers that do not multiply codes; arguments as `quantise`."""
    codes = quantise(q, k, v, precision)
    q_values, k_values, queries = codes.q.dequantise(), codes.k.dequantise(), codes.queries()
    if codes.q_mean is not None:
        # (q - mean) . codes of k + mean . k: the second product's keys are not rounded.
        smooth = k.float() if codes.k_mean is None else k - codes.k_mean.transpose(1, 2)
        q_values = torch.cat([q_values, queries - q_values], -1)
        k_values = torch.cat([k_values, smooth], -1)
    values = v.float() if codes.v is None else codes.v.dequantise()
    shift = score_shift(q, codes.k_mean, scale)
    return Dequantised(q_values, k_values, values, queries, shift, codes.k_mean)


def score_shift(q: Tensor, k_mean: Tensor | None, scale: float) -> Tensor | float:
    """What smoothing the keys took from every score of a query, fp32 ``[B, H, Sq]``.

    No weight depends on it; a log-sum-exp that is returned has to have it back.
    """
    if k_mean is None:
        return 0.0
    return scale * (q.transpose(1, 2).float() * k_mean).sum(-1)


def shift_stand_ins(pooled: Pooled, k_mean: Tensor | None) -> Pooled:
    """Stand-ins whose scores compare with those of smoothed keys."""
    if k_mean is None:
        return pooled
    return dataclasses.replace(pooled, key=pooled.key - k_mean.transpose(1, 2).to(pooled.key.dtype))


def _group(x: Tensor, rows: int) -> Tensor:
    """``[B, S, H, D]`` -> fp32 ``[B, H, groups, rows, D]``, zeros behind the end."""
    x = x.transpose(1, 2).float()
    x = F.pad(x, (0, 0, 0, -x.shape[2] % rows))
    return x.unflatten(2, (-1, rows))


def _ungroup(groups: Tensor, tokens: int) -> Tensor:
    return groups.flatten(2, 3)[:, :, :tokens].transpose(1, 2)


def _mean(x: Tensor, rows: int) -> Tensor:
    """fp32 ``[B, H, groups, D]``."""
    return group_means(x, rows).mean.transpose(1, 2).float()
