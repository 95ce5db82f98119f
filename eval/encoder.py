"""``fvd-toy``: a small video encoder, so that feature metrics run where no weights are.

It was trained from scratch in the procedural world of `gen_accel.eval.world` and sees what that
world has: colours, shapes, effects, motion, backgrounds, the order of frames. Its numbers compare
with each other and with nothing else; they are not FVD.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.eval.world.scene import BACKGROUNDS, COLOURS, DIRECTIONS, EFFECTS, SHAPES

FOLDER = Path(__file__).resolve().parent.parent / "models" / "fvd-toy"
SIZE = 32  # side of the frames it sees, as in the world
# Attribute -> its values. A clip has several colours, and exactly one background.
SEVERAL = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "effect": EFFECTS,
    "motion": (*DIRECTIONS, "still"),
    "order": ("shuffled",),
}
ONE = {"background": BACKGROUNDS}
HEADS = {**SEVERAL, **ONE}
_WIDTHS = (32, 64, 96, 128)


class VideoEncoder(nn.Module):
    """Four 3-D convolutions and a mean over space and time.

    Args:
        widths: Channels of the layers; the last is the number of features.
    """

    def __init__(self, widths: tuple[int, ...] = _WIDTHS) -> None:
        super().__init__()
        self.widths = tuple(widths)
        a, b, c, d = self.widths
        self.layers = nn.Sequential(
            _layer(3, a, (3, 5, 5), (1, 2, 2)),
            _layer(a, b, (3, 3, 3), (1, 2, 2)),
            _layer(b, c, (3, 3, 3), (2, 1, 1)),
            _layer(c, c, (1, 3, 3), (1, 2, 2)),
            _layer(c, d, (3, 1, 1), (1, 1, 1)),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(d, len(v)) for name, v in HEADS.items()})

    def forward(self, video: Tensor) -> Tensor:
        """Features of clips.

        Args:
            video: ``[batch, frames, 3, height, width]``, float in [0, 1], at least two frames.

        Returns:
            ``[batch, features]``.
        """
        return self.layers(_shrink(video).transpose(1, 2)).mean(dim=(2, 3, 4))

    def attributes(self, features: Tensor) -> dict[str, Tensor]:
        """Logits of the attributes in `HEADS`, ``[batch, values]`` each."""
        return {name: head(features) for name, head in self.heads.items()}


def load_encoder(folder: str | Path = FOLDER) -> VideoEncoder:
    """The trained encoder, in evaluation mode.

    Raises:
        ValueError: There is none in ``folder``; clones have it, the wheel does not.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"{folder}: no fvd-toy there; a clone has it in models/fvd-toy, the wheel does not: "
            "copy it, or train it with tools/train_fvd_toy.py"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    encoder = VideoEncoder(tuple(config["widths"]))
    encoder.load_state_dict(load_file(folder / "model.safetensors"))
    return encoder.eval()


def _layer(
    inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> nn.Sequential:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    # A clip's own statistics: features must not depend on who shares the batch.
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def _shrink(video: Tensor) -> Tensor:
    """Frames of `SIZE`, values in [-1, 1]."""
    if video.shape[-2:] != (SIZE, SIZE):
        frames = F.interpolate(
            video.flatten(0, 1), (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True
        )
        video = frames.view(*video.shape[:3], SIZE, SIZE)
    return video * 2 - 1
