"""FLUX, HunyuanVideo and Wan as one thing: pixels to latents, and one forward at a noise level."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.layout import TokenGrid
from gen_accel.pipelines.flow import Text, VideoFlow, announce, check_uncached


class Backbone:
    """Adapter of one pipeline.

    Args:
        pipe: A FLUX, HunyuanVideo or Wan pipeline.
        guidance: Embedded guidance of distilled models; others ignore it.
        max_sequence_length: Text tokens; None: the pipeline's default.
        prompt_template: HunyuanVideo's; None: the pipeline's default.

    Raises:
        ValueError: Another pipeline, or one whose transformer has a cache of diffusers enabled.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        guidance: float = 1.0,
        max_sequence_length: int | None = None,
        prompt_template: dict[str, Any] | None = None,
    ) -> None:
        kind = type(getattr(pipe, "transformer", None)).__name__
        if not kind.startswith(("Flux", "HunyuanVideo", "Wan")) or kind.startswith("Flux2"):
            raise ValueError(
                f"{type(pipe).__name__}: RefAM reads FLUX.1, HunyuanVideo and Wan pipelines"
            )
        check_uncached(pipe.transformer)
        self.pipe = pipe
        self.guidance = guidance
        self.options: dict[str, Any] = {}
        if max_sequence_length is not None:
            self.options["max_sequence_length"] = max_sequence_length
        if prompt_template is not None:
            self.options["prompt_template"] = prompt_template
        self.flow = None if kind.startswith("Flux") else VideoFlow(pipe, **self.options)

    @property
    def transformer(self) -> Any:
        """The model that is read."""
        return self.pipe.transformer

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.pipe._execution_device

    def fit(self, video: Tensor) -> Tensor:
        """Resize frames and repeat the last one until the model takes them.

        Args:
            video: ``[frames, 3, height, width]`` in [0, 1].
        """
        flow = self.flow
        if flow is None:
            unit, frames = (2 * self.pipe.vae_scale_factor,) * 2, 1
        else:
            t, h, w = flow.patch
            space = self.pipe.vae_scale_factor_spatial
            unit, frames = (space * h, space * w), flow.temporal * t
        size = [max(u, round(s / u) * u) for s, u in zip(video.shape[2:], unit)]
        if size != list(video.shape[2:]):
            video = F.interpolate(video, size=size, mode="bilinear", antialias=True)
        missing = -(len(video) - 1) % frames
        return torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])

    def encode(self, video: Tensor) -> Tensor:
        """Latents of clips that fit; an image model's are ``[batch, channels, height, width]``.

        Args:
            video: ``[batch, frames, 3, height, width]`` in [0, 1].

        Raises:
            ValueError: More than one frame for FLUX.
        """
        if self.flow is not None:
            return self.flow.encode(video)
        if video.shape[1] != 1:
            raise ValueError(
                f"{video.shape[1]} frames: FLUX takes single images; pass image=, or a video model"
            )
        vae = self.pipe.vae
        pixels = (video[:, 0] * 2 - 1).to(self.device, vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode().float()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def text(self, prompts: list[str]) -> Text:
        """The transformer's text arguments."""
        if self.flow is not None:
            return self.flow.text(prompts)
        embeds, pooled, ids = self.pipe.encode_prompt(
            prompt=prompts, prompt_2=prompts, device=self.device, **self.options
        )
        dtype = self.transformer.dtype
        return {
            "encoder_hidden_states": embeds.to(dtype),
            "pooled_projections": pooled.to(dtype),
            "txt_ids": ids,
        }

    def grid(self, latents: Tensor) -> TokenGrid:
        """The token grid of latents."""
        if self.flow is None:
            return TokenGrid(1, latents.shape[2] // 2, latents.shape[3] // 2)
        return TokenGrid(*(s // p for s, p in zip(latents.shape[2:], self.flow.patch)))

    def frames(self, grid: TokenGrid, frames: int) -> list[int]:
        """The token frame of each of ``frames`` video frames."""
        if self.flow is None:
            return [0] * frames
        step = self.flow.temporal
        # The VAE packs the first frame alone, then `step` frames into each latent frame.
        return [min(-(-f // step) // self.flow.patch[0], grid.frames - 1) for f in range(frames)]

    @torch.no_grad()
    def forward(self, latents: Tensor, sigma: float, text: Text) -> Tensor:
        """One forward of the transformer; what it predicts is of no interest.

        Accelerating processors are told of it: it is a run of one step, whatever ran before.
        """
        announce(self.pipe, [sigma])
        if self.flow is not None:
            return self.flow.velocity(latents, sigma, text, self.guidance)
        dtype, (batch, channels, height, width) = self.transformer.dtype, latents.shape
        extra = {}
        if self.transformer.config.guidance_embeds:
            extra["guidance"] = latents.new_full((batch,), self.guidance, dtype=dtype)
        packed = self.pipe._pack_latents(latents, batch, channels, height, width)
        ids = self.pipe._prepare_latent_image_ids(
            batch, height // 2, width // 2, latents.device, dtype
        )
        return self.transformer(
            hidden_states=packed.to(dtype),
            timestep=latents.new_full((batch,), sigma, dtype=dtype),
            img_ids=ids,
            return_dict=False,
            **text,
            **extra,
        )[0]
