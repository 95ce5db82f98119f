"""Clips from files, with what two of them must share before they can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gen_accel.eval.video import read_video, to_uint8

VIDEOS = (".mp4", ".gif", ".mov", ".mkv", ".webm", ".avi", ".npy", ".pt")
PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Clip:
    """A video from a file.

    Attributes:
        path: Where it came from.
        frames: uint8, or float in [0, 1], ``[frames, channels, height, width]``.
        fps: Frames per second; None where the format does not say.
    """

    path: Path
    frames: Tensor
    fps: float | None = None


def read_clip(path: str | Path) -> Clip:
    """Read MP4 and what else ffmpeg decodes, GIF, a picture, a folder of PNGs, NPY or a tensor.

    Arrays (``.npy``) and tensors (``.pt``) are ``[frames, channels, height, width]``, uint8 or
    float in [0, 1]; they carry no codec's damage and should be preferred.

    Raises:
        ValueError: There is nothing, or it is no video; one line that says why.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path}: an empty file; write it again")
    if path.is_file() and suffix in (".npy", ".pt"):
        return Clip(path, _tensor(path))
    return Clip(path, read_video(path), _fps(path) if path.is_file() else None)


def find_clips(path: str | Path) -> dict[str, Path]:
    """Name -> path of the clips that ``path`` stands for.

    A file is one clip, and so is a folder of pictures; any other folder stands for its videos,
    named without suffix, and its folders of pictures.

    Raises:
        ValueError: There is nothing, or the folder holds no clips, or two of one name.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        return {path.stem: path}
    entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    found: dict[str, Path] = {}
    for entry in entries:
        if _is_clip(entry):
            name = entry.name if entry.is_dir() else entry.stem
            if name in found:
                raise ValueError(f"{path}: {found[name].name} and {entry.name} share a name")
            found[name] = entry
    if found:
        return found
    if any(entry.suffix.lower() in PICTURES for entry in entries):
        return {path.name: path}
    raise ValueError(f"{path}: holds no clips; they end in {', '.join(VIDEOS)} or are folders")


def check_pair(clip: Clip, reference: Clip) -> None:
    """Whether two clips show the same moments in the same size.

    Raises:
        ValueError: Lengths, sizes or frame rates differ.
    """
    a, b = clip.frames.shape, reference.frames.shape
    for what, ours, theirs in (
        ("frames", f"{a[0]}", f"{b[0]}"),
        ("pixels", f"{a[2]}x{a[3]}", f"{b[2]}x{b[3]}"),
        ("channels", f"{a[1]}", f"{b[1]}"),
    ):
        if ours != theirs:
            raise ValueError(
                f"{clip.path} has {ours} {what}, {reference.path} {theirs}; render both alike"
            )
    if clip.fps and reference.fps and abs(clip.fps - reference.fps) > 0.01 * reference.fps:
        raise ValueError(
            f"{clip.path} runs at {clip.fps:g} frames per second, {reference.path} at "
            f"{reference.fps:g}; the same frames of both must show the same moment"
        )


def _is_clip(path: Path) -> bool:
    if path.is_dir():
        return any(child.suffix.lower() == ".png" for child in path.iterdir())
    return path.suffix.lower() in VIDEOS


def _tensor(path: Path) -> Tensor:
    try:
        if path.suffix.lower() == ".pt":
            video = torch.load(path, map_location="cpu", weights_only=True)
        else:
            video = torch.from_numpy(np.load(path))
    except Exception as error:  # unpicklers raise whatever they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a readable array ({reason})") from error
    if not isinstance(video, Tensor):
        raise ValueError(f"{path}: holds a {type(video).__name__}; save one tensor")
    if video.ndim == 5 and len(video) == 1:
        video = video[0]
    if video.ndim != 4 or video.shape[1] not in (1, 3) or 0 in video.shape:
        raise ValueError(
            f"{path}: shape {tuple(video.shape)} is not [frames, channels, height, width] with 1 "
            "or 3 channels"
        )
    try:
        to_uint8(video)  # says what is wrong with the values
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return video


def _fps(path: Path) -> float | None:
    import imageio.v3 as iio

    if path.suffix.lower() == ".gif":
        duration = iio.immeta(path, index=0).get("duration")
        return 1000 / duration if duration else None
    if path.suffix.lower() in PICTURES:
        return None
    return float(iio.immeta(path, plugin="FFMPEG")["fps"])
