"""The Triton carrier: `launch.attend` behind the checks that a carrier makes."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from gen_accel.kernels.carrier import Call
from gen_accel.kernels.operands import operands
from gen_accel.kernels.prepare import prepare

_HALF = (torch.bfloat16, torch.float16)
_SMALLEST, _LARGEST = 16, 1024  # mask blocks; above 128, powers of two


@functools.cache
def missing() -> str | None:
    """Triton, or a GPU, or Triton's interpreter in place of one."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton, or use impl='gather'"
    if not torch.cuda.is_available() and not _interpreted():
        return "no CUDA or ROCm GPU: use impl='gather'"
    return None


def limits(call: Call) -> str | None:
    """What the kernel cannot do."""
    if call.q.device.type != "cuda" and not _interpreted():
        return f"tensors on {call.q.device.type}: move them to a GPU, or use impl='gather'"
    capability = _capability(call.q.device)
    if capability is not None and capability < (8, 0):
        number = ".".join(map(str, capability))
        return f"a GPU of capability {number}: it needs 8.0 (Ampere); use impl='gather'"
    dtype = call.compute or call.q.dtype
    if call.precision is not None:
        limit = _precision_limits(call)
        if limit is not None:
            return limit
    elif dtype not in _HALF:
        name = str(dtype).removeprefix("torch.")
        return f"{name}: it computes in half precision; set precision='bf16', or impl='gather'"
    if call.q.shape[3] > 256:
        return f"head_dim={call.q.shape[3]}: it takes at most 256; use impl='gather'"
    if torch.is_grad_enabled() and any(x.requires_grad for x in call[:3]):
        return "no gradient: call it under torch.no_grad(), or use impl='reference'"
    return None if call.blocks is None else _block_limits(call)


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """See `carrier.Carrier.run`."""
    from gen_accel.kernels.triton.launch import attend, attend_codes

    options = {"tail": call.tail, "return_lse": call.return_lse, "places": call.places}
    if call.precision is not None:
        codes = operands(*call[:3], call.precision, call.places)
        return attend_codes(codes, call.blocks, call.scale, **options)
    q, k, v = (x.to(call.compute or x.dtype) for x in call[:3])
    if call.places is not None:
        q, k, v = (prepare(x, call.places).transpose(1, 2) for x in (q, k, v))
    out, lse = attend(q, k, v, call.blocks, call.scale, **options)
    return out.to(call.q.dtype), lse


def _precision_limits(call: Call) -> str | None:
    precision = call.precision
    assert precision is not None
    if precision.qk != "int8" or precision.pv == "int4" or precision.smooth_q:
        return "int4: no kernel, Hopper and Blackwell have no tensor core for it; use impl='gather'"
    if precision.p_scale != "tile":
        return f"p_scale={precision.p_scale!r}: only the reference has it; use impl='reference'"
    if call.q.dtype == torch.float64:
        return "float64: it quantises what fp32 holds; cast the inputs"
    if call.blocks is not None and call.blocks.block_kv & (call.blocks.block_kv - 1):
        return (
            f"block_kv={call.blocks.block_kv} with quantised keys: scales are those of 64 keys, "
            "which such a block cuts; plan with block=128, or use precision='bf16'"
        )
    if precision.pv is None:
        return None
    if precision.pv == "fp8" and not _has_fp8(call.q.device):
        return "8-bit floats need an NVIDIA GPU of capability 8.9: use precision='int8+int8'"
    if call.blocks is not None and call.blocks.block_kv < 32:
        return (
            f"block_kv={call.blocks.block_kv}: 8-bit products sum over 32 keys at least; "
            "plan with block=64 or 128, or use precision='int8'"
        )
    return None


def _has_fp8(device: torch.device) -> bool:
    if device.type != "cuda":
        return True  # in the interpreter
    return (_capability(device) or (0, 0)) >= (8, 9)


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def _block_limits(call: Call) -> str | None:
    blocks = call.blocks
    assert blocks is not None
    for name, size in (("block_q", blocks.block_q), ("block_kv", blocks.block_kv)):
        if not _SMALLEST <= size <= _LARGEST or (size > 128 and size & (size - 1)):
            return (
                f"{name}={size}: it takes {_SMALLEST} to 128, and powers of two up to {_LARGEST}; "
                "plan with block=64 or 128, or use impl='gather'"
            )
    if blocks.kv_num_blocks is None:
        return None
    intervals = getattr(blocks.mask_mod, "intervals", None)
    if intervals is None:
        return (
            "a mask_mod that is only a function: make it from blocks.Intervals, "
            "or use impl='flex' or 'gather'"
        )
    from gen_accel.kernels.triton.tiles import pack

    if pack(intervals) is None:
        return "a window whose coordinates need more than 32 bits: use impl='flex' or 'gather'"
    return None


def _interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, for tests without a GPU."""
    if importlib.util.find_spec("triton") is None:
        return False
    from gen_accel.kernels.triton import interpreter

    return interpreter.active()
