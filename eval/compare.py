"""Scores clips from files, one pair after the other; what cannot be read is counted, not fatal."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gen_accel.eval.features import unit_range
from gen_accel.eval.load import check_pair, read_clip
from gen_accel.eval.metric import Accumulator, Metric


@dataclass(frozen=True)
class Pair:
    """A clip and what it is compared with.

    Attributes:
        candidate: Which of the compared outputs it belongs to.
        name: Of the clip, the same for all candidates.
        path: The clip.
        reference: What it should look like.
        prompt: What it should show.
        mask: Video of a mask, white where it holds.
    """

    candidate: str
    name: str
    path: Path
    reference: Path | None = None
    prompt: str | None = None
    mask: Path | None = None


@dataclass
class Scored:
    """What came of one pair.

    Attributes:
        pair: The pair.
        values: Metric -> value; metrics over a set have none.
        frames: Metric -> value per frame, where they were asked for.
        errors: One line for everything that failed.
    """

    pair: Pair
    values: dict[str, float] = field(default_factory=dict)
    frames: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


class Comparison:
    """Runs metrics over pairs and keeps their state per candidate.

    Args:
        metrics: What to compute, by name.
        networks: Network name -> network.
    """

    def __init__(self, metrics: Mapping[str, Metric], networks: Mapping[str, Any]) -> None:
        self.metrics = metrics
        self.networks = networks
        self.scored: list[Scored] = []
        self._states: dict[tuple[str, str], Accumulator] = {}

    def add(self, pair: Pair, *, frames: bool = False) -> Scored:
        """Score one pair.

        Args:
            pair: What to compare.
            frames: Compute values per frame too.
        """
        scored = Scored(pair)
        self.scored.append(scored)
        try:
            given = _load(pair)
        except (ValueError, OSError) as error:
            scored.errors.append(_line(error))
            return scored
        for name, metric in self.metrics.items():
            arguments = {need: given[need] for need in metric.needs if need != "network"}
            if metric.network is not None:
                arguments["network"] = self.networks[metric.network]
            try:
                state = self._states.get((pair.candidate, name), metric.accumulator())
                values = state.update(**arguments)
                self._states[pair.candidate, name] = state
                if not metric.axes:
                    scored.values[name] = float(values[0])
                if frames and metric.per_frame is not None:
                    scored.frames[name] = metric.per_frame(**arguments).flatten().tolist()
            except (ValueError, RuntimeError) as error:
                scored.errors.append(f"{pair.path}: {name}: {_line(error)}")
        return scored

    def totals(self, candidate: str) -> tuple[dict[str, float], list[str]]:
        """Metric -> number over all clips of a candidate, and what there is to say about them."""
        found: dict[str, float] = {}
        notes: list[str] = []
        for name in self.metrics:
            state = self._states.get((candidate, name))
            if state is None:
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    found[name] = state.compute()
                except ValueError as error:
                    notes.append(f"{name}: {_line(error)}")
            notes += [f"{name}: {warning.message}" for warning in caught]
        return found, notes

    @property
    def errors(self) -> list[str]:
        """Everything that failed, in order."""
        return [error for scored in self.scored for error in scored.errors]


def pair_up(
    candidates: Mapping[str, Mapping[str, Path]],
    references: Mapping[str, Path] | None,
    masks: Mapping[str, Path] | None = None,
    prompts: Sequence[str] = (),
) -> tuple[list[Pair], list[str]]:
    """Match clips by name; single files with one reference, or none, belong together anyway.

    Args:
        candidates: Candidate -> clips by name.
        references: Clips by name; one alone serves all.
        masks: Likewise.
        prompts: One for all, or one per clip in the order of their names.

    Returns:
        The pairs, and one line for each clip that has no partner.

    Raises:
        ValueError: The number of prompts fits neither.
    """
    pairs, errors = [], []
    if all(len(clips) == 1 for clips in candidates.values()) and len(references or "r") == 1:
        name = next(iter(references or next(iter(candidates.values()))))
        candidates = {c: {name: next(iter(clips.values()))} for c, clips in candidates.items()}
    names = sorted({name for clips in candidates.values() for name in clips})
    if len(prompts) not in (0, 1, len(names)):
        raise ValueError(
            f"{len(prompts)} prompts for {len(names)} clips; give one for all, or one per clip in "
            "the order of their names"
        )
    words = dict(zip(names, list(prompts) * (len(names) if len(prompts) == 1 else 1)))
    for candidate, clips in candidates.items():
        for name in sorted(clips):
            reference, mask = _partner(references, name), _partner(masks, name)
            for found, partners, what in (
                (reference, references, "reference"),
                (mask, masks, "mask"),
            ):
                if partners is not None and found is None:
                    errors.append(f"{clips[name]}: no {what} of the name {name!r}")
                    break
            else:
                pairs.append(Pair(candidate, name, clips[name], reference, words.get(name), mask))
        missing = sorted(set(references or ()) - set(clips))
        if references is not None and len(references) > 1:
            errors += [
                f"{references[name]}: {candidate} has no clip of that name" for name in missing
            ]
    return pairs, errors


def _partner(partners: Mapping[str, Path] | None, name: str) -> Path | None:
    if partners is None:
        return None
    return next(iter(partners.values())) if len(partners) == 1 else partners.get(name)


def _load(pair: Pair) -> dict[str, Any]:
    clip = read_clip(pair.path)
    given: dict[str, Any] = {"video": clip.frames}
    if pair.reference is not None:
        reference = read_clip(pair.reference)
        check_pair(clip, reference)
        given["reference"] = reference.frames
    if pair.mask is not None:
        given["mask"] = _white(read_clip(pair.mask).frames)
    if pair.prompt is not None:
        given["prompt"] = pair.prompt
    return given


def _white(video: Tensor) -> Tensor:
    """Where a mask's video holds, bool ``[frames, height, width]``."""
    return unit_range(video).mean(1) > 0.5


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
