"""A Wan pipeline that is built rather than trained: its attention heads are known by construction.

Random weights have no attention patterns, so there would be nothing for a sparse method to find or
to lose. Here every self-attention head averages the latents over a neighbourhood that is narrow
along two of the axes time, height, width and wide along the third, and the velocity lets structures
of that size grow out of the noise. The classes are diffusers' own, and nothing is downloaded.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor, nn

HEADS, HEAD_DIM, LAYERS = 2, 64, 4
CHANNELS, PATCH = 8, 2
VALUES = CHANNELS * PATCH**2  # numbers in one token's patch
TEXT = 32
SPATIAL, TEMPORAL = 4, 2  # pixels and frames per latent

AXES = ("time", "height", "width")
# The heads of the first two layers, and again of the last two.
NARROW_IN = (("time", "height"), ("time", "width"), ("height", "width"), ("height", "width"))
# Rotary pairs per axis in a head of 64, and the ones that make a narrow or a wide kernel. A pair
# turns by 10000 ** (-index / pairs) per token.
PAIRS = (12, 10, 10)
NARROW = ((0, 1), (1, 2), (1, 2))
WIDE = ((2,), (3,), (3,))
NARROW_SCORE, WIDE_SCORE = 6.0, 3.0  # what an axis adds to a score at distance 0

# velocity = DECAY * latents - ONCE * (averaged once) - TWICE * (averaged twice), normalised. What
# has the size of the neighbourhoods grows, what is larger or smaller fades.
DECAY, ONCE, TWICE = 2.0, 16.0, -8.0


def demo_pipeline(seed: int = 0) -> Any:
    """A text-to-video `diffusers.WanPipeline` in fp32: 4 layers of 2 heads of 64."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_text_encoder(len(tokenizer)),
        vae=_vae(),
        transformer=_transformer(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=3.0,
        ),
    )


