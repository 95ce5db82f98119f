"""Writes a clip of the world to files a person can open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .caption import describe, expressions
from .render import Clip


def _frames(video: np.ndarray, zoom: int) -> np.ndarray:
    if video.ndim == 3:
        video = np.repeat(video[..., None], 3, axis=-1).astype(np.float32)
    levels = np.clip(np.rint(video * 255), 0, 255).astype(np.uint8)
    return levels.repeat(zoom, axis=1).repeat(zoom, axis=2)


def write_clip(clip: Clip, folder: str | Path, zoom: int = 8, fps: int = 8) -> list[Path]:
    """Writes the clip, its clean twin, their masks and the words.

    ``clip.mp4``, ``clean.mp4``; of each mask, ``object_<i>`` and ``effect_<i>_<kind>``, a PNG strip
    (frames side by side) to look at and an mp4 for ``gen-accel wipe --mask``; ``sheet.png`` with
    everything one above the other; ``clip.json`` with caption, spans and referring expressions.

    Args:
        clip: Rendered clip.
        folder: Created when missing.
        zoom: Every pixel becomes a square of this side.
        fps: Frames per second.

    Returns:
        The files written.
    """
    import imageio.v3 as iio

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def put(name: str, pixels: np.ndarray, **options: object) -> None:
        iio.imwrite(folder / name, pixels, **options)  # type: ignore[call-overload]
        written.append(folder / name)

    rows = [clip.video, clip.clean]
    encoding = {"fps": fps, "codec": "libx264", "macro_block_size": 1}
    for name, video in (("clip.mp4", clip.video), ("clean.mp4", clip.clean)):
        put(name, _frames(video, zoom), **encoding)
    masks = {f"object_{i}": m for i, m in enumerate(clip.objects)}
    for i, thing in enumerate(clip.scene.things):
        if thing.effect is not None:
            masks[f"effect_{i}_{thing.effect}"] = clip.effects[thing.effect][i]
    for name, mask in masks.items():
        rows.append(np.repeat(mask[..., None], 3, axis=-1).astype(np.float32))
        put(f"{name}.png", np.concatenate(list(_frames(mask, zoom)), axis=1))
        put(f"{name}.mp4", _frames(mask, zoom), **encoding)
    sheet = [np.concatenate(list(_frames(row, zoom)), axis=1) for row in rows]
    put("sheet.png", np.concatenate(sheet, axis=0))

    caption = describe(clip.scene)
    words = {
        "seed": clip.scene.seed,
        "caption": caption.text,
        "spans": [
            {"start": s.start, "end": s.end, "role": s.role, "thing": s.thing,
             "text": caption.text[s.start : s.end]} for s in caption.spans
        ],
        "expressions": [vars(e) for e in expressions(clip.scene)],
        "masks": list(masks),
    }  # fmt: skip
    path = folder / "clip.json"
    path.write_text(json.dumps(words, indent=1) + "\n")
    return [*written, path]
