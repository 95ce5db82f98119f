"""The one attention call of the package: checks its arguments and hands them to a carrier."""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import math
from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gen_accel.kernels.blocks import RULES, Blocks
from gen_accel.kernels.carrier import Call
from gen_accel.kernels.prepare import AxisPlaces, prepare, restore
from gen_accel.kernels.quant import EMULATED, P_TILE, PRECISIONS
from gen_accel.kernels.tail import Pooled, Rectified, Tail, block_scores, pool_keys, rectify

logger = logging.getLogger(__name__)

# name -> module; see carrier.Carrier for what such a module has.
_CARRIERS = {
    "gather": "gen_accel.kernels.gather",
    "flex": "gen_accel.kernels.flex",
    "triton": "gen_accel.kernels.triton.carrier",
    "reference": "gen_accel.kernels.reference",
}
_AUTO = ("triton", "gather")  # what impl="auto" tries, best first
_AUTO_ON_CPU = ("gather",)  # triton's interpreter is for tests
_QUANTISED = ("triton",)  # multiply codes; the others multiply what the codes stand for, in fp32
_ORDERING = ("triton",)  # take tokens in the model's order, with the places they go to

_DTYPE_OF = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_PRECISIONS = (*_DTYPE_OF, *PRECISIONS)
_TAILS = ("drop", "rectified", "joint")
_FP16_MAX = torch.finfo(torch.float16).max
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None = ..., *, return_lse: Literal[True],
    scale: float | None = ..., precision: str = ..., tail: str | Tail | None = ...,
    places: AxisPlaces | None = ..., impl: str = ..., check_finite: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None = ..., *,
    return_lse: Literal[False] = ..., scale: float | None = ..., precision: str = ...,
    tail: str | Tail | None = ..., places: AxisPlaces | None = ..., impl: str = ...,
    check_finite: bool = ...,
) -> Tensor: ...  # fmt: skip


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks | None = None,
    *,
    scale: float | None = None,
    precision: str = "auto",
    tail: str | Tail | None = None,
    places: AxisPlaces | None = None,
    impl: str = "auto",
    return_lse: bool = False,
    check_finite: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each query block sees only its listed key blocks.

    Under ``torch.compile(fullgraph=True)`` the carrier is one opaque operation of the graph.
    Gradients exist for dense calls and for ``impl="reference"``.

    Args:
        q: ``[batch, q_tokens, heads, head_dim]``.
        k: ``[batch, kv_tokens, heads, head_dim]``, same dtype and device.
        v: Same shape as k.
        blocks: Visible blocks, or None for dense attention.
        scale: Factor of the scores; None means ``head_dim ** -0.5``.
        precision: ``"auto"`` (at least as exact as the inputs' dtype), or the dtype to compute in:
            ``"fp32"``, ``"bf16"``, ``"fp16"``; or how to quantise: ``"int8"`` (scores), and with
            the weights and values too ``"int8+fp8"``, ``"int8+int8"``, ``"int4"`` (scores in 4
            bits, values in 8), ``"int4+int4"``; see `gen_accel.kernels.quant`. Carriers without
            such kernels compute the same numbers slowly, and say so once. The result has the
            inputs' dtype in any case.
        tail: What stands in for the blocks that are not visible: None or ``"drop"``, nothing;
            ``"joint"``, their mean keys and values; ``"rectified"``, a ratio and a shift per query
            block; or a `Pooled` or `Rectified` of your own, which is how to leave padding out or to
            keep text from being pooled.
        places: The order that blocks and tail are in, where q, k and v are in the model's. Tokens
            are put into it and the result is put back: by the kernels that read and write them
            anyway where the carrier has those, else in passes of their own.
        impl: ``"auto"``, or a carrier of `available`. A named carrier never falls back.
        return_lse: Also return the log-sum-exp.
        check_finite: Raise when q, k or v hold a NaN or an infinity (one pass over them, for
            which a GPU has to be waited for).

    Returns:
        out ``[batch, q_tokens, heads, head_dim]``; with ``return_lse`` also the natural log-sum-exp
        of the scaled scores, fp32 ``[batch, heads, q_tokens]``, stand-ins of a joint tail included.
        A query without a visible key has out = 0 and lse = -inf.

    Raises:
        ValueError: An argument is out of range, or the named carrier cannot run this call.
        TypeError: An argument is of the wrong type.
    """
    _check_tensors(q, k, v)
    if blocks is not None:
        _check_blocks(blocks, q, k)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}: it must be finite; None means head_dim ** -0.5")
    check_options(precision, impl)
    if precision in PRECISIONS:
        _check_quantised(precision, blocks, q, k, v)
    if places is not None and (
        torch.compiler.is_compiling() or tail not in (None, "drop") and isinstance(tail, str)
    ):
        ordered = (prepare(x, places).transpose(1, 2) for x in (q, k, v))
        out, lse = block_sparse_attention(
            *ordered, blocks, scale=scale, precision=precision, tail=tail, impl=impl,
            return_lse=True, check_finite=check_finite,
        )  # fmt: skip
        out, lse = _back(out, lse, places)
        return (out, lse) if return_lse else out
    stand_in = _tail(tail, q, k, v, blocks, scale)

    options = (scale, precision, impl, return_lse, check_finite)
    if torch.compiler.is_compiling():
        out, lse = _opaque(q, k, v, *_flatten(blocks), *_flatten_tail(stand_in), *options)
    else:
        out, lse = _run(q, k, v, blocks, stand_in, *options, places)
    return (out, lse) if return_lse else out


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks | None,
    tail: Tail | None = None,
    *,
    precision: str = "auto",
    impl: str = "auto",
) -> str:
    """Name of the carrier that `block_sparse_attention` runs these arguments on.

    Raises:
        ValueError: The named carrier cannot run this call.
    """
    compute, quantised = _DTYPE_OF.get(precision), PRECISIONS.get(precision)
    call = Call(q, k, v, blocks, q.shape[3] ** -0.5, compute, False, tail, quantised)
    return _choose(call, impl)


def emulates(name: str, precision: str) -> bool:
    """Whether a carrier computes this precision in wider numbers: its accuracy, not its speed."""
    return precision in PRECISIONS and name not in _QUANTISED


def orders(name: str) -> bool:
    """Whether a carrier puts tokens in order by itself, see ``places``."""
    return name in _ORDERING


def check_options(precision: str, impl: str, more: Iterable[str] = ()) -> None:
    """Raise ValueError, naming the nearest, unless these are a precision and a carrier.

    ``more`` names what a caller can run beside the carriers.
    """
    check_name("precision", precision, _PRECISIONS)
    check_name("impl", impl, ("auto", *_CARRIERS, *more))


def check_name(option: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise ValueError, naming the nearest, unless ``value`` is allowed."""
    names = tuple(allowed)
    if value in names:
        return
    nearest = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{option}={value!r}: it must be one of {', '.join(map(repr, names))}{hint}")


def available() -> dict[str, str | None]:
    """Carrier name -> None, or why it cannot run on this machine and what would help."""
    return {name: _carrier(name).missing() for name in _CARRIERS}


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks | None,
    tail: Tail | None,
    scale: float,
    precision: str,
    impl: str,
    return_lse: bool,
    check_finite: bool,
    places: AxisPlaces | None = None,
) -> tuple[Tensor, Tensor | None]:
    if check_finite:
        require_finite(q=q, k=k, v=v)
    compute, quantised = _DTYPE_OF.get(precision), PRECISIONS.get(precision)
    if compute == torch.float16 != q.dtype:
        # What is beyond its range would become infinite, and the output NaN.
        q, k, v = (x.clamp(-_FP16_MAX, _FP16_MAX) for x in (q, k, v))
    call = Call(q, k, v, blocks, scale, compute, return_lse, tail, quantised, places)
    name = _choose(call, impl)
    if impl == "auto":
        _announce(name, q.device.type)
    if emulates(name, precision):
        _announce_emulation()
    if places is None or orders(name):
        return _carrier(name).run(call)
    q, k, v = (prepare(x, places).transpose(1, 2) for x in (q, k, v))
    return _back(*_carrier(name).run(call._replace(q=q, k=k, v=v, places=None)), places)


