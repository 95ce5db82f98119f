"""What a clip of the world contains: the vocabulary, the scene description and its sampler.

The world is an independent reconstruction of the test bed sketched for Object-WIPER and RefAM:
flat-coloured shapes with *associated effects* (shadow, reflection, glow, trail) whose exact masks
are known because every clip is rendered twice. A scene is a few numbers; ``render.py`` draws it and
``caption.py`` describes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

# Saturated colours on backgrounds of low chroma, so that a pixel's chroma tells object from scene.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "orange": (0.98, 0.52, 0.06),
    "yellow": (0.95, 0.90, 0.12),
    "green": (0.12, 0.75, 0.20),
    "cyan": (0.10, 0.88, 0.92),
    "blue": (0.16, 0.28, 0.95),
    "purple": (0.52, 0.12, 0.88),
    "pink": (0.98, 0.22, 0.72),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.13, "medium": 0.17, "large": 0.21}  # radius as a share of the frame's side
EFFECTS = ("shadow", "reflection", "glow", "trail")
# How far to the right and below an effect reaches beyond its object, in radii.
ROOM = {"shadow": (0.7, 0.6), "reflection": (0.0, 1.4)}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
MOTIONS = ("linear", "bounce", "still")
BACKGROUNDS = ("plain", "gradient", "striped", "checkered", "cloudy", "photo")

# One stream of random numbers per split: a training seed can never equal a held-out one.
SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Thing:
    """One object: attributes, effect and path. Lengths are shares of the frame's side.

    Attributes:
        shape: One of ``SHAPES``.
        colour: One of ``COLOURS``.
        size: One of ``SIZES``.
        effect: One of ``EFFECTS``, or None.
        motion: ``linear``, ``bounce`` or ``still``.
        direction: One of ``DIRECTIONS``; None when still.
        start: Centre (x, y) in the first frame.
        speed: Shift per frame.
    """

    shape: str
    colour: str
    size: str
    effect: str | None = None
    motion: str = "still"
    direction: str | None = None
    start: tuple[float, float] = (0.5, 0.5)
    speed: float = 0.0

    @property
    def radius(self) -> float:
        """Half of the object's extent."""
        return SIZES[self.size]

    def centres(self, frames: np.ndarray) -> np.ndarray:
        """Centres ``[len(frames), 2]`` (x, y); negative frames are where it came from."""
        step = np.zeros(2) if self.direction is None else np.array(DIRECTIONS[self.direction])
        path = np.array(self.start) + np.asarray(frames, float)[:, None] * step * self.speed
        if self.motion == "bounce":  # a triangle wave between the walls
            low, high = self.radius, 1 - self.radius
            phase = np.mod(path - low, 2 * (high - low))
            path = low + np.minimum(phase, 2 * (high - low) - phase)
        return path


@dataclass(frozen=True)
class Backdrop:
    """Background of a clip: its kind, a seed for its details and a pan per frame."""

    kind: str = "plain"
    seed: int = 0
    pan: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """Everything needed to draw one clip.

    Attributes:
        things: Objects, back to front. ``things[0]`` is the target of removal.
        backdrop: Background.
        decoy: Centre and radii (x, y, rx, ry) of a dark patch that belongs to nothing, or None.
        frames: Number of frames.
        size: Side of a frame in pixels.
        seed: Seed the scene was drawn from, which also words the caption.
    """

    things: tuple[Thing, ...] = ()
    backdrop: Backdrop = field(default_factory=Backdrop)
    decoy: tuple[float, float, float, float] | None = None
    frames: int = 9
    size: int = 32
    seed: int = 0

    def without(self, index: int) -> Scene:
        """The same scene without object ``index`` and its effects."""
        return replace(self, things=self.things[:index] + self.things[index + 1 :])


@dataclass(frozen=True)
class WorldConfig:
    """Distribution of scenes. The defaults are the whole world; ``TOY`` is what the models saw.

    Args:
        frames: Frames per clip.
        size: Side of a frame in pixels.
        empty: Share of scenes without objects.
        counts: Probabilities of 1, 2, 3 and 4 objects among the others.
        effect: Share of objects with an effect.
        effects: Weights of shadow, reflection, glow, trail.
        motions: Weights of linear, bounce, still.
        backgrounds: Weights of ``BACKGROUNDS``.
        pan: Share of clips whose background pans.
        decoy: Share of clips with a dark patch that belongs to nothing.
    """

    frames: int = 9
    size: int = 32
    empty: float = 0.17
    counts: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)
    effect: float = 0.5
    effects: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    motions: tuple[float, ...] = (0.6, 0.2, 0.2)
    backgrounds: tuple[float, ...] = (0.2, 0.2, 0.15, 0.15, 0.15, 0.15)
    pan: float = 0.2
    decoy: float = 0.15


