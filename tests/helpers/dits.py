"""Transformers with inputs for one forward: the four models and their relatives.

Each function returns ``(transformer, inputs, accelerated layers)``.
"""

from __future__ import annotations

import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    WanAnimateTransformer3DModel,
    WanVACETransformer3DModel,
)

from helpers import tiny


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def wan_inputs(channels=16, frames=5):
    return {
        "hidden_states": rand(1, channels, frames, 8, 12),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": rand(1, 32, tiny.TEXT),
    }


def wan():
    return tiny.wan_transformer(), wan_inputs(), 2


def vace():
    model = tiny.wan_transformer(
        cls=WanVACETransformer3DModel, vace_layers=[0, 1], vace_in_channels=8
    )
    return model, {**wan_inputs(), "control_hidden_states": rand(1, 8, 5, 8, 12)}, 4


def animate():
    model = tiny.wan_transformer(
        cls=WanAnimateTransformer3DModel,
        in_channels=36,
        latent_channels=16,
        image_dim=None,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    pose, face = rand(1, 16, 4, 8, 12), rand(1, 3, 13, 16, 16)
    return (
        model,
        {**wan_inputs(36), "pose_hidden_states": pose, "face_pixel_values": face},
        2,
    )


def chronoedit():
    return tiny.wan_transformer(cls=ChronoEditTransformer3DModel), wan_inputs(frames=2), 2


def hunyuan_inputs(channels=4):
    mask = torch.zeros(2, 32)
    mask[0, :7] = mask[1, :20] = 1
    return {
        "hidden_states": rand(2, channels, 5, 8, 12),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": rand(2, 32, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": rand(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


def hunyuan():
    return tiny.hunyuan_transformer(), hunyuan_inputs(), 4


def hunyuan_token_replace():
    return (
        tiny.hunyuan_transformer(image_condition_type="token_replace"),
        hunyuan_inputs(),
        4,
    )


def hunyuan_latent_concat():
    model = tiny.hunyuan_transformer(in_channels=9, image_condition_type="latent_concat")
    return model, hunyuan_inputs(9), 4


def flux():
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
    inputs = {
        "hidden_states": rand(1, 24, 16),
        "encoder_hidden_states": rand(1, 8, 32),
        "pooled_projections": rand(1, 32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(8, 3),
    }
    return tiny.flux_transformer(), inputs, 4


def cosmos():
    inputs = {
        "hidden_states": rand(1, 4, 3, 8, 12),
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": rand(1, 7, 32),
    }
    return tiny.cosmos_transformer(concat_padding_mask=False), inputs, 2


def cosmos25():
    model = tiny.cosmos_transformer(
        img_context_dim_in=12,
        img_context_num_tokens=5,
        img_context_dim_out=32,
        concat_padding_mask=False,
    )
    inputs = {
        "hidden_states": rand(1, 4, 3, 8, 12),
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": (rand(1, 7, 32), rand(1, 5, 12)),
    }
    return model, inputs, 2
