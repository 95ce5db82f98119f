"""Reads attributes off a clip by segmentation: thresholds and templates, no network.

Meant for one object on a plain or gradient backdrop, which is what the gate asks a model to draw.
The thresholds were set on rendered validation clips, never on a model's samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .render import distance
from .scene import COLOURS, SHAPES

# An object's chroma (largest minus smallest channel); effects are blends of at most one half.
CHROMA = 0.5
MIN_AREA = 0.012  # of the frame: less is a speck, not an object
CHANGED = 0.07  # difference to the backdrop that counts as an effect, of 1
EFFECT_AREA = 0.15  # changed pixels in relation to the object's
MOVED = 0.08  # shift over the clip that counts as motion, of the frame's side


@dataclass(frozen=True)
class Reading:
    """What a clip shows.

    Attributes:
        mask: ``[T, S, S]`` bool, the object.
        colour: Nearest colour of the world, None when empty.
        shape: Best matching shape, None when empty.
        motion: ``left``, ``right``, ``up``, ``down`` or ``still``; None when empty or one frame.
        effect: Whether anything but the object differs from the backdrop.
        changed: Area of those pixels in relation to the object's (to the frame's when empty).
    """

    mask: np.ndarray
    colour: str | None
    shape: str | None
    motion: str | None
    effect: bool
    changed: float

    @property
    def empty(self) -> bool:
        """No object was found."""
        return self.colour is None


def _largest(mask: np.ndarray) -> np.ndarray:
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=4
    )
    if count < 2:
        return np.zeros_like(mask)
    return labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())


def backdrop_fit(frame: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A plane per channel fitted to the pixels outside a mask, outliers trimmed twice.

    Args:
        frame: ``[S, S, 3]``.
        inside: ``[S, S]`` bool, pixels to leave out.

    Returns:
        ``[S, S, 3]``.
    """
    size = frame.shape[0]
    y, x = np.mgrid[0:size, 0:size] / size
    basis = np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3)
    pixels, keep = frame.reshape(-1, 3), ~inside.reshape(-1)
    if keep.sum() < 16:
        keep = np.ones_like(keep)
    # A first guess that a large effect cannot pull: the median.
    middle = np.median(pixels[keep], axis=0)
    error = np.abs(pixels - middle).max(axis=1)
    use = keep & (error <= max(np.quantile(error[keep], 0.6), 0.02))
    for _ in range(3):
        plane = basis @ np.linalg.lstsq(basis[use], pixels[use], rcond=None)[0]
        error = np.abs(pixels - plane).max(axis=1)
        use = keep & (error <= max(np.quantile(error[keep], 0.6), 0.03))
    return plane.reshape(frame.shape)


def shape_of(mask: np.ndarray) -> str | None:
    """The shape whose template overlaps a mask best (intersection over union)."""
    if not mask.any():
        return None
    ys, xs = np.nonzero(mask)
    size = mask.shape[0]
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    box = np.array([xs.min() + xs.max(), ys.min() + ys.max()]) / 2
    extent = max(np.ptp(xs), np.ptp(ys)) / 2 + 0.5
    best, name = -1.0, None
    for shape in SHAPES:
        scale = {"square": 1 / 0.86}.get(shape, 1.0)
        offset = 0.075 * extent if shape == "triangle" else 0.0  # its box is not centred on it
        for dx in (-0.5, 0.0, 0.5):
            for dy in (-0.5, 0.0, 0.5):
                for grow in (0.92, 1.0, 1.08):
                    d = distance(
                        shape, x - box[0] - dx, y - box[1] - dy - offset, extent * scale * grow
                    )
                    template = d <= 0
                    union = (template | mask).sum()
                    overlap = (template & mask).sum() / max(union, 1)
                    if overlap > best:
                        best, name = overlap, shape
    return name


def read(video: np.ndarray) -> Reading:
    """Reads one clip or image.

    Args:
        video: ``[T, S, S, 3]`` in [0, 1].

    Returns:
        Colour, shape, motion and effect. The majority over frames decides colour and shape.

    Raises:
        ValueError: When the array is no clip of square RGB frames.
    """
    import cv2

    if video.ndim != 4 or video.shape[-1] != 3 or video.shape[1] != video.shape[2]:
        raise ValueError(f"video has shape {video.shape}: read() takes [T, S, S, 3]")
    frames, size = video.shape[0], video.shape[1]
    palette = np.array(list(COLOURS.values()), np.float32)
    chroma = video.max(axis=-1) - video.min(axis=-1)
    mask = np.stack([_largest(c > CHROMA) for c in chroma])
    shown = mask.mean(axis=(1, 2)) >= MIN_AREA
    kernel = np.ones((3, 3), np.uint8)
    changed = np.zeros(mask.shape, bool)
    for t in range(frames):
        grown = cv2.dilate(mask[t].astype(np.uint8), kernel).astype(bool)
        plane = backdrop_fit(video[t], grown)
        differs = np.abs(video[t] - plane).max(axis=-1) > CHANGED
        changed[t] = cv2.morphologyEx(
            (differs & ~grown).astype(np.uint8), cv2.MORPH_OPEN, kernel[:2, :2]
        )
    if shown.mean() < 0.5:
        share = float(changed.mean())
        return Reading(mask & False, None, None, None, share > 0.05, share)

    pixels = video[mask]
    nearest = np.square(pixels[:, None] - palette).sum(axis=-1).argmin(axis=1)
    colour = list(COLOURS)[int(np.bincount(nearest, minlength=len(palette)).argmax())]
    votes = [shape_of(mask[t]) for t in range(frames) if shown[t]]
    shape = max(SHAPES, key=votes.count)

    motion = None
    if frames > 1:
        centres = np.array([np.argwhere(m).mean(axis=0) for m, s in zip(mask, shown) if s])
        down, right = (centres[-1] - centres[0]) / size if len(centres) > 1 else (0.0, 0.0)
        if max(abs(down), abs(right)) < MOVED:
            motion = "still"
        elif abs(right) > abs(down):
            motion = "right" if right > 0 else "left"
        else:
            motion = "down" if down > 0 else "up"
    share = float(changed.sum() / mask.sum())
    return Reading(mask, colour, shape, motion, share > EFFECT_AREA, share)
