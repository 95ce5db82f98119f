"""What every metric has in common: a pure function, a state that streams, and its own legend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor


def mean(values: Tensor) -> Tensor:
    """Mean over clips, the pool of most metrics."""
    return values.mean()


@dataclass(frozen=True)
class Metric:
    """A pure function of clips, how clips become one number, and what a table says about both.

    Call it for a number, ``metric(video, reference)``, or stream through the same arguments with
    `accumulator`. Its required arguments are the function's own, see `needs`.

    Attributes:
        name: Key in `gen_accel.eval.metrics.METRICS` and on the command line.
        function: Takes one clip or a batch, returns one value per clip: 0-D, or ``[batch]``; with
            ``axes`` a statistic per clip, that many axes behind the batch.
        unit: ``"dB"``, ``"px"``, ``"%"``, ... or ``""``.
        better: Which direction is.
        definition: One line.
        per_frame: Same arguments, values ``[frames]`` (or ``[frames - 1]``, one per pair of
            neighbours) of one clip, for plots; None where a frame has no value. A function that
            takes ``per_frame`` needs none here.
        network: What the argument ``network`` of the function is, for messages; None without one.
        pool: Values of all clips ``[clips, ...]`` to one number.
        axes: Axes of one clip's statistic.

    Example:
        >>> from gen_accel.eval.metrics import METRICS
        >>> grey = torch.full((2, 3, 8, 8), 0.5)
        >>> psnr = METRICS["psnr"]
        >>> psnr.needs, round(psnr(grey + 0.1, grey), 3)
        (('video', 'reference'), 20.0)
        >>> running = psnr.accumulator()
        >>> for step in (0.1, 0.01):
        ...     _ = running.update(grey + step, grey)
        >>> round(running.compute(), 3)
        30.0
    """

    name: str
    function: Callable[..., Tensor]
    unit: str
    better: Literal["higher", "lower"]
    definition: str
    per_frame: Callable[..., Tensor] | None = None
    network: str | None = None
    pool: Callable[[Tensor], Tensor] = mean
    axes: int = 0

    def __post_init__(self) -> None:
        if self.per_frame is None and "per_frame" in inspect.signature(self.function).parameters:
            object.__setattr__(self, "per_frame", partial(self.function, per_frame=True))

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Arguments without a default, in order.

        Of the vocabulary ``video``, ``reference``, ``mask``, ``prompt``, ``network`` (see
        `network`); grounding metrics take ``prediction`` and ``target`` instead of a video.
        """
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.default is p.empty)

    def clips(self, *args: Any, **kwargs: Any) -> Tensor:
        """Value or statistic of every clip, ``[clips, ...]``, float64 on the CPU."""
        values = self.function(*args, **kwargs).detach().double().cpu()
        return values.reshape(-1, *values.shape[values.ndim - self.axes :])

    def __call__(self, *args: Any, **kwargs: Any) -> float:
        """The number for these clips together."""
        return float(self.pool(self.clips(*args, **kwargs)))

    def accumulator(self, **fixed: Any) -> Accumulator:
        """A fresh state. Arguments given here (a ``network``, a ``flow``) stay for all updates."""
        return Accumulator(self, fixed)


@dataclass
class Accumulator:
    """State of a `Metric`: it keeps the value of each clip, never the clip."""

    metric: Metric
    fixed: dict[str, Any] = field(default_factory=dict)
    _clips: list[Tensor] = field(default_factory=list, repr=False)

    def update(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take in one clip or a batch, in the arguments of the function; returns its values."""
        clips = self.metric.clips(*args, **kwargs, **self.fixed)
        self._clips.append(clips)
        return clips

    @property
    def values(self) -> Tensor:
        """Value of every clip so far, in the order they came.

        Raises:
            ValueError: There was none.
        """
        if not self._clips:
            raise ValueError(f"{self.metric.name}: no clip yet; call update() before compute()")
        return torch.cat(self._clips)

    def compute(self) -> float:
        """The number for all clips so far."""
        return float(self.metric.pool(self.values))

    def reset(self) -> None:
        """Forget all clips."""
        self._clips.clear()
