"""HunyuanVideo (T2V and both I2V kinds): joint attention over [video, padded text]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.families.base import (
    Family,
    FamilyProcessor,
    Match,
    TokenPath,
    argument,
    latent_grid,
    norm_rotate,
    prefix_lengths,
    read_once,
    split_heads,
    split_plan,
)
from gen_accel.layout import TokenGrid, TokenLayout, Unsupported


class HunyuanVideoProcessor(FamilyProcessor):
    """Joint attention of both block kinds (stock: ``HunyuanVideoAttnProcessor2_0``)."""

    ulysses = True

    def __call__(  # noqa: D102
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if encoder_hidden_states is None or image_rotary_emb is None:
            return self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        video = hidden_states.shape[1]
        head_dim = attn.inner_dim // attn.heads

        def project(x: Tensor, to_q: nn.Module, to_k: nn.Module, to_v: nn.Module) -> list[Tensor]:
            return [split_heads(to(x), head_dim) for to in (to_q, to_k, to_v)]

        cos, sin = (freqs[:, ::2] for freqs in image_rotary_emb)  # each number twice
        if attn.add_q_proj is None:  # single-stream block: one projection for video and text
            joint = torch.cat([hidden_states, encoder_hidden_states], dim=1)
            q, k, v = project(joint, attn.to_q, attn.to_k, attn.to_v)
        else:
            q, k, v = project(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        q = norm_rotate(attn.norm_q, q, cos, sin)
        k = norm_rotate(attn.norm_k, k, cos, sin)
        if attn.add_q_proj is not None:
            text_q, text_k, text_v = project(
                encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            )
            q = torch.cat([q, _norm(attn.norm_added_q, text_q)], dim=1)
            k = torch.cat([k, _norm(attn.norm_added_k, text_k)], dim=1)
            v = torch.cat([v, text_v], dim=1)

        out = self.attention(q, k, v, attention_mask).flatten(2, 3).to(q.dtype)
        hidden_states, encoder_hidden_states = out[:, :video], out[:, video:]
        if attn.to_out is not None:
            hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if attn.to_add_out is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states

    @classmethod
    def layout(  # noqa: D102
        cls,
        grid: TokenGrid,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> TokenLayout:
        if encoder_hidden_states is None or attention_mask is None:
            return super().layout(grid, hidden_states)
        lengths = read_once(attention_mask, prefix_lengths)
        valid = tuple(max(n - grid.numel, -1) for n in lengths)
        return _text_behind(grid, encoder_hidden_states.shape[1], valid)


def _norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _text_behind(grid: TokenGrid, text: int, valid: tuple[int, ...]) -> TokenLayout:
    if min(valid) < 0:
        sample = next(i for i, n in enumerate(valid) if n < 0)
        raise Unsupported(
            f"the text mask of sample {sample} is not a prefix (right padding); "
            "give the tokenizer padding_side='right'"
        )
    padded = any(n < text for n in valid)
    return TokenLayout(grid, text_after=text, text_valid=valid if padded else None)


def _layout(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout:
    latents = argument(transformer, args, kwargs, "hidden_states")
    text = argument(transformer, args, kwargs, "encoder_hidden_states")
    mask = argument(transformer, args, kwargs, "encoder_attention_mask")
    config = transformer.config
    grid = latent_grid(latents, (config.patch_size_t, config.patch_size, config.patch_size))
    return _text_behind(grid, text.shape[1], read_once(mask, prefix_lengths))


def _match(attn: Any, encoder: Any, mask: Tensor | None, rope: Any) -> Match | None:
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

    if type(attn).__name__ != "Attention":
        return None
    if encoder is None and rope is None and not attn.is_cross_attention:
        return Match(None, AttnProcessor2_0())  # the token refiner
    # diffusers' Attention serves many models. Only this one has joint blocks of these two kinds
    # with real RoPE pairs and a mask over keys alone (HunyuanVideo 1.5: over queries and keys).
    joint = encoder is not None and isinstance(rope, tuple) and not rope[0].is_complex()
    blocks = attn.to_out is None or attn.to_add_out is not None
    if joint and blocks and mask is not None and mask.shape[1:3] == (1, 1):
        return Match(HunyuanVideoProcessor, HunyuanVideoAttnProcessor2_0())
    return None


def _refuse_order(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if transformer.config.image_condition_type == "token_replace":
        return "the first frame has a timestep of its own (image_condition_type='token_replace')"
    return None


def _shards(transformer: Any) -> Any:
    if transformer.config.image_condition_type == "token_replace":
        raise ValueError(
            "image_condition_type='token_replace': the blocks count the tokens of the first frame, "
            "which a shard does not have; use one device"
        )
    names = ("hidden_states", "encoder_hidden_states")
    return split_plan("transformer_blocks.0", names, {"rope": 0})


FAMILY = Family(
    name="hunyuan_video",
    transformers=("HunyuanVideoTransformer3DModel",),
    processors={"HunyuanVideoAttnProcessor2_0": HunyuanVideoProcessor},
    layout=_layout,
    match=_match,
    path=TokenPath(
        entries={"x_embedder": 1, "rope": 0}, exits={"proj_out": 1}, refuse=_refuse_order
    ),
    kept={"AttnProcessor2_0": "token refiner (text only)"},
    shards=_shards,
)
