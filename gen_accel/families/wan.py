"""Wan 2.1 and 2.2 (T2V, I2V, TI2V-5B, VACE, Animate) and ChronoEdit: video self-attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gen_accel.families.base import (
    Family,
    FamilyProcessor,
    Match,
    TokenPath,
    is_a,
    norm_rotate,
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

        q, k, v = (split_heads(x, attn.inner_dim // attn.heads) for x in (q, k, v))
        # cos and sin are [1, tokens, 1, head_dim], each number twice.
        cos, sin = (freqs[0, :, 0, ::2] for freqs in rotary_emb)
        q = norm_rotate(attn.norm_q, q, cos, sin, across=True)
        k = norm_rotate(attn.norm_k, k, cos, sin, across=True)
        out = self.attention(q, k, v)

        out = out.flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


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
