"""Videos as tensors: read, write, put side by side.

A video is uint8 ``[frames, channels, height, width]``, RGB; floats in [0, 1] are accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gen_accel.eval.clips import require_unit
from gen_accel.eval.files import atomic

FORMATS = ".mp4, .gif, .npy, .png (one frame), or a folder name for one PNG per frame"


def write_video(path: str | Path, video: Tensor, *, fps: float = 16, crf: int = 12) -> None:
    """Write a video or picture; the file is whole or absent, never half-written.

    Args:
        path: The suffix chooses the format: ``.mp4`` (H.264, 4:2:0, plays in browsers), ``.gif``,
            ``.npy`` (uint8, lossless), ``.png`` (one frame), no suffix: a folder of PNGs.
        video: ``[frames, channels, height, width]``, 1 or 3 channels, uint8 or float in [0, 1].
        fps: Frames per second (mp4 and gif).
        crf: H.264 quality, 0 lossless to 51; 12 is visually lossless.

    Raises:
        ValueError: Wrong shape or values, unknown suffix, odd sizes for mp4, unwritable path.
    """
    path, frames = Path(path), _frames(video)
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".gif", ".npy", ".png", ""):
        raise ValueError(f"{path.name}: unknown format {path.suffix!r}; use {FORMATS}")
    if suffix == ".png" and len(frames) != 1:
        raise ValueError(f"{path.name}: a PNG holds one frame and this video has {len(frames)}")
    if suffix == ".mp4" and (frames.shape[1] % 2 or frames.shape[2] % 2):
        raise ValueError(
            f"frames of {frames.shape[1]}x{frames.shape[2]} pixels: H.264 4:2:0 needs even sizes; "
            "crop or pad, or write .gif, .npy or a folder"
        )
    with atomic(path) as scratch:
        if suffix == ".npy":
            np.save(scratch, frames.transpose(0, 3, 1, 2))
        elif suffix == ".mp4":
            _write_mp4(scratch, frames, fps, crf)
        elif suffix == ".gif":
            _write_gif(scratch, frames, fps)
        elif suffix == ".png":
            _imageio().imwrite(scratch, frames[0])
        else:
            scratch.mkdir()
            for i, frame in enumerate(frames):
                _imageio().imwrite(scratch / f"{i:05d}.png", frame)


def read_video(path: str | Path) -> Tensor:
    """Read what `write_video` writes, and whatever else ffmpeg decodes.

    Returns:
        uint8 ``[frames, channels, height, width]``; three channels except for ``.npy``.

    Raises:
        ValueError: There is nothing at ``path``, or it is not a video.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file; use {FORMATS}")
    try:
        if path.is_dir():
            files = sorted(path.glob("*.png"))
            if not files:
                raise ValueError("the folder holds no .png files")
            frames = np.stack([_imageio().imread(file, mode="RGB") for file in files])
        elif path.suffix.lower() == ".npy":
            array = np.load(path)
            if array.dtype != np.uint8 or array.ndim != 4:
                raise ValueError(f"{array.dtype} {array.shape} is not uint8 [T, C, H, W]")
            return torch.from_numpy(array)
        elif path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            frames = _imageio().imread(path, mode="RGB")[None]
        elif path.suffix.lower() == ".gif":
            frames = np.stack(_imageio().imread(path, index=None, mode="RGB"))
        else:
            frames = np.stack(list(_imageio().imiter(path, plugin="FFMPEG")))
    except Exception as error:  # decoders raise whatever they like
        reason = str(error).strip().splitlines()
        detail = reason[0] if reason else type(error).__name__
        raise ValueError(f"{path}: not a readable video ({detail}); use {FORMATS}") from error
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))


def side_by_side(
    videos: Sequence[Tensor], *, labels: Sequence[str] | None = None, gap: int = 4
) -> Tensor:
    """Join videos of equal shape from left to right.

    Args:
        videos: Each ``[frames, channels, height, width]``.
        labels: A caption above each video.
        gap: White pixels between neighbours.

    Returns:
        uint8 ``[frames, 3, height (+ caption), n * width + (n - 1) * gap]``, sizes rounded up to
        even numbers so that they can be encoded.

    Raises:
        ValueError: No video, unequal shapes, or a wrong number of labels.
    """
    if not videos:
        raise ValueError("side_by_side got no videos; pass at least one")
    if labels is not None and len(labels) != len(videos):
        raise ValueError(f"{len(labels)} labels for {len(videos)} videos; give one each")
    frames = [_frames(video) for video in videos]
    shapes = {video.shape for video in frames}
    if len(shapes) > 1:
        raise ValueError(f"videos of shapes {sorted(shapes)}; side_by_side needs equal ones")
    count, height, width, _ = frames[0].shape
    caption = _caption_height(width) if labels else 0
    size = (caption + height, len(frames) * width + (len(frames) - 1) * gap)
    canvas = np.full((count, size[0] + size[0] % 2, size[1] + size[1] % 2, 3), 255, np.uint8)
    for i, video in enumerate(frames):
        left = i * (width + gap)
        canvas[:, caption : caption + height, left : left + width] = video
        if labels:
            canvas[:, :caption, left : left + width] = _caption(labels[i], width, caption)
    return torch.from_numpy(np.ascontiguousarray(canvas.transpose(0, 3, 1, 2)))


def to_uint8(video: Tensor) -> Tensor:
    """Floats in [0, 1] rounded to uint8 on the CPU; uint8 passes through.

    Raises:
        ValueError: Another dtype, or values outside [0, 1], NaN included.
    """
    video = video.detach().cpu()
    if video.dtype == torch.uint8:
        return video
    require_unit(video)
    return (video.float().clamp(0, 1) * 255).round().to(torch.uint8)


def _frames(video: Tensor) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    if video.ndim != 4 or video.shape[1] not in (1, 3) or 0 in video.shape:
        raise ValueError(
            f"shape {tuple(video.shape)}: expected [frames, channels, height, width] with 1 or 3 "
            "channels; write the clips of a batch one by one"
        )
    array = to_uint8(video).permute(0, 2, 3, 1).numpy()
    return np.repeat(array, 3, axis=3) if array.shape[3] == 1 else np.ascontiguousarray(array)


def _write_mp4(path: Path, frames: np.ndarray, fps: float, crf: int) -> None:
    import imageio_ffmpeg

    writer = imageio_ffmpeg.write_frames(
        str(path),
        (frames.shape[2], frames.shape[1]),
        fps=fps,
        codec="libx264",
        pix_fmt_out="yuv420p",
        macro_block_size=1,  # the default resizes to multiples of 16
        quality=None,
        # faststart: a browser can play it before it has all of it.
        output_params=["-crf", str(crf), "-movflags", "+faststart"],
    )
    writer.send(None)
    for frame in frames:
        writer.send(frame)
    writer.close()


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    # GIF counts in hundredths of a second, and players slow down what is below two.
    duration = max(20, round(100 / fps) * 10)
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=False
    )


def _imageio():
    import imageio.v3

    return imageio.v3


def _caption_height(width: int) -> int:
    return 2 * max(8, min(16, width // 24))


def _caption(text: str, width: int, height: int) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(size=round(height * 0.62))
    ImageDraw.Draw(image).text((width / 2, height / 2), text, "black", font, anchor="mm")
    return np.asarray(image)
