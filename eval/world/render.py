"""Draws scenes: frames, exact object masks, exact effect masks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .scene import COLOURS, EFFECTS, Backdrop, Scene, Thing

# An effect's mask holds what a screen could show: more than one and a half grey levels of 255.
VISIBLE = 1.5 / 255


@dataclass(frozen=True)
class Clip:
    """A drawn scene and its ground truth. T frames of S x S pixels.

    Attributes:
        video: ``[T, S, S, 3]`` float32 in [0, 1].
        clean: The same without the target (``things[0]``) and its effects.
        objects: ``[n, T, S, S]`` bool, visible pixels of each object.
        effects: For each effect kind, ``[n, T, S, S]`` bool: pixels outside every object that this
            object's effect changes.
        times: Frame numbers drawn.
        scene: The scene.
    """

    video: np.ndarray
    clean: np.ndarray
    objects: np.ndarray
    effects: dict[str, np.ndarray]
    times: np.ndarray
    scene: Scene

    @property
    def target(self) -> np.ndarray:
        """Mask ``[T, S, S]`` of the target object; empty in an empty scene."""
        return self.objects[0] if len(self.objects) else np.zeros(self.video.shape[:3], bool)

    @property
    def target_effect(self) -> np.ndarray:
        """Mask ``[T, S, S]`` of everything the target's effects change outside the objects."""
        masks = [m[0] for m in self.effects.values() if len(m)]
        return np.any(masks, axis=0) if masks else np.zeros(self.video.shape[:3], bool)


def distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline (exact inside and along the edges); negative inside.

    Raises:
        ValueError: For an unknown shape.
    """
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "square":
        return np.maximum(ax, ay) - 0.86 * radius
    if shape == "triangle":  # apex (0, -1), base from (-1, 0.85) to (1, 0.85)
        slope = np.hypot(1.85, 1.0)
        return np.maximum(dy - 0.85 * radius, (1.85 * ax - dy - radius) / slope)
    if shape == "cross":
        bar = 0.34 * radius
        return np.minimum(np.maximum(ax - radius, ay - bar), np.maximum(ax - bar, ay - radius))
    raise ValueError(f"shape={shape!r}: the world draws circle, square, triangle and cross")


def _axes(size: int) -> tuple[np.ndarray, np.ndarray]:
    centre = np.arange(size, dtype=np.float32) + 0.5
    return centre[None, None, :], centre[None, :, None]


def _cover(thing: Thing, centres: np.ndarray, size: int, flip: bool = False, soft: float = 1.0):
    """Share of each pixel the shape covers, ``[T, S, S]``; ``soft`` is the edge's width."""
    x, y = _axes(size)
    c = (centres * size).astype(np.float32)
    dx, dy = x - c[:, 0, None, None], y - c[:, 1, None, None]
    d = distance(thing.shape, dx, -dy if flip else dy, thing.radius * size)
    return np.clip(0.5 - d / soft, 0, 1)


def _blend(frame: np.ndarray, colour, alpha: np.ndarray) -> np.ndarray:
    return frame + (np.asarray(colour, np.float32) - frame) * alpha[..., None]


def _draw_effect(frame: np.ndarray, thing: Thing, times: np.ndarray) -> np.ndarray:
    size, colour, radius = frame.shape[1], COLOURS[thing.colour], thing.radius
    centres = thing.centres(times)
    if thing.effect == "shadow":
        offset = np.array([0.75, 0.6]) * radius
        return _blend(frame, (0, 0, 0), 0.6 * _cover(thing, centres + offset, size, soft=2.0))
    if thing.effect == "reflection":  # upside down below the object, fading with depth
        below = centres + np.array([0.0, 1.9 * radius])
        _, y = _axes(size)
        depth = (y - (centres[:, 1, None, None] + 0.8 * radius) * size) / (2 * radius * size)
        fade = np.where(depth > 0, np.clip(0.5 - 0.35 * depth, 0, 1), 0)
        return _blend(frame, colour, fade * _cover(thing, below, size, flip=True))
    if thing.effect == "glow":
        x, y = _axes(size)
        c = (centres * size)[:, :, None, None]
        reach = 0.7 * radius * size
        d = distance(thing.shape, x - c[:, 0], y - c[:, 1], radius * size)
        return _blend(frame, colour, 0.5 * np.exp(-np.square(np.maximum(d, 0) / reach)))
    if thing.effect == "trail":
        alpha = np.zeros(frame.shape[:3], np.float32)
        for back in (6, 4, 2):
            share = 0.55 - 0.07 * back
            alpha = np.maximum(alpha, share * _cover(thing, thing.centres(times - back), size))
        return _blend(frame, colour, alpha)
    return frame