FULL = WorldConfig()
TOY = WorldConfig(
    counts=(0.85, 0.15),
    effects=(0.55, 0.15, 0.15, 0.15),
    motions=(0.8, 0.0, 0.2),
    backgrounds=(0.6, 0.25, 0.05, 0.05, 0.05, 0.0),
    pan=0.0,
    decoy=0.0,
)


def held_out(thing: Thing) -> bool:
    """Whether this colour-shape-effect combination is kept out of training (one in eleven)."""
    effect = 0 if thing.effect is None else 1 + EFFECTS.index(thing.effect)
    colour = list(COLOURS).index(thing.colour)
    return (3 * colour + 5 * SHAPES.index(thing.shape) + 7 * effect) % 11 == 0


def rng_for(seed: int, split: str, salt: int = 0) -> np.random.Generator:
    """Random numbers of one clip.

    Raises:
        ValueError: For an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose one of {sorted(SPLITS)}")
    return np.random.default_rng([SPLITS[split], salt, seed])


def _pick(rng: np.random.Generator, names, weights) -> str:
    cumulative = np.cumsum(weights)
    return names[int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))]


def _thing(rng: np.random.Generator, config: WorldConfig) -> Thing:
    motion = _pick(rng, MOTIONS, config.motions)
    direction = None if motion == "still" else list(DIRECTIONS)[rng.integers(4)]
    effects = np.array(config.effects, float)
    if motion == "still":
        effects[EFFECTS.index("trail")] = 0.0  # what stands still leaves no trail
    effect = None
    if effects.sum() > 0 and rng.random() < config.effect:
        effect = _pick(rng, EFFECTS, effects)
    size = list(SIZES)[rng.integers(len(SIZES))]
    radius = SIZES[size]
    speed = 0.0 if direction is None else rng.uniform(0.045, 0.065)
    low, high = np.full(2, radius), np.full(2, 1 - radius)
    if effect in ROOM:  # an effect that is named must be seen
        high -= np.array(ROOM[effect]) * radius
    if motion == "linear" and direction is not None:  # the whole path stays inside
        step = np.array(DIRECTIONS[direction])
        last = max(config.frames - 1, 1)
        speed = min(speed, float(np.abs(step) @ (high - low)) / last)
        low, high = (
            low - np.minimum(step * speed * last, 0),
            high - np.maximum(step * speed * last, 0),
        )
    start = rng.uniform(low, np.maximum(low, high))
    return Thing(
        shape=SHAPES[rng.integers(len(SHAPES))],
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        size=size,
        effect=effect,
        motion=motion,
        direction=direction,
        start=(float(start[0]), float(start[1])),
        speed=float(speed),
    )


def _apart(a: Thing, b: Thing, frames: int) -> bool:
    t = np.arange(frames)
    gap = np.abs(a.centres(t) - b.centres(t)).max(axis=1).min()
    return bool(gap > 1.05 * (a.radius + b.radius))


def sample_scene(seed: int, config: WorldConfig = FULL, split: str = "test") -> Scene:
    """Draws a scene.

    Args:
        seed: Number of the clip within its split.
        config: Distribution.
        split: ``train``, ``val`` or ``test``. Training never shows a ``held_out`` combination.

    Returns:
        The scene; objects never overlap. Fewer objects stand in it when no room was found.
    """
    rng = rng_for(seed, split)
    things: list[Thing] = []
    if rng.random() >= config.empty:
        wanted = int(_pick(rng, range(1, len(config.counts) + 1), config.counts))
        for _ in range(20 * wanted):
            thing = _thing(rng, config)
            if len(things) == wanted:
                break
            if split == "train" and held_out(thing):
                continue
            twin = any((t.shape, t.colour) == (thing.shape, thing.colour) for t in things)
            if not twin and all(_apart(thing, t, config.frames) for t in things):
                things.append(thing)
    pan = (0.0, 0.0)
    if rng.random() < config.pan:
        pan = (float(rng.uniform(-0.03, 0.03)), float(rng.uniform(-0.03, 0.03)))
    decoy = None
    if rng.random() < config.decoy:
        x, y, rx, ry = rng.uniform([0.15, 0.15, 0.08, 0.05], [0.85, 0.85, 0.18, 0.1])
        decoy = (float(x), float(y), float(rx), float(ry))
    kind = _pick(rng, BACKGROUNDS, config.backgrounds)
    backdrop = Backdrop(kind, int(rng.integers(2**31)), pan)
    return Scene(tuple(things), backdrop, decoy, config.frames, config.size, seed)
