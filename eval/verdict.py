"""Whether a faster setting is good enough: paired statistics, limits, and the search for one."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gen_accel.eval.metrics import get

CONFIDENCE = 0.95
STATES = ("pass", "back off", "fail")
ALIASES = {"clip": "clip_score"}
# Perfect against itself: the dense video's own value says nothing.
_TO_DENSE = (
    "psnr", "psnr_pooled", "ssim", "cosine", "relative_l1", "relative_l2", "lpips", "tof",
    "clip_drift",
)  # fmt: skip
# Higher is better and 1 is perfect: a ratio compares what is missing to 1.
_BEST_IS_ONE = ("flicker", "flicker_compensated", "subject_consistency", "clip_temp")
_LIMIT = re.compile(r"(\w+?)(_drop)?\s*(<=|>=)\s*([-+.\deE]+)(x)?")


@dataclass(frozen=True)
class Limit:
    """What a metric must keep to.

    Attributes:
        text: As it was written.
        metric: Name in `gen_accel.eval.metrics.METRICS`.
        kind: ``"value"`` of the sparse clip, ``"drop"`` (how much worse than the dense clip's own
            value), or ``"ratio"`` to the dense clip's own value; where 1 is perfect, the ratio of
            what is missing to 1.
        at_least: Direction of a ``"value"``.
        bound: The limit.
    """

    text: str
    metric: str
    kind: str
    at_least: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """``psnr>=25``, ``ssim>=0.9``, ``clip_drop<=0.5``, ``flicker<=1.1x``.

        Raises:
            ValueError: It is none of these forms, the metric is unknown, or the form makes no sense
                for it.
        """
        match = _LIMIT.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"limit {text!r}: write METRIC>=NUMBER, METRIC<=NUMBER, METRIC_drop<=NUMBER or "
                "METRIC<=NUMBERx"
            )
        name, drop, sign, number, ratio = match.groups()
        metric = get(ALIASES.get(name, name))
        try:
            bound = float(number)
        except ValueError:
            raise ValueError(f"limit {text!r}: {number!r} is not a number") from None
        kind = "drop" if drop else "ratio" if ratio else "value"
        if drop and ratio:
            raise ValueError(f"limit {text!r}: a drop is a number or a ratio, not both")
        if metric.axes or "video" not in metric.needs or "mask" in metric.needs:
            raise ValueError(f"limit {text!r}: {metric.name} has no value for a single clip")
        if kind != "value":
            if sign != "<=":
                raise ValueError(f"limit {text!r}: a {kind} is bounded from above; write <=")
            if metric.name in _TO_DENSE:
                raise ValueError(
                    f"limit {text!r}: {metric.name} compares with the dense clip already; write "
                    f"{metric.name}{'>=' if metric.better == 'higher' else '<='}NUMBER"
                )
            if kind == "ratio" and metric.better == "higher" and metric.name not in _BEST_IS_ONE:
                raise ValueError(f"limit {text!r}: use {name}_drop<=NUMBER for {metric.name}")
            if bound < 0 or (kind == "ratio" and bound == 0):
                raise ValueError(f"limit {text!r}: the bound of a {kind} is positive")
        elif (sign == ">=") != (metric.better == "higher"):
            raise ValueError(f"limit {text!r}: {metric.better} is better for {metric.name}")
        return cls(text.strip(), metric.name, kind, sign == ">=", bound)

    @property
    def needs_dense(self) -> bool:
        """Whether the dense clip's own value enters."""
        return self.kind != "value"

    def quantity(self, sparse: float, dense: float | None = None) -> float:
        """What is limited, of one clip."""
        if self.kind == "value":
            return sparse
        assert dense is not None
        if self.kind == "drop":
            return dense - sparse if get(self.metric).better == "higher" else sparse - dense
        missing = self.amount(dense)
        return self.amount(sparse) / missing if missing else math.inf

    def margin(self, sparse: float, dense: float | None = None) -> float:
        """How far a clip stays inside the limit, in the metric's unit; negative outside."""
        if self.kind == "ratio":
            assert dense is not None
            return self.bound * self.amount(dense) - self.amount(sparse)
        inside = self.bound - self.quantity(sparse, dense)
        return -inside if self.at_least else inside

    def amount(self, value: float) -> float:
        """What a ratio compares."""
        return 1 - value if self.metric in _BEST_IS_ONE else value


@dataclass(frozen=True)
class Finding:
    """A limit, and what the clips say about it.

    Attributes:
        limit: The limit.
        state: ``"pass"`` when the whole confidence interval keeps the limit, ``"fail"`` when all of
            it misses it, ``"back off"`` when it cannot be told: keep more, or render more prompts.
        mean: The limited quantity: the mean, for a ratio that of the means.
        low: Lower end of its 95 % confidence interval.
        high: Upper end.
        worst: The quantity of the worst clip.
        worst_clip: Its index.
        shortfall: By how much the mean misses the limit, as a share of it; negative inside.
        n: Number of clips.
        note: Why a state is what it is, where numbers do not say it.
    """

    limit: Limit
    state: str
    mean: float
    low: float
    high: float
    worst: float
    worst_clip: int
    shortfall: float
    n: int
    note: str = ""


