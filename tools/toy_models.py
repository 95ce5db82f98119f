"""Builds the toy pipelines: stock diffusers classes at toy size, before any training.

Only the transformer is trained. The other components are *set*, not learnt:

* The VAE of every toy is a stock class whose weights make it the identity on pixels, so latents are
  pixels and no error can hide in a codec. The transformer's own patch embedding does the patching.
* The text encoders are frozen random word vectors plus one planted head that adds the previous
  word, because the transformers give text no positions: without it "a red circle and a blue square"
  and "a blue circle and a red square" would be the same bag of words.
* CLIP's pooled vector is zero, so that no text reaches the modulation and all of it must pass
  through attention, where it can be observed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from gen_accel.eval.world.caption import vocabulary

TEXT_DIM = 64
SHIFT = 3.0


def word_tokenizer(template: dict[str, Any] | None = None) -> PreTrainedTokenizerFast:
    """One token per word; HunyuanVideo's prompt template takes the tokens it should.

    The stock pipeline wraps every prompt in a template and cuts the first 95 tokens off again. Here
    the prefix is rewritten to that many copies of one word, so that the default call works.
    """
    words = ["<pad>", "</s>", "<unk>", "system", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    steps: list[Any] = []
    if template is not None:
        prefix, suffix = template["template"].split("{}")
        steps = [
            normalizers.Replace(prefix, "system " * template["crop_start"]),
            normalizers.Replace(suffix, ""),
        ]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=512,
    )


def _mixer(dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]


@torch.no_grad()
def llama_encoder(vocab: int) -> LlamaModel:
    """Random word vectors; layer 0 adds a rotation of the previous word's vector.

    HunyuanVideo reads the third last hidden state, so three layers put that after layer 0;
    the others add nothing.
    """
    torch.manual_seed(0)
    head_dim, theta, sharp = TEXT_DIM, 10.0, 8.0
    model = LlamaModel(
        LlamaConfig(
            vocab_size=vocab, hidden_size=TEXT_DIM, intermediate_size=8, num_hidden_layers=3,
            num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=1024,
            pad_token_id=0, bos_token_id=None, eos_token_id=1,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    )  # fmt: skip
    model.embed_tokens.weight.normal_()
    model.embed_tokens.weight[:, 0] = (
        3.0  # a constant channel, from which position-only scores come
    )
    for layer in model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight.zero_()
    half = head_dim // 2
    angle = theta ** (-torch.arange(half) / half)  # a query meets the key one position earlier
    attention = model.layers[0].self_attn
    attention.q_proj.weight[:half, 0] = sharp / 3.0
    attention.k_proj.weight[:half, 0] = angle.cos()
    attention.k_proj.weight[half:, 0] = angle.sin()
    attention.v_proj.weight.copy_(_mixer(TEXT_DIM, 1))
    attention.v_proj.weight[:, 0] = 0.0
    attention.o_proj.weight.copy_(0.6 * torch.eye(TEXT_DIM))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def t5_encoder(vocab: int, cls=T5EncoderModel, config=T5Config) -> Any:
    """The same for T5 and UMT5, where a relative position bias picks the previous word."""
    torch.manual_seed(0)
    model = cls(
        config(
            vocab_size=vocab, d_model=TEXT_DIM, d_kv=TEXT_DIM, d_ff=8, num_layers=1, num_heads=1,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "shared" not in name and "embed" not in name:
            weight.zero_()
    model.get_input_embeddings().weight.normal_()
    attention = model.encoder.block[0].layer[0].SelfAttention
    attention.relative_attention_bias.weight[1] = 16.0  # bucket 1: the previous position
    attention.relative_attention_bias.weight[0] = 8.0  # bucket 0: itself, for the first word
    attention.v.weight.copy_(_mixer(TEXT_DIM, 1))
    attention.o.weight.copy_(0.6 * torch.eye(TEXT_DIM))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def silent_clip(dim: int = 8) -> tuple[PreTrainedTokenizerFast, CLIPTextModel]:
    """A tokenizer that hears nothing and a CLIP encoder whose pooled vector is always zero."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<start>": 0, "<end>": 1}, unk_token="<end>"))
    words.normalizer = normalizers.Replace(Regex("[\\s\\S]+"), "")
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<end>", eos_token="<end>", model_max_length=77
    )
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=2, hidden_size=dim, intermediate_size=8, num_attention_heads=1,
            num_hidden_layers=1, projection_dim=dim, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    norm = next(m for n, m in model.named_modules() if n.endswith("final_layer_norm"))
    norm.weight.zero_()
    norm.bias.zero_()
    return tokenizer, model.eval().requires_grad_(False)


# The identity VAEs. A norm whose input holds a large constant divides by (nearly) a constant, and
# silu(x) - silu(-x) = x undoes the activation: the round trip is exact to about 1e-5.
LARGE = 1000.0