def _back(out: Tensor, lse: Tensor | None, places: AxisPlaces) -> tuple[Tensor, Tensor | None]:
    """A result ``[B, S, H, D]`` and ``[B, H, S]``, put into the model's order."""
    if lse is not None:
        lse = restore(lse[..., None], places)[..., 0].transpose(1, 2)
    return restore(out.transpose(1, 2), places), lse


def _choose(call: Call, impl: str) -> str:
    auto = _AUTO_ON_CPU if call.q.device.type == "cpu" else _AUTO
    for name in auto if impl == "auto" else (impl,):
        carrier = _carrier(name)
        limit = carrier.missing() or carrier.limits(call)
        if limit is None:
            return name
    raise ValueError(f"impl={impl!r}: {limit}")


def _carrier(name: str) -> Any:
    return importlib.import_module(_CARRIERS[name])


@functools.cache
def _announce(name: str, device: str) -> None:
    logger.info("block_sparse_attention runs on carrier %r on %s", name, device)


@functools.cache
def _announce_emulation() -> None:
    logger.warning("quantised attention is %s; gen-accel doctor lists what runs how", EMULATED)


# ---- torch.compile: graphs carry tensors and numbers, so a Blocks travels in pieces --------------


def _flatten(blocks: Blocks | None) -> tuple[list[Tensor], list[int]]:
    if blocks is None:
        return [], []
    lists = [blocks.full_kv_num_blocks, blocks.full_kv_indices]
    if blocks.kv_num_blocks is not None and blocks.kv_indices is not None:
        lists += [blocks.kv_num_blocks, blocks.kv_indices]
    return lists, [blocks.q_len, blocks.kv_len, blocks.block_q, blocks.block_kv, blocks.rule]


