"""The demo's other half: what clips of a trained model lose.

Too small to be faster: it has 576 video tokens. But it draws what it is told, so one can see what
goes when blocks are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.eval.fidelity import psnr
from gen_accel.eval.report import Media
from gen_accel.eval.toys import load_toy, toy_call, trained_toys
from gen_accel.eval.video import write_video
from gen_accel.install import apply
from gen_accel.processors import ParoProcessor, SparseProcessor

MODEL = "hunyuan-video"
PROMPTS = (
    "a red circle with a shadow moving right on a plain background",
    "a blue square moving down on a plain background",
    "a green triangle with a glow standing still on a gradient background",
)
STEPS = 12
BLOCK = 16
ZOOM = 6
FPS = 6


@dataclass(frozen=True)
class Trained:
    """What the trained toy shows.

    Attributes:
        clips: Prompt -> players, the dense one first.
        psnr: Method -> dB to the dense clip, for each prompt.
        density: Method -> kept share of the blocks, mean over the sparse calls of the last prompt.
    """

    clips: dict[str, list[Media]]
    psnr: dict[str, list[float]]
    density: dict[str, float]

    @property
    def summary(self) -> str:
        """One sentence, with the mean over the prompts."""
        means = ", ".join(f"{name} {fmean(values):.1f} dB" for name, values in self.psnr.items())
        return (
            f"A small trained model (toy-{MODEL}), {STEPS} steps, PSNR to the dense clip, mean of "
            f"{len(self.clips)}: {means}."
        )


def run_trained(folder: Path, density: float, dense_steps: float) -> Trained | None:
    """Render each prompt dense and with two processors into ``folder``.

    Args:
        folder: Gets trained.<prompt>.<method>.mp4.
        density: Share of the attention blocks to keep.
        dense_steps: First share of the steps that stays dense.

    Returns:
        None when there is no trained model: the wheel has none.
    """
    if MODEL not in trained_toys():
        return None
    pipe = load_toy(MODEL)
    dense = [_render(pipe, number) for number in range(len(PROMPTS))]
    shown: dict[str, list[Tensor]] = {"dense": dense}
    found: dict[str, list[float]] = {}
    kept: dict[str, float] = {}
    common: Any = {
        "density": density, "dense_steps": dense_steps, "block": BLOCK, "min_tokens": 0
    }  # fmt: skip
    for name, policy in (
        ("PARO", ParoProcessor(**common)),
        ("SparseProcessor", SparseProcessor(**common)),
    ):
        with apply(pipe, policy) as handle:
            shown[name] = [_render(pipe, number) for number in range(len(PROMPTS))]
            kept[name] = handle.stats()["transformer"].mean_density
        found[name] = [float(psnr(a, b)) for a, b in zip(shown[name], dense)]
    clips: dict[str, list[Media]] = {}
    for number, prompt in enumerate(PROMPTS):
        row = clips[prompt] = []
        for name, videos in shown.items():
            file = f"trained.{number}.{name.lower()}.mp4"
            write_video(folder / file, F.interpolate(videos[number], scale_factor=ZOOM), fps=FPS)
            near = f", {found[name][number]:.1f} dB" if name in found else ""
            row.append(Media(file, name + near))
    return Trained(clips, found, kept)


def _render(pipe: Any, number: int) -> Tensor:
    """Frames ``[frames, 3, height, width]`` in [0, 1]."""
    call = {**toy_call(MODEL), "num_inference_steps": STEPS, "output_type": "pt"}
    generator = torch.Generator().manual_seed(number + 1)
    return pipe(prompt=PROMPTS[number], generator=generator, **call).frames[0].clamp(0, 1)