def _draw_backdrop(backdrop: Backdrop, times: np.ndarray, size: int) -> np.ndarray:
    rng = np.random.default_rng(backdrop.seed)
    x, y = _axes(size)
    shift = times.astype(np.float32)[:, None, None] * size
    x, y = x + shift * backdrop.pan[0], y + shift * backdrop.pan[1]
    grey = rng.uniform(0.3, 0.65)
    tint = rng.uniform(-0.04, 0.04, 3)
    base = np.clip(grey + tint, 0, 1).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = (np.cos(angle) * x + np.sin(angle) * y) / size
    if backdrop.kind == "plain":
        level = np.zeros_like(along)
    elif backdrop.kind == "gradient":
        level = rng.uniform(0.12, 0.25) * (along - 0.5 * (np.cos(angle) + np.sin(angle)))
    elif backdrop.kind == "striped":
        period = rng.uniform(0.18, 0.35)
        level = rng.uniform(0.06, 0.1) * np.clip(4 * np.sin(2 * np.pi * along / period), -1, 1)
    elif backdrop.kind == "checkered":
        cell = size * rng.uniform(0.15, 0.28)
        level = rng.uniform(0.06, 0.1) * np.where((x // cell + y // cell) % 2 > 0, 1, -1)
    elif backdrop.kind == "cloudy":
        level = np.zeros_like(along)
        for _ in range(5):
            fx, fy = rng.uniform(-1.6, 1.6, 2) * 2 * np.pi / size
            level = level + 0.05 * np.sin(fx * x + fy * y + rng.uniform(0, 2 * np.pi))
    elif backdrop.kind == "photo":
        return _photo(rng, x, y, size)
    else:
        raise ValueError(f"backdrop {backdrop.kind!r} is not one the world draws")
    level = np.broadcast_to(level, (len(times), size, size))
    return np.clip(base + level[..., None], 0, 1).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _photographs() -> tuple[np.ndarray, ...]:
    try:
        import cv2
        import skimage
    except ImportError as error:
        raise ImportError("photo backdrops: pip install scikit-image opencv-python-headless") from (
            error
        )
    folder = Path(skimage.__file__).parent / "data"
    names = (
        "astronaut",
        "brick",
        "camera",
        "chelsea",
        "coffee",
        "grass",
        "gravel",
        "moon",
        "rocket",
    )
    found = [p for n in names for p in sorted(folder.glob(f"{n}.*"))]
    if not found:
        raise FileNotFoundError(
            f"no photographs in {folder}: reinstall scikit-image from its wheel"
        )
    images = [cv2.imread(str(p), cv2.IMREAD_COLOR) for p in found]
    return tuple(image[..., ::-1].astype(np.float32) / 255 for image in images if image is not None)


def _photo(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    import cv2

    photos = _photographs()
    photo = photos[rng.integers(len(photos))]
    side = min(photo.shape[:2])
    scale = rng.uniform(0.3, 0.6) * side / size
    left, top = rng.uniform(0, 0.3, 2) * side
    small = cv2.GaussianBlur(photo, (0, 0), 0.4 * scale)
    shape = np.broadcast_shapes(x.shape, y.shape)
    px, py = (
        np.broadcast_to(v, shape).astype(np.float32) for v in (left + x * scale, top + y * scale)
    )
    frames = [
        cv2.remap(small, a, b, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        for a, b in zip(px, py)
    ]
    frame = np.stack(frames)
    grey = frame.mean(axis=-1, keepdims=True)  # muted, so that chroma still tells objects apart
    return (0.15 + 0.6 * (grey + 0.35 * (frame - grey))).astype(np.float32)


def draw(scene: Scene, times: np.ndarray) -> np.ndarray:
    """Frames ``[T, S, S, 3]`` in [0, 1]: backdrop, decoy, all effects, all objects."""
    frame = _draw_backdrop(scene.backdrop, times, scene.size)
    if scene.decoy is not None:
        x, y = _axes(scene.size)
        cx, cy, rx, ry = (v * scene.size for v in scene.decoy)
        spot = np.hypot((x - cx) / rx, (y - cy) / ry)
        frame = _blend(
            frame, (0, 0, 0), np.broadcast_to(0.6 * np.clip(2 - 2 * spot, 0, 1), frame.shape[:3])
        )
    for thing in scene.things:
        frame = _draw_effect(frame, thing, times)
    for thing in scene.things:
        cover = _cover(thing, thing.centres(times), scene.size)
        frame = _blend(frame, COLOURS[thing.colour], cover)
    return frame.astype(np.float32)


def frame_times(scene: Scene, times: np.ndarray | None) -> np.ndarray:
    """All frame numbers of the scene, or the ones asked for."""
    return np.arange(scene.frames) if times is None else np.asarray(times)


def render(scene: Scene, times: np.ndarray | None = None) -> Clip:
    """Draws a scene, its twin without the target, and every mask.

    Args:
        scene: Scene.
        times: Frame numbers; None for all of them.

    Returns:
        The clip with its ground truth.
    """
    times = frame_times(scene, times)
    video = draw(scene, times)
    shape = (len(scene.things), *video.shape[:3])
    objects = np.zeros(shape, bool)
    effects = {kind: np.zeros(shape, bool) for kind in EFFECTS}
    clean = video
    for i, thing in enumerate(scene.things):
        objects[i] = _cover(thing, thing.centres(times), scene.size) >= 0.5
        objects[:i] &= ~objects[i]  # later objects stand in front
    covered = np.zeros(video.shape[:3], bool)
    for thing in scene.things:  # an object's anti-aliased rim is neither object nor effect
        covered |= _cover(thing, thing.centres(times), scene.size) > 0
    for i, thing in enumerate(scene.things):
        twin = draw(scene.without(i), times)
        if i == 0:
            clean = twin
        if thing.effect is not None:
            changed = np.abs(video - twin).max(axis=-1) > VISIBLE
            effects[thing.effect][i] = changed & ~covered
    return Clip(video, clean, objects, effects, times, scene)