def _tokenizer() -> Any:
    """One token per character, and an end token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = [
        *special.values(),
        " ",
        *string.ascii_letters,
        *string.digits,
        *string.punctuation,
    ]
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


def _text_encoder(vocabulary: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary, d_model=TEXT, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    return UMT5EncoderModel(config).eval()


@torch.no_grad()
def _transformer() -> Any:
    from diffusers import WanTransformer3DModel

    model: Any = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
        ffn_dim=64,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    )
    model.eval()
    # The hidden state in quarters: the patch, averaged once, averaged twice, and the text.
    patch, once, twice, text = (slice(i * VALUES, (i + 1) * VALUES) for i in range(4))
    embedder = model.condition_embedder
    _silence(model.patch_embedding, embedder.time_proj, embedder.time_embedder.linear_2)
    model.patch_embedding.weight[patch] = torch.eye(VALUES).view(VALUES, CHANNELS, 1, PATCH, PATCH)
    for layer, block in enumerate(model.blocks):
        block.scale_shift_table.zero_()
        block.scale_shift_table[:, 2] = 1  # the gate of self-attention
        parts = (patch, once) if layer < LAYERS // 2 else (once, twice)
        _plant_heads(block.attn1, *parts, first=layer * HEADS % len(NARROW_IN))
        said = 0.2 * block.attn2.to_out[0].weight[text]
        _silence(block.attn2.to_out[0], block.ffn.net[2])
        block.attn2.to_out[0].weight[text] = said
    model.scale_shift_table.zero_()
    _silence(model.proj_out)
    # The patch counts (channel, row, column), the output (row, column, channel).
    pixel = torch.eye(VALUES).view(CHANNELS, PATCH**2, VALUES).transpose(0, 1).reshape(-1, VALUES)
    for part, factor in ((patch, DECAY), (once, -ONCE), (twice, -TWICE)):
        model.proj_out.weight[:, part] = factor * pixel
    hue = 0.03 * torch.randn(CHANNELS, VALUES)
    model.proj_out.weight[:, text] = hue.repeat(PATCH**2, 1)
    return model


def _plant_heads(attn: Any, read: slice, write: slice, first: int) -> None:
    """Heads that average the values of ``read`` over their neighbourhood and add to ``write``."""
    vectors = torch.stack([_kernel(narrow) for narrow in NARROW_IN[first : first + HEADS]])
    scale = vectors.square().mean().sqrt()
    for linear, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)):
        linear.bias.copy_((vectors / scale).flatten())
        linear.weight.normal_(std=0.01)  # a little content beside the position
        norm.weight.fill_(float(scale))  # the norm has divided by the mean over all heads
    _silence(attn.to_v, attn.to_out[0])
    mean = torch.eye(CHANNELS).repeat_interleave(PATCH**2, 0).repeat_interleave(PATCH**2, 1)
    for head in range(HEADS):
        # Each channel listens to one kind of head most.
        most = torch.arange(CHANNELS) % len(NARROW_IN) == first + head
        share = torch.where(most, 0.7, 0.1).repeat_interleave(PATCH**2)
        rows = slice(head * HEAD_DIM, head * HEAD_DIM + VALUES)
        attn.to_v.weight[rows, read] = mean / PATCH**2
        attn.to_out[0].weight[write, rows] = share.diag()


def _kernel(narrow: tuple[str, ...]) -> Tensor:
    """Constant query and key of a head: rotated, their product depends on the distance alone."""
    vector, start = torch.zeros(HEAD_DIM), 0
    for axis, name in enumerate(AXES):
        wide = name not in narrow
        indices, score = WIDE[axis] if wide else NARROW[axis], WIDE_SCORE if wide else NARROW_SCORE
        for index in indices:
            vector[start + 2 * index] = (score * HEAD_DIM**0.5 / len(indices)) ** 0.5
        start += 2 * PAIRS[axis]
    return vector


@torch.no_grad()
def _vae() -> Any:
    """A decoder that mixes channels into colours and interpolates; the encoder stays random."""
    from diffusers import AutoencoderKLWan

    vae: Any = AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=0,
        temperal_downsample=[True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=TEMPORAL,
        scale_factor_spatial=SPATIAL,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    vae.eval()
    decoder = vae.decoder
    for module in decoder.modules():
        if hasattr(module, "conv2"):  # residual blocks become their shortcuts
            _silence(module.conv2)
            if isinstance(module.conv_shortcut, nn.Conv3d):
                _silence(module.conv_shortcut)
                module.conv_shortcut.weight[..., 0, 0, 0] = _mixture(module.conv_shortcut)
        elif hasattr(module, "proj"):  # and so does the attention block
            _silence(module.proj)
        elif hasattr(module, "time_conv"):
            eye, tent = torch.eye(module.dim), torch.tensor([1.0, 2.0, 1.0]) / 4
            _silence(module.time_conv)
            # Two frames: half way from the last one, and this one.
            module.time_conv.weight[: module.dim, :, 1:, 0, 0] = eye[..., None] / 2
            module.time_conv.weight[module.dim :, :, 2, 0, 0] = eye
            mixture = _mixture(module.resample[1])
            _silence(module.resample[1])
            module.resample[1].weight.copy_(mixture[..., None, None] * tent[:, None] * tent)
    mixture = _mixture(decoder.conv_in)
    _silence(decoder.conv_in)
    decoder.conv_in.weight[:, :, -1, 1, 1] = mixture
    # Four pixels from one, bilinear; the decoder counts (colour, column, row).
    colours = nn.init.orthogonal_(torch.empty(3, decoder.conv_out.in_channels))
    near = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.75, 0.25]])
    pixels = torch.einsum("cd,xj,yi->cxydij", colours, near, near)
    _silence(decoder.conv_out)
    decoder.conv_out.weight[:, :, -1] = pixels.flatten(0, 2)
    return vae


def _mixture(conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    """An orthogonal mixture of channels."""
    return nn.init.orthogonal_(torch.empty(conv.out_channels, conv.in_channels))


def _silence(*modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter.zero_()
