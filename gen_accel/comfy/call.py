"""One attention call of ComfyUI, in its layout and in ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gen_accel.families.base import prefix_lengths, read_once
from gen_accel.layout import TokenLayout, Unsupported


@dataclass
class AttentionCall:
    """The arguments of ``optimized_attention``, as an override gets them.

    Attributes:
        attention: The function to call where we do not compute: ComfyUI's, or an earlier override
            around it.
        q: ``[batch, tokens, heads * head_dim]``, or with ``skip_reshape`` ``[batch, heads, tokens,
            head_dim]``.
        k: The same.
        v: The same.
        heads: Attention heads.
        mask: Boolean, or added to the scores.
        skip_reshape: See ``q``.
        skip_output_reshape: The result keeps its heads apart, ``[batch, heads, tokens, head_dim]``.
        rest: Further keywords, handed on as they came.
        kernel: What to call instead of ``attention`` for self-attention that we know and that
            stays dense, or None.
    """

    attention: Callable[..., Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None = None
    skip_reshape: bool = False
    skip_output_reshape: bool = False
    rest: dict[str, Any] = field(default_factory=dict)
    kernel: Callable[..., Tensor] | None = None

    def reason(self, layout: TokenLayout) -> str | None:
        """Why this is not self-attention that follows the layout, or None."""
        axis = 2 if self.skip_reshape else 1
        queries, keys = self.q.shape[axis], self.k.shape[axis]
        if queries != keys:
            return "cross-attention"
        if self.k.shape != self.q.shape or self.rest.get("enable_gqa"):
            return "grouped heads"
        if queries != layout.tokens:
            return f"{queries} tokens, the latents and their text have {layout.tokens}"
        if self.rest.get("low_precision_attention") is False:
            return "the model asks for exact attention"
        scale = self.rest.get("scale")
        if scale is not None and abs(scale * self.head_dim**0.5 - 1) > 1e-6:
            return f"scale={scale} instead of head_dim ** -0.5"
        return None

    @property
    def head_dim(self) -> int:
        """Numbers per head."""
        return self.q.shape[-1] if self.skip_reshape else self.q.shape[-1] // self.heads

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as ``[batch, tokens, heads, head_dim]``."""
        q, k, v = (self._split(x) for x in (self.q, self.k, self.v))
        return q, k, v

    def result(self, out: Tensor) -> Tensor:
        """``[batch, tokens, heads, head_dim]`` as the caller wants it."""
        return out.transpose(1, 2) if self.skip_output_reshape else out.flatten(2)

    def dense(self) -> Tensor:
        """What the caller gets without us, in its own layout."""
        return self._call(self.attention, self.q, self.k, self.v, self.mask)

    def stock(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """The dense kernel for tensors in our layout; keys may have lost their padding.

        ComfyUI's own kernel gets the call as it came where it can, and so gives the same bits.
        """
        if self.kernel is None and q.shape[0] == self.q.shape[0]:
            return self._ours(self.dense())
        if self.skip_reshape:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        else:
            q, k, v = (x.flatten(2) for x in (q, k, v))
        return self._ours(self._call(self.kernel or self.attention, q, k, v, mask))

    def _ours(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2) if self.skip_output_reshape else self._split_heads(out)

    def _call(self, attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(
            q,
            k,
            v,
            self.heads,
            mask=mask,
            skip_reshape=self.skip_reshape,
            skip_output_reshape=self.skip_output_reshape,
            **self.rest,
        )

    def _split(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.skip_reshape else self._split_heads(x)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


def without_padding(layout: TokenLayout, mask: Tensor | None, batch: int) -> TokenLayout:
    """The layout with what a mask says about text padding.

    Raises:
        Unsupported: The mask says anything else.
    """
    if mask is None:
        return layout
    keys = read_once(mask, _visible_keys)
    if keys is None or len(keys) not in (1, batch):
        raise Unsupported(f"mask {tuple(mask.shape)} is not one of text padding")
    if set(keys) == {layout.tokens}:
        return layout
    valid = tuple(n - layout.grid.numel for n in (keys * batch if len(keys) == 1 else keys))
    if not layout.text_after or layout.text_before or not all(n >= 0 for n in valid):
        raise Unsupported(f"mask {tuple(mask.shape)} hides tokens that are not text padding")
    return replace(layout, text_valid=valid)


def _visible_keys(mask: Tensor) -> tuple[int, ...] | None:
    """Number of visible keys per sample, where these are a prefix that all queries see."""
    # ComfyUI's masks are [q, k], [batch, q, k] or [batch, heads, q, k].
    if mask.ndim < 2 or mask.ndim > 4 or mask.shape[-2] != 1:
        return None
    if mask.ndim == 4 and mask.shape[1] != 1:
        return None
    rows = mask.reshape(-1, mask.shape[-1])
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            return None
        hidden = rows <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (rows == 0)).all()):
            return None  # it weighs keys
        rows = ~hidden
    lengths = prefix_lengths(rows)
    return None if -1 in lengths else lengths
