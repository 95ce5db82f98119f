"""Wan 2.1 and 2.2 (T2V, I2V, TI2V-5B, VACE, Animate) and ChronoEdit: video self-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gen_accel.families.base import (
    Family,
    FamilyProcessor,
    Match,
    TokenPath,
    is_a,
    split_heads,
    video_layout,
)


class WanProcessor(FamilyProcessor):
    """Self-attention of Wan (stock: ``WanAttnProcessor``)."""

    ulysses = True

    def __call__(  # noqa: D102
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None or rotary_emb is None:
            return self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)

        # The norm runs across heads, so it comes before they are split.
        head_dim = attn.inner_dim // attn.heads
        q = rotate(split_heads(attn.norm_q(q), head_dim), rotary_emb)
        k = rotate(split_heads(attn.norm_k(k), head_dim), rotary_emb)
        out = self.attention(q, k, split_heads(v, head_dim))

        out = out.flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def rotate(x: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on neighbouring channels of ``[B, S, H, D]``; cos, sin ``[1, S, 1, D]``, each twice.

    Half-width temporaries only: diffusers' general function peaks at several fp32 copies of ``x``.
    """
    cos, sin = (freqs[..., ::2] for freqs in rotary_emb)
    pairs = x.unflatten(-1, (-1, 2))
    real, imag = pairs.unbind(-1)
    turned = torch.empty_like(pairs)
    turned[..., 0] = real * cos - imag * sin
    turned[..., 1] = imag * cos + real * sin
    return turned.flatten(-2)


def _match(attn: Any, encoder: Any, mask: Tensor | None, rope: Any) -> Match | None:
    if is_a(attn, "WanAnimateFaceBlockCrossAttention"):
        return Match(None, attn._default_processor_cls())
    if not is_a(attn, "WanAttention"):
        return None
    cross = attn.is_cross_attention or encoder is not None
    return Match(None if cross else WanProcessor, attn._default_processor_cls())


def _refuse_order(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if is_a(transformer, "WanAnimateTransformer3DModel"):
        return "pose and face are added frame by frame (Wan Animate)"
    return None


FAMILY = Family(
    name="wan",
    transformers=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    processors={"WanAttnProcessor": WanProcessor},
    layout=video_layout,
    match=_match,
    path=TokenPath(
        entries={"patch_embedding": 2, "rope": 1},
        exits={"proj_out": 1},
        extra={"vace_patch_embedding": 2},
        arguments={"timestep": 1},  # Wan 2.2 TI2V-5B has one for every token
        refuse=_refuse_order,
    ),
    kept={"WanAnimateFaceBlockAttnProcessor": "cross-attention to the face"},
)
