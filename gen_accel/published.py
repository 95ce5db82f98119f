"""Published diffusion transformers: the architecture with random weights, and inputs of a forward.

How long a forward takes does not depend on the values of the weights, except where they decide
which blocks are kept; that is set by the density here. Configurations are those of the checkpoints
on the Hub (``transformer/config.json``) as of 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.layout import TokenGrid


@dataclass(frozen=True)
class Published:
    """A model as its authors run it.

    Attributes:
        name: Ours.
        family: Of `gen_accel.families`.
        transformer: Class in diffusers.
        config: Its arguments, where they are not the defaults.
        heads: Attention heads.
        head_dim: Channels of a head.
        layers: Blocks by kind, in the order of the forward.
        ffn: Width of the feed-forward network.
        text: Text tokens.
        compression: Frames and pixels per latent, frames and height and width.
        size: Height, width and frames of a full-size run.
        steps: Denoising steps of it.
        forwards: Forwards per step: two with classifier-free guidance.
    """

    name: str
    family: str
    transformer: str
    heads: int
    layers: Mapping[str, int]
    ffn: int
    text: int
    size: tuple[int, int, int]
    steps: int
    forwards: int = 1
    head_dim: int = 128
    compression: tuple[int, int, int] = (4, 8, 8)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.layers.values())

    def cut(self, layers: int | None) -> Published:
        """The same with at most so many blocks, kinds in their proportion; None leaves it whole."""
        if layers is None or layers >= self.depth:
            return self
        if layers < len(self.layers):
            raise ValueError(
                f"layers={layers}: {self.name} has {len(self.layers)} kinds of block "
                f"({', '.join(self.layers)}); keep at least one of each"
            )
        kept = {
            kind: max(1, round(layers * count / self.depth)) for kind, count in self.layers.items()
        }
        last = list(kept)[-1]
        kept[last] += layers - sum(kept.values())
        return replace(self, layers=kept)

    def grid(self, height: int, width: int, frames: int) -> TokenGrid:
        """Tokens of a clip.

        Raises:
            ValueError: The size does not divide.
        """
        time, *space = self.compression
        for name, length, per in zip(("height", "width"), (height, width), space):
            if length < 2 * per or length % (2 * per):
                raise ValueError(f"{name}={length}: {self.name} takes multiples of {2 * per}")
        if frames < 1 or (frames - 1) % time:
            raise ValueError(
                f"num_frames={frames}: {self.name} takes one more than a multiple of {time}"
            )
        return TokenGrid(1 + (frames - 1) // time, height // 2 // space[0], width // 2 // space[1])

    def build(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The transformer with random weights."""
        import diffusers

        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = getattr(diffusers, self.transformer)(
                    num_attention_heads=self.heads,
                    attention_head_dim=self.head_dim,
                    **self.layers,
                    **self.config,
                )
        finally:
            torch.set_default_dtype(before)
        # As from_pretrained() leaves them.
        kept = model._keep_in_fp32_modules or ()
        for name, parameter in model.named_parameters():
            if any(part in name.split(".") for part in kept):
                parameter.data = parameter.data.float()
        return model.eval().requires_grad_(False)

    def inputs(
        self, grid: TokenGrid, device: str, dtype: torch.dtype, seed: int = 0
    ) -> dict[str, Any]:
        """Arguments of one forward but the timestep, of random numbers."""
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        latents = (self._channels, grid.frames, 2 * grid.height, 2 * grid.width)
        if self.family == "flux":
            rows, columns = torch.arange(grid.height), torch.arange(grid.width)
            ids = torch.cartesian_prod(torch.zeros(1), rows.float(), columns.float())
            return {
                "hidden_states": random(1, grid.numel, self._channels),
                "encoder_hidden_states": random(1, self.text, 4096),
                "pooled_projections": random(1, 768),
                "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
                "img_ids": ids.to(device),
                "txt_ids": torch.zeros(self.text, 3, device=device),
            }
        given: dict[str, Any] = {"hidden_states": random(1, *latents)}
        given["encoder_hidden_states"] = random(1, self.text, self._text_width)
        if self.family == "hunyuan_video":
            given["encoder_attention_mask"] = torch.ones(1, self.text, device=device, dtype=dtype)
            given["pooled_projections"] = random(1, 768)
            given["guidance"] = torch.full((1,), 6000.0, device=device, dtype=dtype)
        return given

    @property
    def _channels(self) -> int:
        return int(self.config.get("in_channels", 64 if self.family == "flux" else 16))

    @property
    def _text_width(self) -> int:
        return 1024 if self.family == "cosmos" else 4096

    def timestep(self, sigma: float, device: str, dtype: torch.dtype) -> Tensor:
        """What the forward calls the noise level ``sigma`` in [0, 1]."""
        scale = 1.0 if self.family == "flux" else 1000.0
        return torch.full((1,), scale * sigma, device=device, dtype=dtype)


def _wan(
    name: str, heads: int, layers: int, ffn: int, size: tuple[int, int, int], **more: Any
) -> Published:
    return Published(
        name, "wan", "WanTransformer3DModel", heads, {"num_layers": layers}, ffn, 512, size,
        **{"steps": 50, "forwards": 2, "config": {"ffn_dim": ffn}, **more},
    )  # fmt: skip


MODELS = {
    model.name: model
    for model in (
        Published(
            "hunyuan-video",
            "hunyuan_video",
            "HunyuanVideoTransformer3DModel",
            heads=24,
            layers={"num_layers": 20, "num_single_layers": 40},
            ffn=4 * 3072,
            text=256,
            size=(720, 1280, 129),
            steps=50,
        ),
        _wan("wan2.1-14b", 40, 40, 13824, (720, 1280, 81)),
        _wan("wan2.1-1.3b", 12, 30, 8960, (480, 832, 81)),
        Published(
            "flux-dev",
            "flux",
            "FluxTransformer2DModel",
            heads=24,
            layers={"num_layers": 19, "num_single_layers": 38},
            ffn=4 * 3072,
            text=512,
            size=(4096, 4096, 1),
            steps=28,
            config={"guidance_embeds": True},
        ),
        Published(
            "cosmos-7b",
            "cosmos",
            "CosmosTransformer3DModel",
            heads=32,
            layers={"num_layers": 28},
            ffn=4 * 4096,
            text=512,
            size=(704, 1280, 121),
            steps=35,
            forwards=2,
            compression=(8, 8, 8),
            # The padding mask is a channel like the others, but adding it takes torchvision.
            config={"in_channels": 17, "out_channels": 16, "concat_padding_mask": False},
        ),
        # Not published: Wan 2.1 1.3B with a third of its width and two blocks. At 20,160 tokens the
        # ratio of attention to all else lies between those of the 1.3B at 480p and at 720p.
        _wan("wan-narrow", 4, 2, 2986, (480, 512, 81), forwards=1),
    )
}


def published(name: str) -> Published:
    """The model of that name.

    Raises:
        ValueError: There is none; the message lists them.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r}: choose from {', '.join(MODELS)}")
    return MODELS[name]
