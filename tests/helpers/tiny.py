"""Every pipeline of the four families with tiny random weights, offline, on a CPU.

Each ``tiny_*`` returns ``(pipe, call)``: a new pipeline (building one takes 30 ms), and keyword
arguments for a two-step run that returns latents; `run` runs it. Tokens per attention call: Wan and
Cosmos 2 5x4x6, Cosmos 1 3x4x6, HunyuanVideo 5x4x6 + 32 text, FLUX 48 text + 8x12. For a kernel that
needs a real head size, raise ``head_dim`` to 64 or 128.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from types import SimpleNamespace

import diffusers.models.transformers.transformer_cosmos as transformer_cosmos
import diffusers.pipelines.wan.pipeline_wan_i2v as pipeline_wan_i2v
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from helpers.text import (
    clip_encoder,
    clip_tokenizer,
    llama_encoder,
    llama_tokenizer,
    t5_encoder,
    t5_tokenizer,
)

VIDEO = {"height": 64, "width": 96, "num_frames": 17}
CALL = {"prompt": "a cat runs", "num_inference_steps": 2, "output_type": "latent"}
CFG = {"negative_prompt": "bad", "guidance_scale": 5.0}
TEXT = 32  # tokens, and width of the text encoders' states


def run(pipe, seed: int = 0, **call) -> torch.Tensor:
    """The pipeline's output (latents), with fixed noise and without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(generator=torch.Generator().manual_seed(seed), **call)[0]


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Split a head over (time, height, width) as HunyuanVideo and FLUX do: 1/8, 7/16, 7/16."""
    spatial = head_dim * 7 // 32 * 2
    return head_dim - 2 * spatial, spatial, spatial


def wan_transformer(heads=2, head_dim=24, layers=2, seed=0, cls=WanTransformer3DModel, **config):
    torch.manual_seed(seed)
    defaults = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": layers,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT,
        "freq_dim": 256,
        "ffn_dim": 64,
        "rope_max_seq_len": 64,
    }
    return cls(**{**defaults, **config}).eval()


def wan_vae():
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


def _wan_parts():
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(TEXT, umt5=True),
        "vae": wan_vae(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def tiny_wan(heads=2, head_dim=24, layers=2, expand_timesteps=False):
    """Wan 2.1 T2V; with ``expand_timesteps`` Wan 2.2 TI2V-5B."""
    transformer = wan_transformer(heads, head_dim, layers)
    pipe = WanPipeline(transformer=transformer, expand_timesteps=expand_timesteps, **_wan_parts())
    return pipe, {**CALL, **CFG, **VIDEO, "max_sequence_length": TEXT}


def tiny_wan22(heads=2, head_dim=24, layers=2):
    """Wan 2.2 A14B: one expert for the first of the two steps, another for the second."""
    pipe = WanPipeline(
        transformer=wan_transformer(heads, head_dim, layers),
        transformer_2=wan_transformer(heads, head_dim, layers, seed=1),
        boundary_ratio=0.875,
        **_wan_parts(),
    )
    return pipe, {**CALL, **CFG, **VIDEO, "max_sequence_length": TEXT}


def tiny_wan_i2v(heads=2, head_dim=24, layers=2):
    """Wan 2.1 I2V: image latents beside the noise, image embeddings in front of 512 text tokens."""
    if not hasattr(pipeline_wan_i2v, "ftfy"):  # optional in diffusers, but used unasked there
        pipeline_wan_i2v.ftfy = SimpleNamespace(fix_text=str)
    torch.manual_seed(0)
    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    ).eval()
    pipe = WanImageToVideoPipeline(
        transformer=wan_transformer(
            heads,
            head_dim,
            layers,
            in_channels=36,
            image_dim=16,
            added_kv_proj_dim=heads * head_dim,
        ),
        image_encoder=encoder,
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        **_wan_parts(),
    )
    # The processor of Wan I2V counts on 512 text tokens, whatever max_sequence_length says.
    return pipe, {**CALL, **CFG, **VIDEO, "image": picture(), "max_sequence_length": 512}


def picture() -> Image.Image:
    """A 96x64 image."""
    return Image.new("RGB", (96, 64), (90, 60, 30))


def hunyuan_transformer(heads=2, head_dim=16, layers=2, single_layers=2, **config):
    torch.manual_seed(0)
    defaults = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": layers,
        "num_single_layers": single_layers,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": rope_axes(head_dim),
    }
    return HunyuanVideoTransformer3DModel(**{**defaults, **config}).eval()


def tiny_hunyuan(heads=2, head_dim=16, layers=2, single_layers=2):
    """HunyuanVideo T2V."""
    transformer = hunyuan_transformer(heads, head_dim, layers, single_layers)
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    pipe = HunyuanVideoPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=llama_encoder(16),
        tokenizer=llama_tokenizer(),
        text_encoder_2=clip_encoder(8),
        tokenizer_2=clip_tokenizer(),
    )
    call = {**CALL, **VIDEO, "guidance_scale": 4.5, "max_sequence_length": TEXT}
    return pipe, {**call, "prompt_template": {"template": "{}", "crop_start": 0}}


def flux_transformer(heads=2, head_dim=16, layers=2, single_layers=2, **config):
    torch.manual_seed(0)
    defaults = {
        "patch_size": 1,
        "in_channels": 16,  # 4 x the VAE's latent channels
        "num_layers": layers,
        "num_single_layers": single_layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": TEXT,
        "axes_dims_rope": rope_axes(head_dim),
        "guidance_embeds": True,
    }
    return FluxTransformer2DModel(**{**defaults, **config}).eval()


def tiny_flux(heads=2, head_dim=16, layers=2, single_layers=2):
    """FLUX.1-dev."""
    transformer = flux_transformer(heads, head_dim, layers, single_layers)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,  # four, so that the scale factor is 8
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    ).eval()
    pipe = FluxPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip_encoder(TEXT),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(TEXT),
        tokenizer_2=t5_tokenizer(),
    )
    size = {"height": 128, "width": 192, "max_sequence_length": 48}
    return pipe, {**CALL, **size, "guidance_scale": 3.5}


class NoSafetyChecker(ModelMixin, ConfigMixin):
    """Stand-in for tests: the real one needs ``cosmos_guardrail`` and gated weights."""

    def __init__(self):
        super().__init__()
        self.register_buffer("anchor", torch.zeros(1), persistent=False)

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames

    @property
    def device(self):
        return self.anchor.device

    @property
    def dtype(self):
        return self.anchor.dtype


class _Transforms:
    """The one torchvision function Cosmos calls in forward (``concat_padding_mask=True``)."""

    class InterpolationMode:
        NEAREST = "nearest"

    class functional:  # noqa: N801
        @staticmethod
        def resize(x, size, interpolation):
            return F.interpolate(x, size=tuple(size), mode=interpolation)


def cosmos_transformer(heads=2, head_dim=16, layers=2, **config):
    if not hasattr(transformer_cosmos, "transforms"):  # torchvision is not installed
        transformer_cosmos.transforms = _Transforms
    torch.manual_seed(0)
    defaults = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": layers,
        "mlp_ratio": 2,
        "text_embed_dim": TEXT,
        "adaln_lora_dim": 4,
        "max_size": (8, 64, 64),
    }
    return CosmosTransformer3DModel(**{**defaults, **config}).eval()


def _cosmos_parts():
    return {
        "text_encoder": t5_encoder(TEXT),
        "tokenizer": t5_tokenizer(),
        "safety_checker": NoSafetyChecker(),
    }


def tiny_cosmos(heads=2, head_dim=16, layers=2):
    """Cosmos 1 text-to-world."""
    transformer = cosmos_transformer(heads, head_dim, layers)
    torch.manual_seed(0)
    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
    ).eval()
    scheduler = EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    pipe = CosmosTextToWorldPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, **_cosmos_parts()
    )
    return pipe, {**CALL, **CFG, **VIDEO, "max_sequence_length": TEXT}


def tiny_cosmos2(heads=2, head_dim=16, layers=2, video=True):
    """Cosmos 2 video-to-world from one image; text-to-image (a grid of one frame) if not video."""
    cls = Cosmos2VideoToWorldPipeline if video else Cosmos2TextToImagePipeline
    transformer = cosmos_transformer(
        heads,
        head_dim,
        layers,
        in_channels=17 if video else 16,  # one more for the condition mask
        out_channels=16,
        rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    pipe = cls(transformer=transformer, vae=wan_vae(), scheduler=scheduler, **_cosmos_parts())
    size = {**VIDEO, "image": picture()} if video else {"height": 64, "width": 96}
    return pipe, {**CALL, **CFG, **size, "max_sequence_length": TEXT}


PIPES = [
    tiny_wan,
    tiny_wan_i2v,
    tiny_wan22,
    tiny_hunyuan,
    tiny_flux,
    tiny_cosmos,
    tiny_cosmos2,
]
