"""NATTEN as the executor of a window: optional, imported only when a policy names it.

Its kernels take a window as it is, so neither token order nor block lists are needed. Facts are
those of NATTEN 0.21 (https://natten.org).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gen_accel.select.window import AxisWindow, Window

_DEVICE = "cuda"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing() -> str | None:
    """Why NATTEN's kernels cannot run on this machine and what would help, or None."""
    way_out = "install a wheel for this torch from https://whl.natten.org, or use impl='auto'"
    if importlib.util.find_spec("natten") is None:
        return f"natten is not installed: {way_out}"
    # Without nvcc, `pip install natten` silently leaves the kernels out.
    if not getattr(importlib.import_module("natten"), "HAS_LIBNATTEN", False):
        return f"natten is installed without its compiled library: {way_out}"
    return None


def limits(q: Tensor, windows: Sequence[Window], text: int = 0) -> str | None:
    """Why NATTEN cannot run a call and the way out, in one line, or None.

    Args:
        q: ``[batch, tokens, heads, head_dim]``; k and v are alike.
        windows: The window of every head; one when they share it.
        text: Text tokens in the sequence.
    """
    if reason := missing():
        return reason
    if q.device.type != _DEVICE:
        return f"NATTEN has kernels for CUDA only, q is on {q.device}: use impl='auto'"
    if text:
        return (
            f"NATTEN attends over the grid alone, the call has {text} text tokens: use impl='auto'"
        )
    if len(set(windows)) > 1:
        return "NATTEN takes one window for all heads: give one Window, or use impl='auto'"
    axes = _axes(windows[0])
    if not axes:
        return "NATTEN needs an axis of at least 2 tokens, the grid has none: use impl='auto'"
    if any(axis.snap != 1 for axis in axes):
        return "NATTEN shifts windows at borders: use border='shift', or impl='auto'"
    if q.dtype not in _DTYPES:
        return f"NATTEN takes fp32, bf16 and fp16, q is {q.dtype}: cast it, or use impl='auto'"
    if q.shape[3] % 8:
        return f"NATTEN takes multiples of 8 as head_dim, not {q.shape[3]}: use impl='auto'"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, windows: Sequence[Window], scale: float | None = None
) -> Tensor:
    """Attention of the tokens of a grid, each to its window.

    Args:
        q: ``[batch, tokens, heads, head_dim]``, tokens in raster order.
        k: Same shape.
        v: Same shape.
        windows: The window of every head; one when they share it.
        scale: Factor of the scores; None means ``head_dim ** -0.5``.

    Returns:
        Same shape.

    Raises:
        ValueError: NATTEN cannot run this call.
    """
    if reason := limits(q, windows, q.shape[1] - math.prod(windows[0].grid)):
        raise ValueError(f"impl='natten': {reason}")
    axes = _axes(windows[0])
    attend = getattr(importlib.import_module("natten.functional"), f"na{len(axes)}d")
    out: Tensor = attend(
        *(x.contiguous().unflatten(1, [axis.length for axis in axes]) for x in (q, k, v)),
        kernel_size=tuple(axis.width for axis in axes),
        stride=tuple(axis.stride for axis in axes),
        dilation=tuple(axis.dilation for axis in axes),
        is_causal=tuple(axis.causal for axis in axes),
        scale=scale,
    )
    return out.flatten(1, len(axes))


def _axes(window: Window) -> list[AxisWindow]:
    """The axes NATTEN hears of: it has no name for one of a single token."""
    return [axis for axis in window.axes if axis.length > 1]
