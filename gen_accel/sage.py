"""SageAttention as a dense backend, with what its wheel does not check.

The wheel on PyPI is 1.0.6, pure Triton. It subtracts the mean from the *caller's* keys, ignores
arguments it does not know (``scale``, ``attn_mask``), divides 0 by 0 in a block of zeros, and gives
keys that pad the last block of 64 a score of 0 instead of none. Later versions are compiled by
their users and have none of this but the last word on arguments.

Source: the wheel and the repository thu-ml/SageAttention, read; nothing here has run on a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_DIMS = (64, 96, 128)
MIN_TOKENS = 2048  # below, its launches cost more than they save
TAIL_ERROR = 1e-3  # share of a row's weight that padding keys may take
_Q_TILE, _K_TILE = 128, 64
_TINY = 1e-4  # keeps a scale from being 0, and vanishes beside any other number


@functools.cache
def version() -> tuple[int, ...] | None:
    """Of the installed package, or None."""
    if importlib.util.find_spec("sageattention") is None:
        return None
    try:
        text = importlib.metadata.version("sageattention")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return (0,)
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())


def missing() -> str | None:
    """Why it cannot run here and what would help, or None."""
    if version() is None:
        return "sageattention is not installed: pip install 'gen-accel[sage]'"
    if not torch.cuda.is_available():
        return "sageattention needs a CUDA GPU"
    return None


def limits(q: Tensor, k: Tensor) -> str | None:
    """Why it must not run this call, or None.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Skv, H, D]``.
    """
    tokens, dim = k.shape[1], q.shape[3]
    if not _on_gpu(q):
        return f"tensors on {q.device.type}: it runs on CUDA"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype}: it takes fp16 and bf16"
    if dim not in HEAD_DIMS:
        return f"head_dim={dim}: it takes {', '.join(map(str, HEAD_DIMS))}"
    if min(q.shape[1], tokens) < MIN_TOKENS:
        return f"{min(q.shape[1], tokens)} tokens: it pays from {MIN_TOKENS} on"
    # Smoothed scores of a row have mean 0, so its weights sum to at least one per key (Jensen).
    padding = -tokens % _K_TILE
    if _is_wheel() and padding > TAIL_ERROR * tokens:
        return (
            f"{tokens} keys end {padding} short of a block of {_K_TILE}, which {_name()} fills "
            f"with keys that count: up to {padding / tokens:.1%} of every row"
        )
    return None


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Dense attention by ``sageattention.sageattn``; its inputs stay as they are.

    Args:
        q: ``[B, Sq, H, D]``, fp16 or bf16, on CUDA.
        k: ``[B, Skv, H, D]``.
        v: Same shape as k.
        scale: Factor of the scores; None means ``head_dim ** -0.5``.

    Raises:
        ValueError: The call is one of `limits`.
    """
    reason = missing() or limits(q, k)
    if reason is not None:
        raise ValueError(f"dense='sage': {reason}; use dense='stock'")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    sageattn = importlib.import_module("sageattention").sageattn
    smooth = {}
    if _is_wheel():
        k = k - k.mean(1, keepdim=True, dtype=torch.float32).to(k.dtype)
        q, k = _fill_zero_tiles(q.clone(), _Q_TILE), _fill_zero_tiles(k, _K_TILE)
        smooth = {"smooth_k": False}  # or it would smooth the copy a second time, in place
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale, **smooth)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _is_wheel() -> bool:
    """Whether it is the Triton version, or one that does not say."""
    return (version() or (0,)) < (2,)


def _name() -> str:
    return "sageattention " + ".".join(map(str, version() or ()))


def _fill_zero_tiles(x: Tensor, tile: int) -> Tensor:
    """Put a tiny number into one channel of tiles of tokens that hold only zeros; in place."""
    padded = F.pad(x.abs().amax(-1), (0, 0, 0, -x.shape[1] % tile))
    zero = padded.unflatten(1, (-1, tile)).amax(2) == 0
    x[..., 0] += _TINY * zero.repeat_interleave(tile, 1)[:, : x.shape[1]]
    return x
