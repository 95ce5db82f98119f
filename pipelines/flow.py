"""A video pipeline as a rectified flow: pixels to latents, text, velocity, noise levels, one step.

What differs between HunyuanVideo and Wan is here and nowhere else. Noise levels run from 0 (data)
to 1 (noise).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gen_accel.families import family_of
from gen_accel.families.base import Family
from gen_accel.layout import TokenLayout

SOLVERS = ("euler", "midpoint")
# Velocity at a point of a step: (latents, sigma, stage), stage 0 at the beginning, 1 in the middle.
Velocity = Callable[[Tensor, float, int], Tensor]
Text = dict[str, Tensor]


class VideoFlow:
    """Adapter of one pipeline.

    Args:
        pipe: A HunyuanVideo or Wan text-to-video pipeline.
        max_sequence_length: Text tokens; None: the pipeline's default.
        prompt_template: HunyuanVideo's; None: the pipeline's default.

    Raises:
        ValueError: A pipeline that is not a plain rectified flow with one transformer.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        max_sequence_length: int | None = None,
        prompt_template: dict[str, Any] | None = None,
    ) -> None:
        self.pipe = pipe
        self.family = video_family(pipe.transformer)
        if getattr(pipe, "transformer_2", None) is not None or pipe.config.get("expand_timesteps"):
            raise ValueError("Wan 2.2 (two experts, or a timestep per token): use Wan 2.1 here")
        check_uncached(pipe.transformer)
        self.options: dict[str, Any] = {}
        if max_sequence_length is not None:
            self.options["max_sequence_length"] = max_sequence_length
        if prompt_template is not None:
            self.options["prompt_template"] = prompt_template

    @property
    def shift(self) -> float:
        """The scheduler's shift of the noise levels.

        Raises:
            ValueError: It has none of its own.
        """
        config = self.pipe.scheduler.config
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                f"{type(self.pipe.scheduler).__name__} with use_dynamic_shifting has no shift of "
                "its own: pass shift=..., or give the pipeline a scheduler without"
            )
        return float(config.get("shift") or config.get("flow_shift") or 1.0)

    @property
    def temporal(self) -> int:
        """Frames per latent frame."""
        return self.pipe.vae_scale_factor_temporal

    @cached_property
    def layers(self) -> int:
        """Attention layers over the video, counted as in `gen_accel.apply`."""
        keep = self.family.keep
        modules = self.pipe.transformer.named_modules()
        taken = (
            keep(n, m) in (None, "already accelerated")
            for n, m in modules
            if hasattr(m, "processor")
        )
        return sum(taken)

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return self.pipe._execution_device

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latents per token along frames, height and width."""
        config = self.pipe.transformer.config
        if self.family.name == "wan":
            return tuple(config.patch_size)
        return config.patch_size_t, config.patch_size, config.patch_size

    def encode(self, video: Tensor) -> Tensor:
        """Latents ``[batch, channels, frames, height, width]``, fp32.

        Args:
            video: ``[batch, frames, 3, height, width]`` in [0, 1].

        Raises:
            ValueError: Frames or sides do not fit the VAE and the patches.
        """
        vae, (t, h, w) = self.pipe.vae, self.patch
        space, frames = self.pipe.vae_scale_factor_spatial, video.shape[1]
        for size, unit in ((video.shape[3], space * h), (video.shape[4], space * w)):
            if size % unit:
                raise ValueError(
                    f"frames of {video.shape[3]}x{video.shape[4]} pixels: sides must divide by "
                    f"{unit}; crop or resize"
                )
        if (frames - 1) % (self.temporal * t):
            step = self.temporal * t
            raise ValueError(
                f"{frames} frames: this model takes k*{step}+1; cut to "
                f"{(frames - 1) // step * step + 1}"
            )
        pixels = (video.movedim(2, 1) * 2 - 1).to(self.device, vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode().float()
        mean, scale = self._scales(latents)
        return (latents - mean) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """``[batch, frames, 3, height, width]`` in [0, 1]."""
        vae = self.pipe.vae
        mean, scale = self._scales(latents)
        pixels = vae.decode((latents / scale + mean).to(vae.dtype), return_dict=False)[0]
        return (pixels.float().movedim(1, 2) / 2 + 0.5).clamp(0, 1)

    def text(self, prompts: list[str]) -> Text:
        """The transformer's text arguments, padding that all prompts share cut off."""
        dtype = self.pipe.transformer.dtype
        if self.family.name == "wan":  # its padding is attended to
            # The default of the pipeline's call; that of encode_prompt alone is 226.
            options = {"max_sequence_length": 512, **self.options}
            embeds, _ = self.pipe.encode_prompt(
                prompts, do_classifier_free_guidance=False, device=self.device, **options
            )
            return {"encoder_hidden_states": embeds.to(dtype)}
        embeds, pooled, mask = self.pipe.encode_prompt(prompts, device=self.device, **self.options)
        longest = int(mask.sum(dim=1).max())
        return {
            "encoder_hidden_states": embeds[:, :longest].to(dtype),
            "encoder_attention_mask": mask[:, :longest].to(dtype),
            "pooled_projections": pooled.to(dtype),
        }

    def layout(self, latents: Tensor, text: Text) -> TokenLayout:
        """Where video and text tokens stand in the attention calls."""
        return self.family.layout(
            self.pipe.transformer, (), {"hidden_states": latents, "timestep": 0, **text}
        )

    def velocity(self, latents: Tensor, sigma: float, text: Text, guidance: float = 1.0) -> Tensor:
        """Predicted noise minus data, fp32.

        Args:
            latents: ``[batch, channels, frames, height, width]``.
            sigma: Noise level.
            text: From `text`.
            guidance: Embedded guidance of distilled models (HunyuanVideo); others ignore it.
        """
        transformer = self.pipe.transformer
        batch = len(latents)
        extra = {}
        if transformer.config.get("guidance_embeds"):
            extra["guidance"] = latents.new_full((batch,), 1000 * guidance, dtype=transformer.dtype)
        return transformer(
            hidden_states=latents.to(transformer.dtype),
            timestep=latents.new_full((batch,), 1000 * sigma),
            return_dict=False,
            **text,
            **extra,
        )[0].float()

    def sigmas(self, steps: int, shift: float | None = None) -> list[float]:
        """Noise levels from 0 to 1, ``steps + 1`` of them; ``shift`` None: the scheduler's."""
        shift = self.shift if shift is None else shift
        levels = [i / steps for i in range(steps + 1)]
        return [shift * u / (1 + (shift - 1) * u) for u in levels]

    def announce(self, levels: Sequence[float]) -> None:
        """Tell accelerating processors, which watch the scheduler, of a new run of steps.

        Args:
            levels: Where each step begins. They rise in an inversion, and by them a plan finds
                its step group.
        """
        announce(self.pipe, levels)

    def _scales(self, latents: Tensor) -> tuple[Any, Any]:
        """The VAE's mean and one over its deviation."""
        config = self.pipe.vae.config
        if self.family.name == "hunyuan_video":
            return 0.0, config.scaling_factor
        mean, deviation = (
            torch.tensor(x, device=latents.device).view(1, -1, 1, 1, 1)
            for x in (config.latents_mean, config.latents_std)
        )
        return mean, 1 / deviation


