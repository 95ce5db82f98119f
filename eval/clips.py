"""Walks clips frame by frame, so that a metric holds a frame in float64 and never a video."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def over_frames(measure: Callable[..., Tensor], *videos: Tensor) -> Tensor:
    """``measure`` of frame t of every video, ``[..., frames]`` plus the axes it returns.

    Args:
        measure: Gets one frame ``[channels, height, width]`` of each video as float64 in [0, 1];
            of a mask ``[height, width]``, bool.
        videos: One clip ``[frames, channels, height, width]`` or a batch; uint8 or float in
            [0, 1]. Masks have no channels. All the same number of frames.

    Raises:
        ValueError: No clip, unequal shapes, or values that are not finite or outside [0, 1].
    """
    batch = check(*videos)
    clips = [as_batch(video) for video in videos]
    rows = [
        torch.stack([measure(*_units(frames)) for frames in zip(*clip, strict=True)])
        for clip in zip(*clips, strict=True)
    ]
    return torch.stack(rows).unflatten(0, batch) if batch else rows[0]


def over_pairs(measure: Callable[..., Tensor], *videos: Tensor) -> Tensor:
    """``measure`` of frames t and t + 1 of every video, ``[..., frames - 1]``.

    Args:
        measure: Gets frame t and frame t + 1 of the first video, then of the second, and so on.
        videos: As for `over_frames`.

    Raises:
        ValueError: As for `over_frames`, or there is only one frame.
    """
    batch = check(*videos)
    frames = _frames(videos[0])
    if frames < 2:
        raise ValueError("a video of one frame: a metric over time needs at least two")
    rows = []
    for clip in zip(*map(as_batch, videos), strict=True):
        current = _units(video[0] for video in clip)
        values = []
        for t in range(1, frames):
            following = _units(video[t] for video in clip)
            values.append(measure(*(f for both in zip(current, following) for f in both)))
            current = following
        rows.append(torch.stack(values))
    return torch.stack(rows).unflatten(0, batch) if batch else rows[0]


def check(*videos: Tensor) -> tuple[int, ...]:
    """The batch axes of clips that belong together: ``()`` or ``(batch,)``.

    Raises:
        ValueError: No clip, or unequal shapes.
    """
    first = videos[0]
    if first.ndim - _is_video(first) not in (3, 4) or 0 in first.shape:
        wanted = "[frames, channels, height, width]" if _is_video(first) else "[frames, h, w]"
        raise ValueError(
            f"shape {tuple(first.shape)}: expected {wanted}, or a batch of those; unsqueeze(0) "
            "makes an image a clip of one frame"
        )
    for other in videos[1:]:
        if _is_video(other) == _is_video(first):
            equal = other.shape == first.shape
        else:
            equal = other.shape == (*first.shape[:-3], *first.shape[-2:])
        if not equal:
            raise ValueError(
                f"shapes {tuple(first.shape)} and {tuple(other.shape)} differ; clips that are "
                "compared have equal shapes, and a mask has its video's without the channels"
            )
    return tuple(first.shape[: first.ndim - 3 - _is_video(first)])


def unit(frame: Tensor) -> Tensor:
    """Values as float64 in [0, 1]; float32 moments lose SSIM's fourth decimal in flat areas.

    Raises:
        ValueError: Another dtype than uint8 or float, values not finite or outside [0, 1].
    """
    if frame.dtype == torch.bool:
        return frame
    if frame.device.type == "mps":
        frame = frame.cpu()  # no float64 there
    require_unit(frame)
    return frame.double() / 255 if frame.dtype == torch.uint8 else frame.double()


def require_unit(frames: Tensor) -> None:
    """Raise ValueError unless these are uint8, or floats in [0, 1]; NaN is not."""
    if frames.dtype == torch.uint8:
        return
    if not frames.is_floating_point():
        raise ValueError(f"dtype {frames.dtype}: expected uint8 or a float dtype in [0, 1]")
    low, high = float(frames.min()), float(frames.max())
    # Written so that NaN fails too. The margin is for decoders that overshoot by rounding.
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(
            f"values from {low:g} to {high:g}: floats must lie in [0, 1]; divide by 255 or "
            "pass uint8"
        )


def _units(frames: Iterable[Tensor]) -> list[Tensor]:
    """All on the device of the first."""
    units = [unit(frame) for frame in frames]
    return [frame.to(units[0].device) for frame in units]


def _is_video(clip: Tensor) -> bool:
    """A mask is bool and has no channels."""
    return clip.dtype != torch.bool


def _frames(clip: Tensor) -> int:
    return clip.shape[-4] if _is_video(clip) else clip.shape[-3]


def as_batch(clips: Tensor) -> Tensor:
    """One clip or a batch as a batch."""
    return clips if clips.ndim == 4 + _is_video(clips) else clips[None]
