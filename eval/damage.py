"""Which metric sees which damage: clips of the world, broken on purpose in five strengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gen_accel.eval.metric import Accumulator, Metric
from gen_accel.eval.world.render import render
from gen_accel.eval.world.scene import FULL, WorldConfig, sample_scene

KINDS = ("noise", "blur", "shuffle", "flicker", "object loss")
STRENGTHS = (1, 2, 3, 4, 5)

# Every clip has something that moves, or a shuffle would change nothing.
DAMAGE_WORLD = replace(FULL, frames=17, size=64, empty=0.0, motions=(0.8, 0.2, 0.0))


@dataclass(frozen=True)
class Sample:
    """A clip before damage.

    Attributes:
        video: ``[frames, 3, height, width]``, float in [0, 1].
        without: The same without its first object and that object's effects.
        mask: The first object, bool ``[frames, height, width]``.
        seed: Of the random parts of the damage.
    """

    video: Tensor
    without: Tensor
    mask: Tensor
    seed: int


def world_samples(
    count: int, config: WorldConfig = DAMAGE_WORLD, first: int = 0
) -> Iterator[Sample]:
    """Clips of the world's test split, one at a time."""
    for seed in range(first, first + count):
        clip = render(sample_scene(seed, config, "test"))
        video, without = (torch.from_numpy(v).permute(0, 3, 1, 2) for v in (clip.video, clip.clean))
        yield Sample(video, without, torch.from_numpy(clip.target), seed)


def damage(sample: Sample, kind: str, strength: int) -> Tensor:
    """The clip, broken.

    - noise: white, new in every frame, deviation 0.01, 0.02, 0.04, 0.08, 0.16;
    - blur: Gaussian, sigma 1/128, 1/64, 1/32, 1/16, 1/8 of the frame's side;
    - shuffle: 20, 40, ... 100 % of the pairs of neighbours change places;
    - flicker: frames brighter and darker in turn by 0.01, 0.02, 0.04, 0.08, 0.16;
    - object loss: the first object and its effects fade by 20, 40, ... 100 %, in all frames.

    Each strength does what the one before it did, and more.

    Args:
        sample: The clip.
        kind: One of `KINDS`.
        strength: One of `STRENGTHS`, or 0 for the clip as it is.

    Returns:
        ``[frames, 3, height, width]``, float in [0, 1].

    Raises:
        ValueError: An unknown kind or strength.
    """
    if kind not in KINDS or strength not in (0, *STRENGTHS):
        raise ValueError(
            f"damage {kind!r} of strength {strength}: kinds are {', '.join(KINDS)}, "
            f"strengths 0 to {STRENGTHS[-1]}"
        )
    video = sample.video
    if strength == 0:
        return video
    generator = torch.Generator().manual_seed(sample.seed)
    doubling, share = 0.01 * 2 ** (strength - 1), strength / STRENGTHS[-1]
    if kind == "noise":
        return (video + doubling * torch.randn(video.shape, generator=generator)).clamp(0, 1)
    if kind == "blur":
        return _blur(video, 2 ** (strength - 1) / 128 * min(video.shape[-2:]))
    if kind == "shuffle":
        return _shuffle(video, share, generator)
    if kind == "flicker":
        sign = 1 - 2 * (torch.arange(len(video)) % 2)
        return (video + doubling * sign.view(-1, 1, 1, 1)).clamp(0, 1)
    return torch.lerp(video, sample.without, share)


def damage_series(
    samples: Iterable[Sample], metrics: Sequence[Metric], networks: Mapping[str, Any] | None = None
) -> dict[tuple[str, str], list[Accumulator]]:
    """Measures every damage of every clip; a clip at a time, so that memory does not grow.

    Args:
        samples: Clips.
        metrics: What to measure them by; they may need video, reference, mask and network.
        networks: `Metric.network` to the network, for metrics that need one.

    Returns:
        ``(metric, kind)`` to its states, one for each strength from 0, which is the clip as it is.
    """

    def state(metric: Metric) -> Accumulator:
        return metric.accumulator(
            **{"network": (networks or {})[metric.network]} if metric.network else {}
        )

    intact = {metric.name: state(metric) for metric in metrics}
    damaged = {
        (metric.name, kind): [state(metric) for _ in STRENGTHS]
        for metric in metrics
        for kind in KINDS
    }
    for sample in samples:
        given = {"reference": sample.video, "mask": sample.mask}

        def measure(metric: Metric, to: Accumulator, video: Tensor, given: dict = given) -> None:
            clip = {"video": video, **given}
            to.update(**{name: clip[name] for name in metric.needs if name in clip})

        for metric in metrics:
            measure(metric, intact[metric.name], sample.video)
        for kind in KINDS:
            for strength in STRENGTHS:
                video = damage(sample, kind, strength)
                for metric in metrics:
                    measure(metric, damaged[metric.name, kind][strength - 1], video)
    return {key: [intact[key[0]], *states] for key, states in damaged.items()}


def concordance(states: Sequence[Accumulator]) -> float:
    """Share of pairs of strengths that a metric puts in order, over all clips; ties count half.

    1 means that every stronger damage was worse, 0.5 is chance or a constant, and 0 is that every
    stronger one was better. A metric of whole sets (FVD) has one number per strength.
    """
    metric = states[0].metric
    if metric.axes:
        values = torch.tensor([[state.compute()] for state in states], dtype=torch.float64)
    else:
        values = torch.stack([state.values for state in states])
    worse = values if metric.better == "lower" else -values
    hits = [
        (worse[strong] > worse[weak]).double() + (worse[strong] == worse[weak]).double() / 2
        for strong in range(1, len(worse))
        for weak in range(strong)
    ]
    return float(torch.stack(hits).mean())


def _shuffle(video: Tensor, share: float, generator: torch.Generator) -> Tensor:
    pairs = torch.randperm(len(video) // 2, generator=generator)
    first = 2 * pairs[: max(1, round(share * len(pairs)))]
    shuffled = video.clone()
    shuffled[first], shuffled[first + 1] = video[first + 1], video[first]
    return shuffled


def _blur(video: Tensor, sigma: float) -> Tensor:
    """Gaussian over height and width, the edge repeated."""
    radius = max(1, round(4 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    window = torch.exp(-(offsets.double() ** 2) / (2 * sigma**2)).to(video)
    window = window / window.sum()
    for axis in (-2, -1):
        size = video.shape[axis]
        places = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)
        band = video.new_zeros(size, size).scatter_add_(1, places, window.expand(size, -1))
        video = band @ video if axis == -2 else video @ band.mT
    return video.clamp(0, 1)