def announce(pipe: Any, levels: Sequence[float]) -> None:
    """`VideoFlow.announce` for any pipeline of a rectified flow."""
    scheduler = pipe.scheduler
    # A scheduler that shifts by the picture's size asks for mu; the levels are ours all the same.
    mu = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(len(levels), device=pipe._execution_device, **mu)
    scheduler.sigmas = torch.tensor(levels)


def check_uncached(transformer: Any) -> None:
    """Refuse diffusers' caches, which count the steps of a run that is not ours.

    Raises:
        ValueError: One is enabled.
    """
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            f"{type(transformer).__name__} has a cache of diffusers enabled, which skips blocks "
            "that have to run here; call transformer.disable_cache() first"
        )


def video_family(transformer: Any) -> Family:
    """The family of a transformer whose videos can be inverted.

    Raises:
        ValueError: Another one.
    """
    family = family_of(transformer)
    if family.name not in ("hunyuan_video", "wan"):
        raise ValueError(
            f"{type(transformer).__name__}: a video is inverted with HunyuanVideo or Wan"
        )
    return family


def step(latents: Tensor, now: float, after: float, solver: str, velocity: Velocity) -> Tensor:
    """One step of the flow from noise level ``now`` to ``after``, in either direction.

    ``"midpoint"`` evaluates twice; RF-Solver's update is the same rule written differently.
    """
    first = velocity(latents, now, 0)
    if solver == "euler":
        return latents + (after - now) * first
    middle = latents + (after - now) / 2 * first
    return latents + (after - now) * velocity(middle, (now + after) / 2, 1)


def check_solver(solver: str) -> int:
    """Evaluations per step.

    Raises:
        ValueError: No such solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: choose one of {', '.join(SOLVERS)}")
    return 1 + SOLVERS.index(solver)


def as_batch(values: Any, batch: int, name: str) -> list[Any]:
    """One value for each clip: a list is one each, anything else is for all.

    Raises:
        ValueError: The list has another length.
    """
    if not isinstance(values, list):
        return [values] * batch
    if len(values) != batch:
        raise ValueError(f"{name} lists {len(values)} and there are {batch} clips; give one each")
    return values


def tokens_to_latents(mask: Tensor, patch: Sequence[int]) -> Tensor:
    """A token mask ``[batch, frames, height, width]`` on the latents, ``[batch, 1, ...]``."""
    for axis, size in enumerate(patch, start=1):
        mask = mask.repeat_interleave(size, dim=axis)
    return mask[:, None]
