"""What stands in for the key blocks that a query block does not see.

Both tails come from pooled statistics, never from the hidden keys themselves. *Joint*: every hidden
block is scored as a few mean keys inside the same softmax, with its multiplicity as a bias (the
one normaliser of PISA and Sol-Attn). *Rectified*: the sparse output is scaled and shifted per query
block, ``o = R o + C`` (Rectified SpaAttn, arXiv 2511.19835; our reconstruction from its public
code). Either works with any block lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.pool import group_means

GAPR = ("code", "paper")
_NUMBERS = 1 << 20  # scores alive at a time, to stay in the cache of a CPU
_NUMBERS_ON_GPU = 1 << 26  # 256 MB in fp32; with fewer, it would wait for launches


@dataclass(frozen=True, eq=False)
class Pooled:
    """Stand-ins: keys with a bias, each visible exactly where its key block is not listed.

    Query i scores stand-in c as ``scale q_i . key_c + bias_c``, plus
    ``scale^2 / 2 * (q_i * q_i) . variance_c`` where variances are given, in one softmax with the
    visible keys. The log-sum-exp of the call includes them.

    Attributes:
        key: ``[B, M, H, D]`` mean keys, any float dtype.
        value: ``[B, M, H, D]`` mean values, same dtype.
        bias: fp32 ``[M]``, log of the number of keys each stands for; -inf is never visible.
        per_block: Stand-ins per key block: number c belongs to key block ``c // per_block``. Key
            blocks beyond ``M / per_block`` have none.
        variance: ``[B, M, H, D]`` variances of the keys per channel, or None.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    per_block: int = 1
    variance: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Rectified:
    """An epilogue: out = ratio * out + shift. The log-sum-exp of the call is the sparse one.

    Attributes:
        ratio: fp32 ``[B, H, nQ]``, one number per query block.
        shift: fp32 ``[B, H, nQ, D]``, one vector per query block.
    """

    ratio: Tensor
    shift: Tensor


Tail = Pooled | Rectified


def pool_keys(
    k: Tensor,
    v: Tensor,
    block: int,
    *,
    per_block: int = 1,
    real: Tensor | None = None,
    variance: bool = False,
) -> Pooled:
    """Stand-ins of the joint tail.

    Args:
        k: ``[B, S, H, D]``, the keys that may be hidden: pass a slice to leave text out.
        v: ``[B, S, H, D]``.
        block: Tokens per key block.
        per_block: Stand-ins per key block; divides ``block``.
        real: bool ``[S]``, keys that exist (padding places of a tile order do not); None: all.
        variance: Also measure the keys' variances.

    Raises:
        ValueError: ``per_block`` does not divide ``block``.
    """
    if per_block < 1 or block % per_block:
        raise ValueError(
            f"per_block={per_block}: it must divide the block of {block} keys; "
            "use a power of two up to it"
        )
    size = block // per_block
    key, count, _, second = group_means(k, size, real, variance=variance)
    value = group_means(v, size, real).mean
    # The last block may end in the middle of its groups; those behind the end are never visible.
    missing = -key.shape[1] % per_block
    bias = torch.log(count)
    if missing:
        pad = (0, 0, 0, 0, 0, missing)
        key, value = (F.pad(x, pad) for x in (key, value))
        second = None if second is None else F.pad(second, pad)
        bias = F.pad(bias, (0, missing), value=-math.inf)
    return Pooled(key, value, bias, per_block, second)


@dataclass(frozen=True, eq=False)
class BlockScores:
    """How much of the softmax each key block would get if blocks were as uniform as their means.

    Attributes:
        video: fp32 ``[B, H, nQ, N]``, estimated softmax mass of each pooled key block.
        text: fp32 ``[B, H, nQ]``, estimated mass of all keys behind them, scored one by one.
        gain: fp32 ``[B, H, nQ, N]`` or None, GAPR's gain ``|mean q . mean k|``.
        error: fp32, same shape or None, GAPR's error.
    """

    video: Tensor
    text: Tensor
    gain: Tensor | None = None
    error: Tensor | None = None


