"""A detector of broken frames: not finite, black, frozen, flickering; also during generation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.eval.clips import as_batch, unit
from gen_accel.eval.clips import check as check_shapes
from gen_accel.eval.metric import Metric

log = logging.getLogger(__name__)

KINDS = ("nan", "black", "frozen", "flicker")
_CELLS = 8  # flicker is judged on the mean brightness of 8x8 parts of the frame


@dataclass(frozen=True)
class Limits:
    """When a frame counts as broken. Brightness is Rec. 601 luma in [0, 1].

    Attributes:
        dark: A pixel below this is black (ffmpeg's blackdetect).
        black: A frame with more than this share of black pixels is black (blackdetect).
        still: A frame whose mean change to the one before is less stands still (freezedetect).
        pairs: So many still pairs in a row are a freeze.
        flicker: A frame flickers when its parts are on average this much brighter, or darker, than
            in both neighbours.
    """

    dark: float = 0.10
    black: float = 0.98
    still: float = 0.001
    pairs: int = 3
    flicker: float = 0.02


@dataclass(frozen=True)
class Finding:
    """A run of broken frames.

    Attributes:
        kind: One of `KINDS`.
        first: Number of the first frame.
        last: Number of the last one.
        value: The worst of them: share of values that are not finite, share of black pixels, mean
            change, jump in brightness.
        limit: What it should not have crossed.
    """

    kind: str
    first: int
    last: int
    value: float
    limit: float

    def __str__(self) -> str:
        one = self.first == self.last
        frames = f"frame {self.first}" if one else f"frames {self.first} to {self.last}"
        return f"{frames}: {self.kind} ({self.value:.3g}, limit {self.limit:.3g})"


def check(
    video: Tensor, reference: Tensor | None = None, limits: Limits | None = None
) -> list[Finding]:
    """Broken frames of a clip.

    Args:
        video: ``[frames, channels, height, width]``, uint8 or float in [0, 1]; NaN is found, not
            refused.
        reference: The same shape. What is broken in it as well, a still that should be one, is not
            reported.
        limits: When a frame counts as broken.

    Raises:
        ValueError: Shapes differ, or finite values are outside [0, 1].

    Example:
        >>> video = torch.linspace(0.3, 0.6, 6).view(6, 1, 1, 1).repeat(1, 3, 16, 16)
        >>> video[2:4] = 0
        >>> [str(finding) for finding in check(video)]
        ['frames 2 to 3: black (1, limit 0.98)']
    """
    guard = Guard(limits)
    guard.update(video, reference)
    return guard.compute()


def defects(video: Tensor, reference: Tensor, *, per_frame: bool = False) -> Tensor:
    """Share of frames that are broken and whose counterpart in the reference is not.

    Args:
        video: ``[frames, channels, height, width]`` or with a batch in front; uint8, or float in
            [0, 1], NaN allowed.
        reference: The same shape.
        per_frame: Return 1 for every broken frame and 0 for the others.

    Returns:
        One value per clip: 0-D, or ``[batch]``; with ``per_frame`` ``[frames]`` behind that.

    Raises:
        ValueError: Shapes differ, or finite values are outside [0, 1].
    """
    batch = check_shapes(video, reference)
    rows = []
    for clip, wanted in zip(as_batch(video), as_batch(reference), strict=True):
        guard = Guard()
        guard.update(clip, wanted)
        rows.append(guard.broken().any(0).double())
    values = torch.stack(rows) if batch else rows[0]
    return values if per_frame else values.mean(-1)


class Guard:
    """`check` of a stream: what it keeps of a frame are a few numbers, and of the last its luma.

    Args:
        limits: When a frame counts as broken.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.reset()

    def update(self, video: Tensor, reference: Tensor | None = None) -> None:
        """Take in the next frames, in the arguments of `check`.

        Raises:
            ValueError: As for `check`, or the reference came for a part of the clip only.
        """
        clips = [video] if reference is None else [video, reference]
        if check_shapes(*clips):
            raise ValueError(f"shape {tuple(video.shape)}: a guard watches one clip, not a batch")
        for track, clip in zip((self._video, self._reference), clips):
            for frame in clip:
                track.add(frame, self.limits.dark)
        if len(self._reference) not in (0, len(self._video)):
            raise ValueError(
                f"{len(self._video)} frames and {len(self._reference)} of the reference; give it "
                "with every update or with none"
            )

    def broken(self) -> Tensor:
        """Which frames are, bool ``[kinds, frames]`` in the order of `KINDS`."""
        found = self._broken(self._video)
        return found & ~self._broken(self._reference) if len(self._reference) else found

    def compute(self) -> list[Finding]:
        """What was found so far, by kind and time. The last frame may still turn out to flicker."""
        found = []
        values, limits = self._video.values(), self.limits
        worst = (max, max, min, max)
        bars = (0.0, limits.black, limits.still, limits.flicker)
        for kind, broken in enumerate(self.broken().tolist()):
            for first, last in _runs(broken):
                value = worst[kind](values[kind, first : last + 1].tolist())
                found.append(Finding(KINDS[kind], first, last, value, bars[kind]))
        return found

    def reset(self) -> None:
        """Forget all frames."""
        self._video, self._reference = _Track(), _Track()

    def _broken(self, track: _Track) -> Tensor:
        limits = self.limits
        missing, black, change, jump = track.values()
        none = missing > 0
        dark = (black > limits.black) & ~none
        still = (change < limits.still).tolist()  # of NaN, nothing is said
        frozen = torch.zeros_like(none)
        for first, last in _runs(still):
            frozen[first : last + 1] = last - first + 1 >= limits.pairs
        # One name for one fault: a black clip stands still, and black is a jump for its neighbours.
        near = F.max_pool1d(dark[None].double(), 3, stride=1, padding=1)[0] > 0
        return torch.stack([none, dark, frozen & ~dark, (jump > limits.flicker) & ~near])


@dataclass
class _Track:
    """What is kept of the frames of one clip."""

    missing: list[float] = field(default_factory=list)
    black: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    cells: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None

    def __len__(self) -> int:
        return len(self.missing)

    def add(self, frame: Tensor, dark: float) -> None:
        missing = 0.0
        if frame.is_floating_point():
            missing = 1 - float(frame.isfinite().double().mean())
            # NaN passes no comparison, so that a frame with a hole is neither black nor still.
            luma = _luma(unit(frame.nan_to_num(0, 0, 0))) + (torch.nan if missing else 0)
        else:
            luma = _luma(unit(frame))
        self.missing.append(missing)
        self.black.append(float((luma < dark).double().mean()))
        change = torch.nan if self.last is None else float((luma - self.last).abs().mean())
        self.change.append(change)
        self.cells.append(F.adaptive_avg_pool2d(luma[None], _CELLS).flatten().cpu())
        self.last = luma

    def values(self) -> Tensor:
        """Missing, black, change and jump of every frame, ``[4, frames]``."""
        rows = torch.tensor([self.missing, self.black, self.change]).double()
        jump = torch.zeros(len(self), dtype=torch.float64)
        if len(self) > 2:
            cells = torch.stack(self.cells)
            before, after = cells[1:-1] - cells[:-2], cells[1:-1] - cells[2:]
            # A cut or a fade is on one side only, or opposite on the two.
            both = before * after > 0
            jump[1:-1] = torch.minimum(before.abs(), after.abs()).mul(both).mean(1)
        return torch.cat([rows, jump[None]])


class StepGuard:
    """A ``callback_on_step_end`` of a diffusers pipeline that watches the latents.

    After every step it looks for latents that are not finite or have collapsed to a constant. With
    ``decode`` it also looks ahead: of two neighbouring steps it takes the velocity, of that the
    clean latents ``x - sigma v``, and runs `check` on their frames. That is exact for
    `FlowMatchEulerDiscreteScheduler` with a constant velocity, a preview otherwise, and nothing for
    schedulers without ``sigmas`` of a flow.

    Args:
        decode: Latents, as the pipeline holds them, of one clip to frames
            ``[frames, channels, height, width]`` in [0, 1].
        every: Steps between previews.
        start: Share of the steps before which no preview is judged; early ones are blurred.
        action: ``"record"`` only notes and logs; ``"stop"`` skips the remaining steps; ``"raise"``
            raises `BrokenVideo`.
        limits: When a frame counts as broken.

    Attributes:
        findings: Step and what was found there, in order.

    Example:
        >>> guard = StepGuard(action="raise")
        >>> # pipe(prompt, callback_on_step_end=guard)
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor] | None = None,
        *,
        every: int = 5,
        start: float = 0.5,
        action: Literal["record", "stop", "raise"] = "record",
        limits: Limits | None = None,
    ) -> None:
        if action not in ("record", "stop", "raise"):
            raise ValueError(f"action={action!r}: choose 'record', 'stop' or 'raise'")
        if every < 1 or not 0 <= start <= 1:
            raise ValueError(f"every={every}, start={start}: at least 1, and a share in [0, 1]")
        self.decode, self.every, self.start = decode, every, start
        self.action, self.limits = action, limits
        self.findings: list[tuple[int, str]] = []
        self._before: Tensor | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict:
        """What diffusers calls; hands ``tensors`` back as they are."""
        if "latents" not in tensors:
            raise ValueError(
                f"callback tensors {sorted(tensors)}: StepGuard needs 'latents'; leave "
                "callback_on_step_end_tensor_inputs at its default or add it there"
            )
        if self.action == "stop" and not hasattr(pipe, "_interrupt"):
            raise ValueError(
                f"{type(pipe).__name__} cannot be interrupted; use StepGuard(action='raise')"
            )
        if step == 0:
            self._before = None
        latents = tensors["latents"].detach()
        for finding in self._look(pipe, step, latents):
            self._report(pipe, step, finding)
        self._before = latents if self.decode is not None else None
        return tensors

    def _look(self, pipe: Any, step: int, latents: Tensor) -> list[str]:
        finite = latents.isfinite()
        if not bool(finite.all()):
            return [f"latents are not finite ({1 - float(finite.double().mean()):.3g} of them)"]
        spread = float(latents.float().std())
        if spread < _COLLAPSED:
            return [f"latents have collapsed (deviation {spread:.3g}, limit {_COLLAPSED:g})"]
        steps = len(pipe.scheduler.timesteps)
        due = step + 1 == steps or (step + 1) % self.every == 0
        if self.decode is None or not due or step + 1 < self.start * steps:
            return []
        clean = self._clean(pipe, step, latents)
        found = [] if clean is None else check(self.decode(clean), limits=self.limits)
        return [str(finding) for finding in found]

    def _clean(self, pipe: Any, step: int, latents: Tensor) -> Tensor | None:
        """Where the last step was heading."""
        sigmas = getattr(pipe.scheduler, "sigmas", None)
        # Only a flow starts at one; the latents of a diffusion are scaled differently.
        if sigmas is None or len(sigmas) < step + 2 or float(sigmas[0]) > 1 + 1e-6:
            return None
        now, before = float(sigmas[step + 1]), float(sigmas[step])
        if now == 0:
            return latents  # the last step arrives
        if self._before is None or now >= before:
            return None
        velocity = (latents - self._before) / (now - before)
        return latents - now * velocity

    def _report(self, pipe: Any, step: int, finding: str) -> None:
        text = f"step {step + 1} of {len(pipe.scheduler.timesteps)}: {finding}"
        self.findings.append((step, finding))
        log.warning(text)
        if self.action == "raise":
            raise BrokenVideo(f"{text}; run these steps dense, or raise the density")
        if self.action == "stop":
            pipe._interrupt = True


class BrokenVideo(RuntimeError):
    """Raised by `StepGuard` when a generation has gone wrong."""


_COLLAPSED = 1e-3  # deviation of all latents; those of a picture have about one


def _luma(frame: Tensor) -> Tensor:
    weights = frame.new_tensor([0.299, 0.587, 0.114] if len(frame) == 3 else [1 / len(frame)])
    return (frame * weights[:, None, None]).sum(0)


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """First and last place of each run of True."""
    edges = [False, *flags, False]
    starts = [i for i in range(len(flags)) if edges[i + 1] and not edges[i]]
    ends = [i for i in range(len(flags)) if edges[i + 1] and not edges[i + 2]]
    return list(zip(starts, ends))


METRICS = (
    Metric(
        "defects", defects, "", "lower",
        "share of frames that are black, frozen, flickering or not finite, and not so in the "
        "reference",
    ),
)  # fmt: skip