def _unflatten(lists: list[Tensor], sizes: list[int]) -> Blocks | None:
    if not lists:
        return None
    full, partial, rule = lists[:2], lists[2:], sizes[4]
    return Blocks(*full, *sizes[:4], *(partial or (None, None)), RULES[rule] if rule else None)


def _flatten_tail(tail: Tail | None) -> tuple[list[Tensor], int]:
    if tail is None:
        return [], 0
    if isinstance(tail, Rectified):
        return [tail.ratio, tail.shift], 0
    pools = [tail.key, tail.value, tail.bias]
    return pools if tail.variance is None else [*pools, tail.variance], tail.per_block


def _unflatten_tail(pools: list[Tensor], per_block: int) -> Tail | None:
    if not pools:
        return None
    if per_block == 0:
        return Rectified(*pools)
    return Pooled(*pools[:3], per_block, *pools[3:])


@torch.library.custom_op("gen_accel::block_sparse_attention", mutates_args=())
def _opaque(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: list[Tensor],
    sizes: list[int],
    pools: list[Tensor],
    per_block: int,
    scale: float,
    precision: str,
    impl: str,
    return_lse: bool,
    check_finite: bool,
) -> tuple[Tensor, Tensor]:
    blocks, tail = _unflatten(lists, sizes), _unflatten_tail(pools, per_block)
    out, lse = _run(q, k, v, blocks, tail, scale, precision, impl, return_lse, check_finite)
    empty = q.new_empty(0, dtype=torch.float32)
    return out.contiguous(), empty if lse is None else lse


@_opaque.register_fake
def _(q, k, v, lists, sizes, pools, per_block, scale, precision, impl, return_lse, check_finite):
    batch, tokens, heads, _ = q.shape
    lse_shape = (batch, heads, tokens) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


# ---- argument checks -----------------------------------------------------------------------------


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}: it must be a torch.Tensor")
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: it must be [batch, tokens, heads, head_dim]; "
                "unflatten the heads first"
            )
        if min(x.shape) < 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: no axis may be empty")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} is {x.dtype}: it must be fp64, fp32, bf16 or fp16; cast it")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, q is {q.dtype}: cast them to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: move them to one device")
    if k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape")
    for axis, name in ((0, "batch"), (2, "heads"), (3, "head_dim")):
        if q.shape[axis] != k.shape[axis]:
            raise ValueError(
                f"{name} of q is {q.shape[axis]}, of k {k.shape[axis]}: they must be equal; "
                "tensors are [batch, tokens, heads, head_dim], repeat k and v for grouped heads"
            )


def _check_blocks(blocks: Blocks, q: Tensor, k: Tensor) -> None:
    if not isinstance(blocks, Blocks):
        raise TypeError(
            f"blocks is a {type(blocks).__name__}: it must be a Blocks; see Blocks.from_mask"
        )
    for name, length, x in (("q_len", blocks.q_len, q), ("kv_len", blocks.kv_len, k)):
        if length != x.shape[1]:
            raise ValueError(
                f"{name}={length} in blocks, but the tensor has {x.shape[1]} tokens: "
                "plan the blocks for this length"
            )
    for lists in (blocks.full_kv_indices, blocks.kv_indices):
        if lists is None:
            continue
        if lists.shape[0] not in (1, q.shape[0]) or lists.shape[1] not in (1, q.shape[2]):
            raise ValueError(
                f"block lists for {lists.shape[0]} samples and {lists.shape[1]} heads, q has "
                f"{q.shape[0]} and {q.shape[2]}: each must be equal or 1"
            )
        if lists.device != q.device:
            raise ValueError(
                f"blocks are on {lists.device}, q on {q.device}: use blocks.to(q.device)"
            )


def _tail(
    tail: str | Tail | None, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None, scale: float
) -> Tail | None:
    """The tail's tensors, checked; None where nothing is hidden or nothing stands in."""
    if isinstance(tail, (Pooled, Rectified)):
        if blocks is None:
            raise ValueError(
                "a tail stands in for hidden blocks, and without blocks none is hidden"
            )
        _check_tail(tail, q, k, blocks)
        return tail
    if tail is not None:
        check_name("tail", tail, _TAILS)
    if blocks is None or tail is None or tail == "drop":
        return None
    if tail == "joint":
        return pool_keys(k, v, blocks.block_kv)
    sizes = (blocks.block_q, blocks.block_kv)
    scores = block_scores(q, k, *sizes, pooled=k.shape[1], scale=scale)
    return rectify(v, blocks, scores, pooled=k.shape[1])


def _check_tail(tail: Tail, q: Tensor, k: Tensor, blocks: Blocks) -> None:
    batch, _, heads, dim = q.shape
    expected: dict[str, tuple[int, ...]]
    if isinstance(tail, Rectified):
        rows = blocks.num_q_blocks
        expected = {"ratio": (batch, heads, rows), "shift": (batch, heads, rows, dim)}
    else:
        number = tail.bias.numel()
        if number % tail.per_block or number // tail.per_block > blocks.num_kv_blocks:
            raise ValueError(
                f"tail has {number} stand-ins, {tail.per_block} per block: they must fill at most "
                f"the {blocks.num_kv_blocks} key blocks; see pool_keys"
            )
        shape = (batch, number, heads, dim)
        expected = {"bias": (number,), "key": shape, "value": shape}
        if tail.variance is not None:
            expected["variance"] = shape
    for name, shape in expected.items():
        found = getattr(tail, name)
        if tuple(found.shape) != shape:
            raise ValueError(f"{name} of the tail is {tuple(found.shape)}: it must be {shape}")
        if found.device != q.device:
            raise ValueError(f"{name} of the tail is on {found.device}, q on {q.device}: move it")


def _check_quantised(
    precision: str, blocks: Blocks | None, q: Tensor, k: Tensor, v: Tensor
) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            f"precision={precision!r}: rounding has no gradient; call it under torch.no_grad(), "
            "or use precision='auto'"
        )
    if blocks is None or PRECISIONS[precision].pv is None:
        return
    if P_TILE % blocks.block_kv and blocks.block_kv % P_TILE:
        raise ValueError(
            f"precision={precision!r} with block_kv={blocks.block_kv}: weights are rounded by "
            f"tiles of {P_TILE} keys, so a block divides {P_TILE} or is a multiple of it; plan "
            "with block=64 or 128, or use precision='int8'"
        )


def require_finite(where: str = "", **tensors: Tensor) -> None:
    """Raise ValueError, naming the tensor, if one holds a NaN or an infinity.

    Args:
        where: What the message begins with, such as ``"layer 3: "``.
        **tensors: By name.
    """
    for name, x in tensors.items():
        bad = x.numel() - int(torch.isfinite(x).sum())
        if bad:
            raise ValueError(
                f"{where}{name} holds {bad} NaN or infinite values of {x.numel()}: attention would "
                "spread them to every token; look for an overflow before this call"
            )