def block_scores(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_kv: int,
    *,
    pooled: int,
    scale: float,
    parts: int = 1,
    real: Tensor | None = None,
    gapr: bool = False,
) -> BlockScores:
    """Isolated-pooling softmax (IPAR) over ``[pooled logits + log n, logits of single keys]``.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Skv, H, D]``; its first ``pooled`` keys are pooled, the others are text.
        block_q: Queries per block.
        block_kv: Keys per block.
        pooled: Keys to pool.
        scale: Factor of the scores.
        parts: Means per block, on either side. With more than one, every part of a query block has
            a softmax of its own over the parts of the key blocks; masses are summed over a key
            block and averaged over a query block. (The sum of exponentials makes it the
            log-sum-exp score of the sub-blocks, normalised row by row.)
        real: bool ``[pooled]``, keys that exist; None: all. It also says which queries exist when
            the two sequences share their video tokens.
        gapr: Also measure gain and error, block by block.

    Raises:
        ValueError: ``parts`` does not divide the blocks.
    """
    if block_q % parts or block_kv % parts:
        raise ValueError(
            f"parts={parts}: it must divide blocks of {block_q} queries and {block_kv} keys"
        )
    real_q = None
    if real is not None:
        real_q = torch.ones(q.shape[1], dtype=torch.bool, device=q.device)
        real_q[:pooled] = real
    gain = error = None
    if gapr:
        gain, error = _gain_and_error(q, k[:, :pooled], block_q, block_kv, real_q, real)
    rows, columns = -(-q.shape[1] // block_q), -(-pooled // block_kv)
    q_mean, q_count = _parts(q, block_q // parts, rows * parts, real_q)
    k_mean, k_count = _parts(k[:, :pooled], block_kv // parts, columns * parts, real)
    key = torch.cat([k_mean, k[:, pooled:].to(k_mean.dtype)], 1)
    key = (scale * key).permute(0, 2, 3, 1)
    bias = torch.cat([torch.log(k_count), k_count.new_zeros(k.shape[1] - pooled)]).to(key.dtype)
    queries = q_mean.transpose(1, 2)
    # A part that holds no query (padding, the ragged end) has no say in its block's mean.
    share = (q_count > 0).to(key.dtype).view(rows, parts)
    share = share / share.sum(-1, keepdim=True).clamp_min(1)
    video = queries.new_empty(*queries.shape[:2], rows, columns)
    text = queries.new_empty(*queries.shape[:2], rows)
    step = _rows_at_a_time(queries[:, :, 0, 0].numel() * bias.numel() * parts, q.device)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        mass = queries[:, :, first * parts : (first + step) * parts] @ key
        mass = mass.add_(bias).softmax(-1)
        if parts > 1:
            mass = mass.unflatten(2, (-1, parts)).mul_(share[part, :, None]).sum(3)
        text[:, :, part] = mass[..., columns * parts :].sum(-1)
        mass = mass[..., : columns * parts]
        video[:, :, part] = mass.unflatten(-1, (-1, parts)).sum(-1) if parts > 1 else mass
    return BlockScores(video, text, gain, error)


def _rows_at_a_time(scores: int, device: torch.device) -> int:
    """Query blocks that are scored together, where each has that many scores."""
    return max(1, (_NUMBERS if device.type == "cpu" else _NUMBERS_ON_GPU) // scores)


def _parts(x: Tensor, size: int, number: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means and counts, filled up with empty groups to ``number``."""
    mean, count, *_ = group_means(x, size, real)
    missing = number - len(count)
    return F.pad(mean, (0, 0, 0, 0, 0, missing)), F.pad(count, (0, missing))


def _gain_and_error(
    q: Tensor, k: Tensor, block_q: int, block_kv: int, real_q: Tensor | None, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """GAPR's |mean q . mean k| against |dev q . mean k| + |mean q . dev k|, per block pair."""
    q_mean, _, q_dev, _ = group_means(q, block_q, real_q, deviation=True)
    k_mean, _, k_dev, _ = group_means(k, block_kv, real, deviation=True)
    assert q_dev is not None and k_dev is not None
    rows = [x.transpose(1, 2) for x in (q_mean, q_dev)]
    columns = [x.permute(0, 2, 3, 1) for x in (k_mean, k_dev)]
    error = (rows[1] @ columns[0]).abs_() + (rows[0] @ columns[1]).abs_()
    return (rows[0] @ columns[0]).abs_(), error


def rectify(
    v: Tensor, blocks: Blocks, scores: BlockScores, *, pooled: int, gapr: str | None = None,
    real: Tensor | None = None,
) -> Rectified:  # fmt: skip
    """Ratio and shift of the rectified tail.

    Args:
        v: ``[B, Skv, H, D]``.
        blocks: What the call sees; the same lists the call is made with.
        scores: Of these queries and keys.
        pooled: Keys that were pooled.
        gapr: None compensates every hidden block. ``"code"`` compensates those whose gain exceeds
            their error and gives the mass of the others to the visible keys, as the authors' code
            does; ``"paper"`` drops that mass, as their figure says, so that weights sum to less
            than one.
        real: bool ``[pooled]``, keys that exist; None: all.

    Raises:
        ValueError: ``gapr`` is unknown, or the scores were made without it.
    """
    if gapr not in (None, *GAPR):
        raise ValueError(f"gapr={gapr!r}: it is None, 'code' or 'paper'")
    hidden = ~blocks.mask()[..., : scores.video.shape[-1]]
    used = hidden
    if gapr is not None:
        if scores.gain is None or scores.error is None:
            raise ValueError(f"gapr={gapr!r} needs block_scores(..., gapr=True)")
        used = hidden & (scores.gain > scores.error)
    mass = scores.video * used
    value = group_means(v[:, :pooled], blocks.block_kv, real).mean.transpose(1, 2)
    lost = scores.video * hidden if gapr == "paper" else mass
    ratio = (1 - lost.sum(-1)).clamp_min(0)
    return Rectified(ratio, mass @ value.to(mass.dtype))


def stand_in_attention(
    q: Tensor, pooled: Pooled, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the visible stand-ins alone, for carriers that compute the two parts apart.

    Args:
        q: ``[B, H, Sq, D]``, in the dtype to compute in.
        pooled: The stand-ins.
        blocks: Lists of the call.
        scale: Factor of the scores.

    Returns:
        out ``[B, H, Sq, D]`` and its log-sum-exp ``[B, H, Sq]``, both in q's dtype; 0 and -inf for
        a query that sees no stand-in.
    """
    key, value = (x.transpose(1, 2).to(q.dtype) for x in (pooled.key, pooled.value))
    key = (scale * key).mT
    square = None
    if pooled.variance is not None:
        square = (scale**2 / 2 * pooled.variance.transpose(1, 2).to(q.dtype)).mT
    number = pooled.bias.numel()
    listed = blocks.mask()[..., : number // pooled.per_block]
    bias = torch.where(listed[..., None], -torch.inf, pooled.bias.view(-1, pooled.per_block))
    bias = bias.flatten(-2).to(q.dtype).expand(*q.shape[:2], -1, -1)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    rows = _rows_at_a_time(q.shape[0] * q.shape[1] * number * blocks.block_q, q.device)
    for first in range(0, blocks.num_q_blocks, rows):
        part = slice(first * blocks.block_q, (first + rows) * blocks.block_q)
        x = q[:, :, part]
        scores = x @ key
        if square is not None:
            scores += x.square() @ square
        whole = x.shape[2] // blocks.block_q
        at = whole * blocks.block_q
        scores[:, :, :at].unflatten(2, (whole, blocks.block_q)).add_(
            bias[:, :, first : first + whole, None]
        )
        scores[:, :, at:].add_(bias[:, :, first + whole : first + whole + 1])
        peak = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(q.dtype).min)
        total = scores.sub_(peak).exp_().sum(-1, keepdim=True)
        out[:, :, part] = (scores @ value).div_(total.clamp_min(torch.finfo(q.dtype).tiny))
        lse[:, :, part] = (total.log_() + peak)[..., 0]
    return out, lse


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from that over each; shapes as they come."""
    both = torch.logaddexp(lse, more_lse)
    # The share of the first set; where neither has a key, whatever is finite.
    share = torch.exp(lse - both).nan_to_num_(0.0)[..., None]
    return torch.lerp(more, out, share), both


def apply_tail(
    out: Tensor, lse: Tensor | None, q: Tensor, tail: Tail, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Finish what a carrier computed without the tail.

    Args:
        out: ``[B, H, Sq, D]``, at least fp32 where the tail is joint.
        lse: ``[B, H, Sq]``; needed where the tail is joint.
        q: ``[B, H, Sq, D]``.
        tail: The tail.
        blocks: Lists of the call.
        scale: Factor of the scores.
    """
    if isinstance(tail, Rectified):
        row = torch.arange(out.shape[2], device=out.device) // blocks.block_q
        ratio, shift = tail.ratio[:, :, row, None], tail.shift[:, :, row]
        return torch.addcmul(shift.to(out.dtype), ratio.to(out.dtype), out), lse
    assert lse is not None
    return merge(out, lse, *stand_in_attention(q.to(out.dtype), tail, blocks, scale))
