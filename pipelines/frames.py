"""Pictures, clips and masks, whatever they come as, as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHANNELS = (1, 3, 4)
_ROUNDING = 1e-3  # by so much may a decoder in half precision leave [0, 1]


def to_clips(video: Any) -> Tensor:
    """A clip, or a batch of clips, as fp32 ``[batch, frames, 3, height, width]`` in [0, 1].

    Args:
        video: As for `to_frames`; a batch is a list of those, or an array or tensor with one axis
            more.

    Raises:
        ValueError: As for `to_frames`, or clips of different lengths or sizes.
    """
    clips = [to_frames(clip) for clip in (video if _depth(video) > 4 else [video])]
    shapes = {(len(clip), *clip.shape[2:]) for clip in clips}
    if len(shapes) > 1:
        raise ValueError(
            f"clips of different frames, height and width: {sorted(shapes)}; call once for each"
        )
    return torch.stack(clips)


def to_frames(pictures: Any) -> Tensor:
    """Pictures as fp32 ``[frames, 3, height, width]`` in [0, 1]; grey ones become RGB.

    Args:
        pictures: PIL images, arrays or tensors, in a list or stacked: ``[height, width]`` or with
            channels, uint8 or floats in [0, 1] of any precision, on any device. Channels stand
            first or last; where both would do, first in a tensor and last in an array.

    Raises:
        ValueError: No picture, another shape or other values, sizes that differ, or transparency.
    """
    stacked = isinstance(pictures, np.ndarray | Tensor)
    if not (stacked or isinstance(pictures, list | tuple)) or (stacked and pictures.ndim < 3):
        kind = tuple(pictures.shape) if stacked else type(pictures).__name__
        raise ValueError(
            f"a video of {kind}: give a list of PIL images, or an array or tensor "
            "[frames, 3, height, width] or [frames, height, width, 3]"
        )
    if not len(pictures):
        raise ValueError("a video without frames; pass at least one")
    frames = [_frame(picture) for picture in pictures]
    shapes = {tuple(f.shape[1:]) for f in frames}
    if len(shapes) > 1:
        raise ValueError(f"frames of different sizes: {sorted(shapes)}")
    return torch.stack(frames)


def to_masks(mask: Any, batch: int, frames: int, size: tuple[int, int]) -> Tensor:
    """What a mask covers, bool ``[batch, frames, height, width]``: where it is not 0.

    Args:
        mask: PIL image, array or tensor, or lists of those: one mask for all frames, one for each
            frame, or a batch of either. An axis of channels does no harm.
        batch: Clips.
        frames: Frames of each.
        size: Height and width.

    Raises:
        ValueError: It does not fit the clips.
    """
    given = covered = _covered(mask)
    if covered.shape[-2:] != size and covered.shape[-3:-1] == size:  # channels last
        covered = covered[..., :3].any(-1)
    fits = ((), (1,), (frames,), (batch, 1), (batch, frames))
    if covered.ndim > 3 and covered.shape[:-2] not in fits and covered.shape[-3] in _CHANNELS:
        covered = covered[..., :3, :, :].any(-3)
    if covered.shape[-2:] != size or covered.shape[:-2] not in fits:
        raise ValueError(
            f"mask of shape {tuple(given.shape)} for {batch} clips of {frames} frames of "
            f"{size[0]}x{size[1]}: give one mask for all frames, or one of the same size for each"
        )
    return covered.expand(batch, frames, *size)


def _depth(x: Any) -> int:
    """Axes of a picture, a list of pictures, ...; a picture counts as having channels."""
    if isinstance(x, list | tuple):
        return 1 + (_depth(x[0]) if x else 0)
    return 3 if _is_pil(x) else getattr(x, "ndim", 0)


def _frame(picture: Any) -> Tensor:
    if _is_pil(picture) and picture.mode not in ("RGB", "RGBA", "L"):
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    x = _tensor(picture)
    first = x.ndim == 3 and x.shape[0] in _CHANNELS
    last = x.ndim == 3 and x.shape[2] in _CHANNELS
    if first and not (last and not isinstance(picture, Tensor)):
        x = x.movedim(0, -1)
    elif x.ndim == 2:
        x = x[..., None]
    elif not last:
        raise ValueError(
            f"a picture of shape {tuple(x.shape)}: give [height, width], [height, width, 3], "
            "[3, height, width] or a PIL image, so [frames, 3, height, width] for a video"
        )
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if not x.numel():
        raise ValueError(f"a picture of shape {tuple(x.shape)}: it has no pixels")
    low, high = float(x.min()), float(x.max())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise ValueError(
            f"a picture with values outside [0, 1], from {low:g} to {high:g}: divide by 255, or "
            "give uint8"
        )
    if x.shape[-1] == 4:
        if bool((x[..., 3] < 1 - _ROUNDING).any()):
            raise ValueError("a picture with transparency: put it on a background, as RGB")
        x = x[..., :3]
    return x.clamp(0, 1).expand(*x.shape[:2], 3).permute(2, 0, 1).contiguous()


def _covered(mask: Any) -> Tensor:
    if isinstance(mask, list | tuple) and mask:
        parts = [_covered(part) for part in mask]
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"masks of different shapes: {sorted(shapes)}")
        return torch.stack(parts)
    if _is_pil(mask):
        return (_tensor(mask.convert("RGB")) != 0).any(-1)
    return _tensor(mask) != 0


def _tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach()
    array = np.array(x)  # a copy: torch takes no negative strides and warns of read-only memory
    if array.dtype.kind not in "buif":
        raise ValueError(f"{type(x).__name__}: give numbers, as a PIL image, an array or a tensor")
    return torch.from_numpy(array)


def _is_pil(x: Any) -> bool:
    return hasattr(x, "convert") and hasattr(x, "mode")
