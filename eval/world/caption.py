"""Captions with character spans, and referring expressions in five tiers.

Wording rules: an effect is named if and only if it is there; motion is named only for clips;
articles and fillers vary, so that a model can learn that they mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scene import COLOURS, DIRECTIONS, SHAPES, Scene, Thing, rng_for

TIERS = ("colour", "shape", "colour+shape", "relation", "motion")


@dataclass(frozen=True)
class Span:
    """Characters ``start:end`` of a caption.

    Attributes:
        start: First character.
        end: One past the last.
        role: ``object`` (its whole phrase), ``size``, ``colour``, ``shape``, ``effect``,
            ``motion`` or ``background``.
        thing: Index of the object meant, or None.
    """

    start: int
    end: int
    role: str
    thing: int | None = None


@dataclass(frozen=True)
class Caption:
    """Text and the spans of its words with a meaning."""

    text: str
    spans: tuple[Span, ...] = ()

    def words(self, role: str, thing: int | None = None) -> list[str]:
        """The texts of all spans with this role (and object)."""
        found = [s for s in self.spans if s.role == role and thing in (None, s.thing)]
        return [self.text[s.start : s.end] for s in found]


@dataclass(frozen=True)
class Expression:
    """A referring expression; ``thing`` is None when nothing in the clip answers to it."""

    text: str
    tier: str
    thing: int | None


class _Writer:
    def __init__(self) -> None:
        self.text = ""
        self.spans: list[Span] = []

    def add(self, word: str, role: str | None = None, thing: int | None = None) -> None:
        if not word:
            return
        self.text += (" " if self.text else "") + word
        if role is not None:
            self.spans.append(Span(len(self.text) - len(word), len(self.text), role, thing))

    def done(self) -> Caption:
        return Caption(self.text, tuple(self.spans))


def _motion_words(thing: Thing) -> str:
    if thing.motion == "linear":
        return f"moving {thing.direction}"
    return "bouncing" if thing.motion == "bounce" else "standing still"


def _phrase(out: _Writer, thing: Thing, index: int, clip: bool, rng: np.random.Generator) -> None:
    begin = len(out.text) + (1 if out.text else 0)
    out.add(("a", "a", "the", "one")[rng.integers(4)])
    if rng.random() < 0.5:
        out.add(thing.size, "size", index)
    out.add(thing.colour, "colour", index)
    out.add(thing.shape, "shape", index)
    out.spans.append(Span(begin, len(out.text), "object", index))
    if thing.effect is not None:
        out.add(("with a", "with its", "and its")[rng.integers(3)])
        out.add(thing.effect, "effect", index)
    if clip:
        out.add(("", "that is", "which is")[rng.integers(3)])
        out.add(_motion_words(thing), "motion", index)


def describe(scene: Scene, clip: bool = True) -> Caption:
    """The caption of a scene.

    Args:
        scene: Scene; its seed chooses the wording.
        clip: False for a single frame, which shows no motion.

    Returns:
        Caption with spans. Objects are named in drawing order.
    """
    rng = rng_for(scene.seed, "train", salt=1)
    out = _Writer()
    out.add(("", "", "there is", "this is")[rng.integers(4)])
    for i, thing in enumerate(scene.things):
        if i:
            out.add("and")
        _phrase(out, thing, i, clip, rng)
    if not scene.things:
        out.add(("an empty scene", "nothing")[rng.integers(2)])
    if rng.random() < 0.7 or not scene.things:
        out.add(("on a", "on the", "in front of a")[rng.integers(3)])
        out.add(scene.backdrop.kind, "background")
        out.add("background")
    return out.done()


def vocabulary() -> list[str]:
    """Every word a caption or an expression can hold, sorted."""
    from .scene import BACKGROUNDS, EFFECTS, SIZES

    fixed = (
        "a an and background below bouncing empty front above in is its left moving nothing object "
        "of on one right scene standing still that the there thing this to where which with without"
    )
    groups = (fixed.split(), COLOURS, SHAPES, SIZES, EFFECTS, DIRECTIONS, BACKGROUNDS)
    return sorted({word for group in groups for word in group})


def relation(a: Thing, b: Thing, frames: int) -> str | None:
    """How ``a`` stands to ``b`` in every frame: ``left of``, ``right of``, ``above``, ``below``."""
    gap = a.centres(np.arange(frames)) - b.centres(np.arange(frames))
    clear = 0.6 * (a.radius + b.radius)
    for word, along, across in (
        ("left of", -gap[:, 0], gap[:, 1]),
        ("right of", gap[:, 0], gap[:, 1]),
        ("above", -gap[:, 1], gap[:, 0]),
        ("below", gap[:, 1], gap[:, 0]),
    ):
        if (along > clear).all() and (along > np.abs(across)).all():
            return word
    return None


def expressions(scene: Scene) -> list[Expression]:
    """Referring expressions of a scene, with and without a target.

    Tiers: ``colour``; ``shape``; ``colour+shape`` (only where another object shares one of the
    two); ``relation``; ``motion``. An expression is given only when exactly one object answers to
    it; for each of the first three tiers and motion one that nothing answers to is added.
    """
    things = scene.things
    found: list[Expression] = []

    def unique(values: list[str], text: str, tier: str) -> None:
        for i, value in enumerate(values):
            if value and values.count(value) == 1:
                found.append(Expression(text.format(value), tier, i))

    colours, shapes = [t.colour for t in things], [t.shape for t in things]
    unique(colours, "the {} object", "colour")
    unique(shapes, "the {}", "shape")
    for i, thing in enumerate(things):
        rivals = [t for j, t in enumerate(things) if j != i]
        shared = any((t.colour == thing.colour) != (t.shape == thing.shape) for t in rivals)
        alone = all((t.colour, t.shape) != (thing.colour, thing.shape) for t in rivals)
        if shared and alone:
            found.append(Expression(f"the {thing.colour} {thing.shape}", "colour+shape", i))
        for j, other in enumerate(things):
            word = relation(thing, other, scene.frames) if i != j else None
            if word and colours.count(other.colour) == 1:
                matches = [
                    k
                    for k in range(len(things))
                    if k != j and relation(things[k], other, scene.frames) == word
                ]
                if matches == [i]:
                    text = f"the object {word} the {other.colour} {other.shape}"
                    found.append(Expression(text, "relation", i))
    moves = [_motion_words(t) for t in things]
    unique(moves, "the object {}", "motion")

    rng = rng_for(scene.seed, "train", salt=2)
    absent = [c for c in COLOURS if c not in colours]
    found.append(Expression(f"the {absent[rng.integers(len(absent))]} object", "colour", None))
    other_shapes = [s for s in SHAPES if s not in shapes]
    if other_shapes:
        text = f"the {other_shapes[rng.integers(len(other_shapes))]}"
        found.append(Expression(text, "shape", None))
    pairs = [(c, s) for c in dict.fromkeys(colours) for s in dict.fromkeys(shapes)]
    missing = [p for p in pairs if p not in set(zip(colours, shapes))]
    if missing:
        colour, shape = missing[rng.integers(len(missing))]
        found.append(Expression(f"the {colour} {shape}", "colour+shape", None))
    unused = [d for d in DIRECTIONS if f"moving {d}" not in moves]
    text = f"the object moving {unused[rng.integers(len(unused))]}"
    found.append(Expression(text, "motion", None))
    return found
