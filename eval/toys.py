"""The toy models: loading, and the few calls that treat the three families alike."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODELS = Path(__file__).resolve().parent.parent / "models"


@dataclass(frozen=True)
class Toy:
    """What a caller must know about one toy model.

    Attributes:
        pipeline: Name of its diffusers class.
        frames: Frames per clip, 1 for images.
        call: Arguments of the pipeline's call that the model was trained for.
    """

    pipeline: str
    frames: int
    call: dict[str, Any] = field(default_factory=dict)


_CALL = {"height": 32, "width": 32, "num_inference_steps": 24, "max_sequence_length": 32}
TOYS = {
    "hunyuan-video": Toy(
        "HunyuanVideoPipeline",
        9,
        {**_CALL, "num_frames": 9, "true_cfg_scale": 3.0, "negative_prompt": ""},
    ),
    # Without temporal compression WanPipeline "rounds" n frames to n + 1: eight give nine.
    "wan": Toy(
        "WanPipeline", 9, {**_CALL, "num_frames": 8, "guidance_scale": 3.0, "negative_prompt": ""}
    ),
    "flux": Toy("FluxPipeline", 1, {**_CALL, "true_cfg_scale": 3.0, "negative_prompt": ""}),
}


def _toy(name: str) -> Toy:
    if name not in TOYS:
        raise ValueError(f"model={name!r}: the toys are {', '.join(TOYS)}")
    return TOYS[name]


def toy_call(name: str) -> dict[str, Any]:
    """Arguments for ``pipe(prompt, **toy_call(name))``; a fresh dictionary each time.

    Raises:
        ValueError: For an unknown name.
    """
    return dict(_toy(name).call)


def toy_name(pipe: DiffusionPipeline) -> str:
    """Which toy a pipeline is, by its class.

    Raises:
        ValueError: When it is none of them.
    """
    for name, toy in TOYS.items():
        if type(pipe).__name__ == toy.pipeline:
            return name
    raise ValueError(f"{type(pipe).__name__}: the toys are {[t.pipeline for t in TOYS.values()]}")


def trained_toys() -> list[str]:
    """Names of the toys whose weights this clone holds; none when installed from the wheel."""
    return [n for n in TOYS if (MODELS / f"toy-{n}" / "model_index.json").is_file()]


def load_toy(name: str, folder: str | Path | None = None, **kwargs: Any) -> DiffusionPipeline:
    """Loads a trained toy pipeline.

    The models stand in ``models/`` of the repository and are not part of the wheel.

    Args:
        name: ``hunyuan-video``, ``wan`` or ``flux``.
        folder: Where the model is; the clone's ``models/toy-<name>`` when None.
        **kwargs: Passed to ``from_pretrained``.

    Returns:
        The stock diffusers pipeline. ``toy_call(name)`` holds the arguments of its call.

    Raises:
        ValueError: For an unknown name.
        FileNotFoundError: When there is no model.
    """
    toy = _toy(name)
    path = Path(folder) if folder is not None else MODELS / f"toy-{name}"
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{path}: no model there; a clone has {trained_toys()}, the wheel none: train it "
            f"(tools/train_toy.py) or pass folder="
        )
    pipeline = getattr(importlib.import_module("diffusers"), toy.pipeline)
    pipe = pipeline.from_pretrained(path, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encode_text(pipe: Any, prompts: list[str], max_length: int = 32) -> dict[str, torch.Tensor]:
    """The transformer's text arguments for some prompts, as the pipeline would pass them.

    Args:
        pipe: A toy pipeline.
        prompts: Texts.
        max_length: Text tokens, padded.

    Returns:
        Keyword arguments of the transformer, on the transformer's device.
    """
    device, name = pipe.transformer.device, toy_name(pipe)
    dtype = pipe.transformer.dtype
    if name == "wan":
        embeds = pipe._get_t5_prompt_embeds(prompts, max_sequence_length=max_length, device=device)
        return {"encoder_hidden_states": embeds.to(dtype)}
    if name == "flux":
        embeds, pooled, ids = pipe.encode_prompt(
            prompt=prompts, prompt_2=prompts, max_sequence_length=max_length, device=device
        )
        return {
            "encoder_hidden_states": embeds.to(dtype),
            "pooled_projections": pooled.to(dtype),
            "txt_ids": ids,
        }
    embeds, pooled, mask = pipe.encode_prompt(
        prompt=prompts, max_sequence_length=max_length, device=device
    )
    return {
        "encoder_hidden_states": embeds.to(dtype),
        "pooled_projections": pooled.to(dtype),
        "encoder_attention_mask": mask.to(dtype),
    }


def velocity(
    pipe: Any, latents: torch.Tensor, sigma: torch.Tensor, text: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Predicted velocity, noise minus data, of the rectified flow.

    Args:
        pipe: A toy pipeline.
        latents: ``[B, 3, F, H, W]`` (video) or ``[B, 3, H, W]`` (image); pixels in [-1, 1]
            when sigma is 0.
        sigma: ``[B]`` noise levels, 0 is data and 1 is noise.
        text: From ``encode_text``.

    Returns:
        Same shape as ``latents``.
    """
    if toy_name(pipe) != "flux":
        return pipe.transformer(
            hidden_states=latents, timestep=sigma * 1000, return_dict=False, **text
        )[0]
    b, c, h, w = latents.shape
    ids = pipe._prepare_latent_image_ids(b, h // 2, w // 2, latents.device, latents.dtype)
    out = pipe.transformer(
        hidden_states=pipe._pack_latents(latents, b, c, h, w),
        timestep=sigma,
        img_ids=ids,
        return_dict=False,
        **text,
    )[0]
    return pipe._unpack_latents(out, h, w, pipe.vae_scale_factor)


def to_latents(video: Any) -> torch.Tensor:
    """Frames ``[B, T, H, W, 3]`` in [0, 1] as latents ``[B, 3, T, H, W]`` in [-1, 1].

    The toys' VAEs are the identity, so this equals encoding.
    """
    return torch.as_tensor(video).float().permute(0, 4, 1, 2, 3).mul(2).sub(1).contiguous()
