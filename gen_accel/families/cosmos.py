"""Cosmos 1, 2 and 2.5: video self-attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gen_accel.families.base import (
    Family,
    FamilyProcessor,
    Match,
    TokenPath,
    argument,
    is_a,
    norm_rotate,
    split_heads,
    split_plan,
    video_layout,
)


class CosmosProcessor(FamilyProcessor):
    """Self-attention of Cosmos (stock: ``CosmosAttnProcessor2_0``)."""

    ulysses = True

    def __call__(  # noqa: D102
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        if (
            encoder_hidden_states is not None
            or attention_mask is not None
            or image_rotary_emb is None
        ):
            return self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )

        head_dim = attn.inner_dim // attn.heads
        cos, sin = (freqs[:, : head_dim // 2] for freqs in image_rotary_emb)  # both halves alike
        q, k, v = (
            split_heads(to(hidden_states), head_dim) for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        q = norm_rotate(attn.norm_q, q, cos, sin, halves=True)
        k = norm_rotate(attn.norm_k, k, cos, sin, halves=True)
        out = self.attention(q, k, v).flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def _match(attn: Any, encoder: Any, mask: Tensor | None, rope: Any) -> Match | None:
    from diffusers.models.transformers import transformer_cosmos as cosmos

    if is_a(attn, "CosmosAttention"):
        return Match(None, cosmos.CosmosAttnProcessor2_5())
    # diffusers' Attention serves many models; bias-free projections with RMS-normed q and k,
    # and RoPE exactly where there is no text, are this one's.
    plain = type(attn).__name__ == "Attention" and attn.added_kv_proj_dim is None
    if not plain or attn.use_bias or attn.to_out is None or not is_a(attn.norm_q, "RMSNorm"):
        return None
    if attn.is_cross_attention and encoder is not None and rope is None:
        return Match(None, cosmos.CosmosAttnProcessor2_0())
    if not attn.is_cross_attention and encoder is None and isinstance(rope, tuple):
        return Match(CosmosProcessor, cosmos.CosmosAttnProcessor2_0())
    return None


def _refuse_order(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if argument(transformer, args, kwargs, "timestep").ndim > 1:
        return "every frame has a timestep of its own (Cosmos 2 video-to-world)"
    return None


def _shards(transformer: Any) -> Any:
    embeddings = {"rope": 0}
    if transformer.learnable_pos_embed is not None:
        embeddings["learnable_pos_embed"] = 1
    return split_plan("transformer_blocks.0", ("hidden_states",), embeddings)


FAMILY = Family(
    name="cosmos",
    transformers=("CosmosTransformer3DModel",),
    processors={"CosmosAttnProcessor2_0": CosmosProcessor},
    layout=video_layout,
    match=_match,
    path=TokenPath(
        entries={"patch_embed": 1, "rope": 0},
        exits={"proj_out": 1},
        extra={"learnable_pos_embed": 1},
        arguments={"block_controlnet_hidden_states": 1},
        refuse=_refuse_order,
    ),
    kept={"CosmosAttnProcessor2_5": "cross-attention"},
    shards=_shards,
)