def judge(limit: Limit, sparse: Sequence[float], dense: Sequence[float] | None = None) -> Finding:
    """Compare paired clips with a limit, by the t interval of a mean or of a ratio of means.

    Clips differ from each other far more than methods do, so drops and ratios are of the same clip:
    what a prompt does to both sides cancels.

    Args:
        limit: The limit.
        sparse: Value of each sparse clip.
        dense: The dense clips' own values, where `Limit.needs_dense`.

    Raises:
        ValueError: Fewer than two clips, or unequal numbers of them.
    """
    n = len(sparse)
    if n < 2:
        raise ValueError(f"{n} clip(s): an interval needs at least 2; give more prompts")
    if limit.needs_dense and (dense is None or len(dense) != n):
        raise ValueError(f"{limit.text}: needs the dense value of each of the {n} clips")
    own = dense if dense is not None else [0.0] * n
    broken = [i for i, (s, d) in enumerate(zip(sparse, own)) if not math.isfinite(s + d)]
    if broken:
        nan = math.nan
        note = f"clip {broken[0]} has no finite value"
        return Finding(limit, "fail", nan, nan, nan, nan, broken[0], math.inf, n, note)
    if limit.kind == "ratio":
        mean, half = ratio_interval(*([limit.amount(x) for x in side] for side in (sparse, own)))
    else:
        mean, half = interval([limit.quantity(s, d) for s, d in zip(sparse, own)])
    low, high = mean - half, mean + half
    sign = -1.0 if limit.at_least else 1.0  # turns "at least" into "at most"
    bad, good = sorted((sign * low, sign * high), reverse=True)
    bound = sign * limit.bound
    slack = 1e-12 * max(1.0, abs(bound))  # of rounding
    state = "pass" if bad <= bound + slack else "fail" if good > bound else "back off"
    worst = min(range(n), key=lambda i: limit.margin(sparse[i], own[i]))
    return Finding(
        limit,
        state,
        mean,
        low,
        high,
        limit.quantity(sparse[worst], own[worst]),
        worst,
        (sign * mean - bound) / (abs(bound) or 1.0),
        n,
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t interval.

    Raises:
        ValueError: Fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} clip(s): an interval needs at least 2; give more prompts")
    half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return statistics.fmean(values), half


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """Ratio of two means of pairs, and half the width of its 95 % interval.

    The ratio estimator of survey sampling (Cochran 1977, section 2.11): its error is that of the
    residuals ``above - ratio * below``, so a ratio that is the same in every clip is known exactly.

    Raises:
        ValueError: Fewer than two pairs.
    """
    mean = statistics.fmean(below)
    if mean <= 0:  # something is infinitely more than nothing, and nothing is as much
        return (math.inf if any(above) else 1.0), 0.0
    ratio = statistics.fmean(above) / mean
    half = interval([a - ratio * b for a, b in zip(above, below)])[1]
    return ratio, half / mean


def overall(states: Iterable[str]) -> str:
    """The worst of them."""
    return max(states, key=STATES.index, default="pass")


def rank(verdicts: Mapping[str, Sequence[Finding]], density: Mapping[str, float]) -> list[str]:
    """Names, best first: by verdict; the sparsest first among those that pass, and the one that
    misses its limits by least first among the others.
    """  # noqa: D205

    def key(name: str) -> tuple[int, float]:
        findings = verdicts[name]
        state = STATES.index(overall(f.state for f in findings))
        missed = max((f.shortfall for f in findings), default=0.0)
        return state, density[name] if state == 0 else missed

    return sorted(verdicts, key=key)


def sparsest(ladder: Sequence[float], passes: Callable[[float], bool]) -> float | None:
    """Lowest density that passes, by bisection; None when the highest does not.

    Assumes that keeping more never turns a pass into a failure. At most ``log2(n) + 1`` densities
    are tried.

    Args:
        ladder: Densities, in any order.
        passes: Whether a density passes; renders clips, so it is called once per density.

    Raises:
        ValueError: There are no densities, or one is outside (0, 1].
    """
    steps = sorted(set(ladder))
    if not steps or not (steps[0] > 0 and steps[-1] <= 1):
        raise ValueError(f"densities {steps}: at least one, each in (0, 1]")
    if not passes(steps[-1]):
        return None
    low, high = 0, len(steps) - 1  # steps[high] passes
    while low < high:
        middle = (low + high) // 2
        if passes(steps[middle]):
            high = middle
        else:
            low = middle + 1
    return steps[high]


def t_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t distribution; ``share`` in [0.5, 1).

    By bisection of its distribution function, a finite series for whole degrees of freedom
    (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _t_below(t: float, freedom: int) -> float:
    angle = math.atan(t / math.sqrt(freedom))
    cosine2 = math.cos(angle) ** 2
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine2 * (k - 1) / k
        total += term
    if not odd:
        return 0.5 + 0.5 * math.sin(angle) * total
    series = math.sin(angle) * total if freedom > 1 else 0.0
    return 0.5 + (angle + series) / math.pi
