"""Which tensors the fused Triton forms of the small operations take."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def fused(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors runs as a Triton kernel instead of as torch operations.

    Both give the same result. The kernels have no gradient and compute in fp32.
    """
    return (
        _HAS_TRITON
        and all(x.is_cuda and x.dtype != torch.float64 for x in tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )
