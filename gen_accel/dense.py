"""What computes the attention calls that stay dense."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gen_accel import sage
from gen_accel.kernels.api import block_sparse_attention
from gen_accel.kernels.quant import PRECISIONS

KINDS = ("stock", "sage", *PRECISIONS)


def stock(q: Tensor, k: Tensor, v: Tensor, backend: Any, mask: Tensor | None = None) -> Tensor:
    """The pipeline's own kernel, or a comparison with the baseline would mean nothing."""
    if callable(backend):  # not diffusers called us, but someone with a kernel of their own
        return backend(q, k, v, mask)
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)


def attend(q: Tensor, k: Tensor, v: Tensor, kind: str, backend: Any, impl: str) -> Tensor:
    """Dense self-attention without a mask.

    Args:
        q: ``[B, S, H, D]``.
        k: Same shape.
        v: Same shape.
        kind: One of `KINDS`: ``"stock"``, ``"sage"`` (SageAttention), or a quantised precision.
        backend: diffusers attention backend of the stock kernel.
        impl: Carrier of the quantised ones.

    Raises:
        ValueError: What was asked for cannot run this call; nothing else does instead.
    """
    if kind == "stock":
        return stock(q, k, v, backend)
    if kind == "sage":
        return sage.dense(q, k, v)
    carrier = "auto" if impl == "natten" else impl  # which has no quantised kernels
    return block_sparse_attention(q, k, v, precision=kind, impl=carrier)
