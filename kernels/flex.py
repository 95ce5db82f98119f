"""FlexAttention as a carrier: compiled, never its uncompiled N x N form.

The first call of each shape compiles for some seconds. Quantised scores are emulated; rounded
weights cannot be, for FlexAttention rounds nothing between its two products.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.carrier import Call
from gen_accel.kernels.quant import dequantise, shift_stand_ins
from gen_accel.kernels.tail import Pooled, apply_tail

_SHAPES = 64  # that one process may compile; torch's own limit of 8 is soon reached

# Query lists per key block serve the backward pass only; torch before 2.10 always makes them.
_parameters = inspect.signature(BlockMask.from_kv_blocks).parameters
_FORWARD_ONLY: dict[str, Any] = (
    {"compute_q_blocks": False} if "compute_q_blocks" in _parameters else {}
)

_block_masks: weakref.WeakKeyDictionary[Blocks, BlockMask] = weakref.WeakKeyDictionary()


@functools.cache
def missing() -> str | None:
    """What torch.compile lacks here."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs triton for this GPU: pip install triton"
        return None
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # depends on the platform
        return (
            f"torch.compile finds no C++ compiler ({type(error).__name__}): "
            "install g++ or clang, or use impl='gather'"
        )
    return None


def limits(call: Call) -> str | None:
    """What FlexAttention cannot do."""
    if call.precision is not None and (call.precision.pv is not None or call.precision.smooth_q):
        return (
            "FlexAttention cannot round weights between its two products: use precision='int8', "
            "or impl='gather'"
        )
    dtype = call.compute or call.q.dtype
    if dtype == torch.float64:
        return "FlexAttention does not take fp64: use impl='gather'"
    if call.q.device.type == "cpu":
        if call.return_lse or isinstance(call.tail, Pooled):
            return "FlexAttention gives no log-sum-exp on a CPU: use impl='gather'"
        if torch.is_grad_enabled() and any(x.requires_grad for x in call[:3]):
            return (
                "FlexAttention has no gradient on a CPU: "
                "call it under torch.no_grad(), or use impl='reference'"
            )
    return None


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """See `carrier.Carrier.run`."""
    tail, shift = call.tail, 0.0
    q, k, v = (x.to(call.compute or x.dtype) for x in call[:3])
    if call.precision is not None:
        q, k, v, _, shift, k_mean = dequantise(q, k, v, call.scale, call.precision)
        if isinstance(tail, Pooled):
            tail = shift_stand_ins(tail, k_mean)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if call.blocks is None else _block_mask(call.blocks)
    with torch._dynamo.config.patch(recompile_limit=_SHAPES):
        want_lse = call.return_lse or isinstance(call.tail, Pooled)
        out, lse = _compiled()(q, k, v, mask, call.scale, want_lse)
    if tail is not None and call.blocks is not None:
        out, lse = apply_tail(out.float(), lse, q, tail, call.blocks, call.scale)
    out = out.transpose(1, 2).to(call.q.dtype)
    return out, lse + shift if call.return_lse and lse is not None else None


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    # Without fullgraph, an exceeded limit would silently run the uncompiled form. With dynamic
    # shapes the C++ code does not compile (torch 2.13).
    return torch.compile(_attend, dynamic=False, fullgraph=True)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    if not return_lse:
        return flex_attention(q, k, v, block_mask=mask, scale=scale), None
    out, lse = flex_attention(q, k, v, block_mask=mask, scale=scale, return_lse=True)
    return out, lse


def _block_mask(blocks: Blocks) -> BlockMask:
    if blocks not in _block_masks:
        full, partial = blocks.full_kv_num_blocks, blocks.kv_num_blocks
        full_lists = _widen(blocks.full_kv_indices, blocks.num_kv_blocks)
        if partial is None or blocks.kv_indices is None:
            partial, partial_lists = torch.zeros_like(full), torch.zeros_like(full_lists)
        else:
            partial_lists = _widen(blocks.kv_indices, blocks.num_kv_blocks)
        _block_masks[blocks] = BlockMask.from_kv_blocks(
            partial,
            partial_lists,
            full,
            full_lists,
            BLOCK_SIZE=(blocks.block_q, blocks.block_kv),
            mask_mod=blocks.mask_mod,
            seq_lengths=(blocks.q_len, blocks.kv_len),
            **_FORWARD_ONLY,
        )
    return _block_masks[blocks]


def _widen(lists: Tensor, columns: int) -> Tensor:
    """FlexAttention wants a column for every key block, listed or not."""
    return F.pad(lists, (0, columns - lists.shape[-1])).contiguous()
