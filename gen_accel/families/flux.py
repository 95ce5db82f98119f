"""FLUX.1: joint attention over [text, image]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gen_accel.families.base import (
    Family,
    FamilyProcessor,
    Match,
    TokenPath,
    argument,
    is_a,
    norm_rotate,
    read_once,
    split_heads,
)
from gen_accel.layout import TokenGrid, TokenLayout, Unsupported


class FluxProcessor(FamilyProcessor):
    """Joint attention of both block kinds (stock: ``FluxAttnProcessor``)."""

    ulysses = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not args and not kwargs:
            raise TypeError(
                "diffusers rebuilds every processor when it loads or unloads an IP-Adapter; "
                "do that before set_attn_processor(...), or remove() the processors first"
            )
        super().__init__(*args, **kwargs)

    def __call__(  # noqa: D102
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None or image_rotary_emb is None:
            return self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )

        cos, sin = (freqs[:, ::2] for freqs in image_rotary_emb)  # each number twice

        def project(x: Tensor, fused: str, *single: str) -> list[Tensor]:
            if attn.fused_projections:
                parts = getattr(attn, fused)(x).chunk(3, dim=-1)
            else:
                parts = [getattr(attn, name)(x) for name in single]
            return [split_heads(part, attn.head_dim) for part in parts]

        q, k, v = project(hidden_states, "to_qkv", "to_q", "to_k", "to_v")
        # Single-stream blocks arrive with text and image already in one sequence.
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        q = norm_rotate(attn.norm_q, q, cos[text:], sin[text:])
        k = norm_rotate(attn.norm_k, k, cos[text:], sin[text:])
        if encoder_hidden_states is not None:
            text_q, text_k, text_v = project(
                encoder_hidden_states, "to_added_qkv", "add_q_proj", "add_k_proj", "add_v_proj"
            )
            text_q = norm_rotate(attn.norm_added_q, text_q, cos[:text], sin[:text])
            text_k = norm_rotate(attn.norm_added_k, text_k, cos[:text], sin[:text])
            q, k, v = (torch.cat(pair, dim=1) for pair in ((text_q, q), (text_k, k), (text_v, v)))

        out = self.attention(q, k, v).flatten(2, 3).to(q.dtype)
        if encoder_hidden_states is None:
            return out
        image_out = attn.to_out[1](attn.to_out[0](out[:, text:].contiguous()))
        return image_out, attn.to_add_out(out[:, :text].contiguous())

    @classmethod
    def layout(  # noqa: D102
        cls,
        grid: TokenGrid,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> TokenLayout:
        if encoder_hidden_states is not None:
            return TokenLayout(grid, text_before=encoder_hidden_states.shape[1])
        text = hidden_states.shape[1] - grid.numel
        if text < 0:
            raise ValueError(
                f"grid={grid} has {grid.numel} tokens, the call only {hidden_states.shape[1]}; "
                "an image of HxW pixels has the grid (1, H/16, W/16)"
            )
        return TokenLayout(grid, text_before=text)


def _read_grid(img_ids: Tensor) -> TokenGrid | None:
    """The image grid from position ids ``[S, 3]``, or None when they are not one raster."""
    ids = img_ids[0] if img_ids.ndim == 3 else img_ids  # diffusers' deprecated form
    frame, row, column = ids.cpu().unbind(-1)
    if bool(frame.any()):
        return None
    # Counted, not read off the largest id: ids come in bf16, which is inexact above 256.
    starts = (row != row[0]).nonzero()
    width = int(starts[0]) if len(starts) else len(row)
    if len(row) % width:
        return None
    row, column = row.view(-1, width), column.view(-1, width)
    raster = bool((row == row[:, :1]).all() and (column == column[:1]).all())
    return TokenGrid(1, len(row), width) if raster else None


def _layout(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout:
    image = argument(transformer, args, kwargs, "hidden_states")
    text = argument(transformer, args, kwargs, "encoder_hidden_states")
    ids = argument(transformer, args, kwargs, "img_ids")
    grid = read_once(ids, _read_grid)
    if grid is None or grid.numel != image.shape[1]:
        raise Unsupported(
            "img_ids are not one image grid (first column 0): reference images (Kontext) stay dense"
        )
    return TokenLayout(grid, text_before=text.shape[1])


def _match(attn: Any, encoder: Any, mask: Tensor | None, rope: Any) -> Match | None:
    if not is_a(attn, "FluxAttention"):
        return None
    return Match(FluxProcessor if mask is None else None, attn._default_processor_cls())


FAMILY = Family(
    name="flux",
    transformers=("FluxTransformer2DModel",),
    processors={"FluxAttnProcessor": FluxProcessor},
    layout=_layout,
    match=_match,
    path=TokenPath(
        entries={"x_embedder": 1, "pos_embed": 0},
        exits={"proj_out": 1},
        arguments={"controlnet_block_samples": 1, "controlnet_single_block_samples": 1},
    ),
    kept={"FluxIPAdapterAttnProcessor": "IP-Adapter"},
    pure_noise=1.0,  # the pipeline divides by 1000 itself
)
