"""A tiny CLIP with random weights, as a folder that ``from_pretrained`` takes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from gen_accel.eval.clip import _processor
from helpers.text import clip_tokenizer


def save_tiny_clip(folder: Path, size: int = 32) -> Path:
    """Write model, tokenizer and image processor into ``folder``."""
    tokenizer = clip_tokenizer()
    torch.manual_seed(0)
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    common["num_attention_heads"] = 2
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **common,
    )
    vision = CLIPVisionConfig(image_size=size, patch_size=8, **common)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    CLIPModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"height": size, "width": size}
    _processor()(size={"shortest_edge": size}, crop_size=sizes).save_pretrained(folder)
    return folder