def _centre(conv: nn.Module) -> torch.Tensor:
    """The kernel's tap on the current pixel, a view [out, in]; causal kernels end there."""
    weight = getattr(conv, "conv", conv).weight
    row, column = (k // 2 for k in weight.shape[-2:])
    if weight.ndim == 4:
        return weight[:, :, row, column]
    frame = -1 if getattr(conv, "is_causal", True) else weight.shape[2] // 2
    return weight[:, :, frame, row, column]


def _bias(conv: nn.Module) -> torch.Tensor:
    return getattr(conv, "conv", conv).bias


@torch.no_grad()
def _identity_half(conv_in: nn.Module, conv_out: nn.Module) -> None:
    """Channels [x, -x, +large, -large]; the output is silu(x) - silu(-x), scaled back."""
    eye = torch.eye(3)
    _centre(conv_in)[:3, :3] = eye
    _centre(conv_in)[3:6, :3] = -eye
    _bias(conv_in)[6], _bias(conv_in)[7] = LARGE, -LARGE
    gain = LARGE * math.sqrt(2 / 8)  # the norm's divisor
    _centre(conv_out)[:3, :3] = gain * eye
    _centre(conv_out)[:3, 3:6] = -gain * eye


@torch.no_grad()
def identity_vae(vae: Any) -> Any:
    """Sets the weights of a VAE with eight hidden and three latent channels to the identity."""
    for name, weight in vae.named_parameters():
        weight.fill_(1.0 if "norm" in name and name.endswith(("weight", "gamma")) else 0.0)
    for half in (vae.encoder, vae.decoder):
        _identity_half(half.conv_in, half.conv_out)
    _bias(vae.encoder.conv_out)[3:] = -30.0  # log variance: sampling the posterior adds nothing
    for name in ("quant_conv", "post_quant_conv"):
        if getattr(vae, name, None) is not None:
            tap = _centre(getattr(vae, name))
            tap.copy_(torch.eye(len(tap)))
    return vae.eval().requires_grad_(False)


def _hunyuan_video() -> DiffusionPipeline:
    tokenizer = word_tokenizer(DEFAULT_PROMPT_TEMPLATE)
    clip_tokenizer, clip = silent_clip()
    # AutoencoderKLHunyuanVideo cannot be built without temporal compression; LTX's class can, and
    # has every attribute the pipeline reads.
    vae = AutoencoderKLLTXVideo(
        latent_channels=3, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(0, 0), decoder_layers_per_block=(0, 0), spatio_temporal_scaling=(False,),
        decoder_spatio_temporal_scaling=(False,), down_block_types=("LTXVideoDownBlock3D",),
        downsample_type=("conv",), decoder_inject_noise=(False, False), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=1, patch_size_t=1, spatial_compression_ratio=1,
        temporal_compression_ratio=1,
    )  # fmt: skip
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=3, out_channels=3, patch_size=4, patch_size_t=1, num_attention_heads=3,
        attention_head_dim=64, num_layers=1, num_single_layers=5, num_refiner_layers=1,
        mlp_ratio=2.0, guidance_embeds=False, text_embed_dim=TEXT_DIM, pooled_projection_dim=8,
        rope_axes_dim=(16, 24, 24),
    )  # fmt: skip
    return HunyuanVideoPipeline(
        text_encoder=llama_encoder(len(tokenizer)), tokenizer=tokenizer, transformer=transformer,
        vae=identity_vae(vae), scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder_2=clip, tokenizer_2=clip_tokenizer,
    )  # fmt: skip


def _wan() -> DiffusionPipeline:
    tokenizer = word_tokenizer()
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=3, dim_mult=[1], num_res_blocks=1, temperal_downsample=[],
        latents_mean=[0.0] * 3, latents_std=[1.0] * 3, scale_factor_temporal=1,
        scale_factor_spatial=1,
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 4, 4), num_attention_heads=3, attention_head_dim=64, in_channels=3,
        out_channels=3, text_dim=TEXT_DIM, freq_dim=256, ffn_dim=512, num_layers=7,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=t5_encoder(len(tokenizer), UMT5EncoderModel, UMT5Config),
        vae=identity_vae(vae), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )  # fmt: skip


def _flux() -> DiffusionPipeline:
    tokenizer = word_tokenizer()
    clip_tokenizer, clip = silent_clip()
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=3, block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1, norm_num_groups=1, mid_block_add_attention=False,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=12, num_layers=1, num_single_layers=4, attention_head_dim=64,
        num_attention_heads=3, joint_attention_dim=TEXT_DIM, pooled_projection_dim=8,
        guidance_embeds=False, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), text_encoder=clip,
        tokenizer=clip_tokenizer, text_encoder_2=t5_encoder(len(tokenizer)), tokenizer_2=tokenizer,
        transformer=transformer, vae=identity_vae(vae),
    )  # fmt: skip


BUILDERS = {"hunyuan-video": _hunyuan_video, "wan": _wan, "flux": _flux}


def build(name: str, seed: int = 0) -> DiffusionPipeline:
    """A toy pipeline with an untrained transformer.

    Raises:
        KeyError: For a name not in ``BUILDERS``.
    """
    pipe_builder = BUILDERS[name]
    torch.manual_seed(seed)
    return pipe_builder()
