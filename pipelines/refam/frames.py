"""Pictures and clips, whatever they come as, as one tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_frames(pictures: Any) -> Tensor:
    """Pictures as fp32 ``[frames, 3, height, width]`` in [0, 1]; grey ones become RGB.

    Args:
        pictures: PIL images or arrays ``[height, width(, channels)]``; a torch tensor may be
            ``[frames, channels, height, width]``, as `gen_accel.eval.video` reads it.

    Raises:
        ValueError: No picture, another shape or other values, sizes that differ, or transparency.
    """
    if isinstance(pictures, Tensor) and pictures.ndim == 4 and pictures.shape[1] in (1, 3, 4):
        pictures = pictures.movedim(1, -1)
    frames = [_frame(p) for p in pictures]
    if not frames:
        raise ValueError("a video without frames; pass at least one")
    shapes = {tuple(f.shape[1:]) for f in frames}
    if len(shapes) > 1:
        raise ValueError(f"frames of different sizes: {sorted(shapes)}")
    return torch.stack(frames)


def _frame(picture: Any) -> Tensor:
    if hasattr(picture, "convert"):  # PIL
        if picture.mode not in ("RGB", "RGBA", "L"):
            picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
        picture = np.asarray(picture)
    x = torch.from_numpy(np.asarray(picture).copy())
    if x.ndim == 2:
        x = x[..., None]
    if x.ndim != 3 or x.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"a picture of shape {tuple(x.shape)}: give [height, width], [height, width, 3] or a "
            "PIL image"
        )
    whole = x.dtype == torch.uint8
    x = x.float() / 255 if whole else x.float()
    if not bool(x.isfinite().all()) or x.min() < 0 or x.max() > 1:
        raise ValueError("a picture with values outside [0, 1]: give uint8, or floats in [0, 1]")
    if x.shape[-1] == 4:
        if bool((x[..., 3] < 1).any()):
            raise ValueError("a picture with transparency: put it on a background, as RGB")
        x = x[..., :3]
    return x.expand(*x.shape[:2], 3).permute(2, 0, 1).contiguous()
