"""gen-accel verdict: is a faster setting good enough? Renders prompts dense and sparse to tell."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli import networks, options
from gen_accel.cli.options import UsageError
from gen_accel.cli.pipeline import PROCESSORS
from gen_accel.cli.renders import Render, Renders, Setting

if TYPE_CHECKING:
    from gen_accel.eval.metric import Metric
    from gen_accel.eval.verdict import Finding, Limit

# Names that may stand before a dot: processor.min_tokens=0 for all methods, paro.density=0.3.
SECTIONS = ("processor", "pipeline", *PROCESSORS)
LIMITS = "psnr>=25,flicker<=1.1x,defects<=0"
LADDER = "0.1,0.15,0.2,0.25,0.3,0.4,0.5,0.6,0.7,0.8,0.9"
SHOWN = ("psnr", "ssim")  # in the table of methods


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "verdict",
        help="judge settings by limits on quality; search the sparsest that passes",
        description=__doc__,
        epilog="METHOD.NAME=VALUE sets an option of one method, processor.NAME=VALUE of all, "
        "pipeline.NAME=VALUE one of the pipeline's call. Exit code 1 when no setting passes.",
    )
    options.add(parser, *(name for name in options.OPTIONS if name != "seed"))
    more = {"default": argparse.SUPPRESS}
    parser.add_argument("--seed", type=int, help="of the first prompt; one more for each", **more)
    parser.add_argument(
        "--methods", help="with commas between; gna:density=0.5 sets an option (paro)", **more
    )
    parser.add_argument("--limits", help=f"with commas between ({LIMITS})", **more)
    parser.add_argument("--densities", help=f"to try; with --search ({LADDER})", **more)
    parser.add_argument("--search", action="store_true", help="find the sparsest", **more)
    parser.add_argument("--output", metavar="DIR", help="folder (outputs/verdict)", **more)
    parser.add_argument(
        "--fps", type=options.positive, help="frames per second of the page (8)", **more
    )
    networks.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Render what is missing, judge, write."""
    from gen_accel.cli import pipeline as shared
    from gen_accel.eval.files import check_writable
    from gen_accel.eval.verdict import Limit

    prompts = options.prompts(args)
    if len(prompts) < 2:
        raise UsageError("one prompt: an interval needs at least 2; give more, say 10")
    options.require(args, "model")
    folder = Path(getattr(args, "output", "outputs/verdict"))
    check_writable(folder)
    limits = [Limit.parse(text) for text in getattr(args, "limits", LIMITS).split(",")]
    settings = _settings(getattr(args, "methods", "paro"), args.sections)
    densities = _densities(args)
    tries = [s.at(density) for s in settings for density in densities] if densities else settings
    for setting in tries:
        setting.processor()  # what is wrong with it is told before the model is loaded
    device = shared.device_of(args)
    sources = networks.Networks(args, device)
    names = ",".join(dict.fromkeys([*(limit.metric for limit in limits), *SHOWN, "defects"]))
    metrics, _ = networks.choose(names, ("reference", "prompt"), sources, len(prompts), "--limits")

    call = {name: getattr(args, name) for name in options.CALL if hasattr(args, name)}
    call = {**_toy_call(args.model), **call, **args.sections["pipeline"]}

    def load() -> Any:
        pipe = shared.load_pipeline(args, device)
        shared.call_arguments(args, pipe)  # names what the pipeline does not take
        pipe.set_progress_bar_config(disable=True)
        return pipe

    renders = Renders(folder / "clips", args, call, device, load)
    seed = getattr(args, "seed", 0)
    if len(renders.get(prompts[0], seed).frames) == 1:
        limits = _of_stills(args, limits)
        metrics = {n: m for n, m in metrics.items() if n not in networks.OVER_TIME}
    court = Court(renders, prompts, seed, limits, metrics, sources)
    for setting in settings if getattr(args, "search", False) else ():
        court.search(setting, densities)
    for setting in () if getattr(args, "search", False) else tries:
        court.judge(setting)
    ranked = court.ranked()
    print(_text(court, ranked))
    total = len(prompts) * (1 + len(court.trials))
    print(f"{total} clips, {renders.made} of them rendered now")
    print(f"wrote {_write(folder, args, court, ranked)}")
    return 0 if ranked and court.trials[ranked[0]].state == "pass" else 1


@dataclass
class Trial:
    """A setting, its clips, and what they say.

    Attributes:
        setting: What was tried.
        clips: One per prompt.
        values: Metric -> value of every clip.
        findings: One per limit.
        broken: What the detector of broken frames found, one line each.
    """

    setting: Setting
    clips: list[Render]
    values: dict[str, list[float]]
    findings: list[Finding]
    broken: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """The verdict."""
        from gen_accel.eval.verdict import overall

        return overall(finding.state for finding in self.findings)

    @property
    def density(self) -> float:
        """Kept share, mean over the clips."""
        return sum(clip.density for clip in self.clips) / len(self.clips)

    @property
    def worst(self) -> int:
        """Number of the clip that is worst for the tightest limit that tells clips apart."""
        telling = [finding for finding in self.findings if finding.low != finding.high]
        return max(telling or self.findings, key=lambda finding: finding.shortfall).worst_clip


class Court:
    """Judges settings by their clips.

    Args:
        renders: Where clips come from.
        prompts: What to show.
        seed: Of the first prompt's noise; every prompt has its own, so that clips are independent.
        limits: What must be kept to.
        metrics: What is computed, by name.
        sources: Where their networks come from.
    """

    def __init__(
        self,
        renders: Renders,
        prompts: Sequence[str],
        seed: int,
        limits: Sequence[Limit],
        metrics: Mapping[str, Metric],
        sources: networks.Networks,
    ) -> None:
        self.renders = renders
        self.prompts = prompts
        self.seed = seed
        self.limits = limits
        self.metrics = metrics
        self.sources = sources
        self.trials: dict[str, Trial] = {}
        self.found: dict[str, str | None] = {}
        self.dense = self._clips("dense", None)
        own = {limit.metric for limit in limits if limit.needs_dense}
        # An error here is one of the question, not of a setting.
        self.own = {name: self._values(metrics[name], self.dense) for name in own}

    def judge(self, setting: Setting) -> Trial:
        """Render a setting where it is missing, and judge it."""
        from gen_accel.eval.verdict import judge

        if setting.label not in self.trials:
            clips = self._clips(setting.label, setting)
            values = {n: self._values(m, clips, lenient=True) for n, m in self.metrics.items()}
            findings = [judge(li, values[li.metric], self.own.get(li.metric)) for li in self.limits]
            broken = self._broken(setting.label, clips, values["defects"])
            self.trials[setting.label] = Trial(setting, clips, values, findings, broken)
        return self.trials[setting.label]

    def search(self, setting: Setting, densities: Sequence[float]) -> None:
        """Find the sparsest density of a setting that passes."""
        from gen_accel.eval.verdict import sparsest

        best = sparsest(densities, lambda d: self.judge(setting.at(d)).state == "pass")
        self.found[setting.label] = None if best is None else setting.at(best).label

    def ranked(self) -> list[str]:
        """Labels, best first."""
        from gen_accel.eval.verdict import rank

        findings = {label: trial.findings for label, trial in self.trials.items()}
        return rank(findings, {label: trial.density for label, trial in self.trials.items()})

    def _clips(self, label: str, setting: Setting | None) -> list[Render]:
        from tqdm import tqdm

        bar = tqdm(self.prompts, desc=f"{label:>20}", unit="clip")
        return [self.renders.get(p, self.seed + i, setting) for i, p in enumerate(bar)]

    def _values(
        self, metric: Metric, clips: Sequence[Render], *, lenient: bool = False
    ) -> list[float]:
        return [
            self._value(metric, clip, dense, prompt, lenient)
            for clip, dense, prompt in zip(clips, self.dense, self.prompts)
        ]

    def _value(
        self, metric: Metric, clip: Render, dense: Render, prompt: str, lenient: bool
    ) -> float:
        from gen_accel.cli.renders import code

        given: dict[str, Callable[[], Any]] = {
            "video": lambda: clip.frames,
            "reference": lambda: dense.frames,
            "prompt": lambda: prompt,
            "network": lambda: self.sources.get(metric),
        }
        weights = self.sources.identity(metric) if metric.network else ""
        key = f"{metric.name} {weights} {dense.key} {code('eval')[:12]}"
        if key not in clip.scores:
            try:
                value = float(metric.function(**{need: given[need]() for need in metric.needs}))
            except ValueError:
                if not lenient:
                    raise
                value = math.nan  # a clip that is not finite, say: it fails its limits
            clip.scores[key] = value
            self.renders.save(clip)
        return clip.scores[key]

    def _broken(self, label: str, clips: Sequence[Render], defects: Sequence[float]) -> list[str]:
        from gen_accel.eval.guard import check

        return [
            f"{label}, clip {i}: {finding}"
            for i, (clip, dense) in enumerate(zip(clips, self.dense))
            if defects[i]
            for finding in check(clip.frames, dense.frames)
        ]


# ---- options -------------------------------------------------------------------------------------


def _settings(text: str, sections: Mapping[str, Mapping[str, Any]]) -> list[Setting]:
    """``paro,gna:density=0.5:dense_steps=0``; later options win over the sections'."""
    import yaml

    found = []
    for part in re.split(r",(?![^\[\(]*[\]\)])", text):
        label = part.strip()
        method, *pairs = label.split(":")
        given: dict[str, Any] = {**sections["processor"], **sections.get(method, {})}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals:
                raise UsageError(f"--methods {label}: {pair!r} is not NAME=VALUE")
            given[name.strip().replace("-", "_")] = yaml.safe_load(value)
        found.append(Setting(label, method, given))
    labels = [setting.label for setting in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"--methods: {twice} stands twice")
    return found


def _of_stills(args: argparse.Namespace, limits: Sequence[Limit]) -> list[Limit]:
    """The limits for a model that makes pictures.

    Raises:
        UsageError: One that was asked for compares frames.
    """
    timed = [limit.text for limit in limits if limit.metric in networks.OVER_TIME]
    if timed and hasattr(args, "limits"):
        raise UsageError(f"--limits {timed[0]}: {networks.STILL}; drop it")
    if timed:
        print(f"left out: {', '.join(timed)}: {networks.STILL}")
    return [limit for limit in limits if limit.text not in timed]


def _densities(args: argparse.Namespace) -> list[float]:
    """To try for every method; none means each method's own."""
    text = getattr(args, "densities", LADDER if getattr(args, "search", False) else "")
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"--densities {text}: numbers with commas between") from error
    return sorted(set(found))


def _toy_call(model: str) -> dict[str, Any]:
    """Arguments the toy models were trained for, which a user would have to look up."""
    from gen_accel.eval.toys import MODELS, TOYS, toy_call

    path = Path(model).resolve()
    name = path.name.removeprefix("toy-")
    known = path.parent == MODELS and path.name != name and name in TOYS
    return toy_call(name) if known else {}


# ---- results -------------------------------------------------------------------------------------

_HEAD = ("setting", "density", "limit", "mean", "95 % interval", "worst clip", "says")


def _lines(court: Court, ranked: Sequence[str]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for label in ranked:
        trial = court.trials[label]
        for finding in trial.findings:
            kept = f"{trial.density:.3f}"
            interval = f"{finding.low:.4g} .. {finding.high:.4g}"
            worst = f"{finding.worst:.4g} (#{finding.worst_clip})"
            mean = f"{finding.mean:.4g}"
            lines.append((label, kept, finding.limit.text, mean, interval, worst, finding.state))
    return lines


def _text(court: Court, ranked: Sequence[str]) -> str:
    rows = [_HEAD, *_lines(court, ranked)]
    wide = [max(len(row[i]) for row in rows) + 2 for i in range(len(_HEAD))]
    text = ["".join(f"{cell:<{w}}" for cell, w in zip(row, wide)).rstrip() for row in rows]
    text.append("")
    seconds = _seconds(court.dense)
    for place, label in enumerate(ranked, 1):
        trial = court.trials[label]
        faster = seconds / _seconds(trial.clips)
        text.append(f"{place}. {label}: {trial.state}, {faster:.2f}x as fast as dense")
    text += [line for trial in court.trials.values() for line in trial.broken]
    text += [_search_line(method, label) for method, label in court.found.items()]
    return "\n".join(text)


def _search_line(method: str, label: str | None) -> str:
    if label is None:
        return f"no density of {method} passes"
    return f"the sparsest setting of {method} that passes is {label}"


def _seconds(clips: Sequence[Render]) -> float:
    """Median, for the first call also warms up."""
    import statistics

    return statistics.median(clip.seconds for clip in clips)


def _rows(court: Court, args: argparse.Namespace) -> list[dict[str, Any]]:
    from gen_accel.eval.harness import result_row

    rows = []
    for label, trial in court.trials.items():
        config: dict[str, Any] = {"setting": label, "processor": repr(trial.setting.processor())}
        config |= {"density": trial.density, "call": court.renders.call}
        for f in trial.findings:
            if math.isfinite(f.mean):
                judged = {**config, "limit": f.limit.text, "state": f.state, "worst": f.worst}
                ends = (f.low, f.high) if math.isfinite(f.high) else None
                row = result_row(
                    "verdict", f.limit.metric, f.mean, "", n=f.n, spread=ends,
                    config=judged, model=args.model, seed=court.seed,
                )  # fmt: skip
                rows.append(row)
    return rows


def _write(folder: Path, args: argparse.Namespace, court: Court, ranked: Sequence[str]) -> Path:
    import json

    from gen_accel.cli import pages
    from gen_accel.cli.doctor import versions
    from gen_accel.eval.files import write_text
    from gen_accel.eval.report import Report, Row, Table, write_report

    rows = _rows(court, args)
    write_text(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    methods = [Row("dense", _seconds(court.dense))]
    clips, plots, pictures = {}, {}, []
    for label in ranked:
        trial = court.trials[label]
        psnr, ssim = (_mean(trial.values[name]) for name in SHOWN)
        methods.append(Row(label, _seconds(trial.clips), trial.density, psnr, ssim, trial.state))
        i = trial.worst
        both = {"dense": court.dense[i].frames, label: trial.clips[i].frames}
        title = f"{label}, worst clip (#{i}): {court.prompts[i]}"
        if bool(both[label].float().isfinite().all()):
            fps = getattr(args, "fps", 8.0)
            clips[title] = pages.players(folder, f"{label}.{i}", both, "dense", fps)
            frames = {"dense": _frames(court, court.dense[i], i, "reference")}
            frames[label] = _frames(court, trial.clips[i], i)
            plots[title] = pages.curves(frames, court.metrics.values())
        pictures += pages.density_pictures(trial.clips[i].run, label)
    said = [_search_line(method, label) for method, label in court.found.items()]
    states = [f"{label}: {court.trials[label].state}" for label in ranked]
    summary = f"{len(court.prompts)} prompts. " + "; ".join(said or states) + "."
    notes = [
        f"95 % t intervals over {len(court.prompts)} clips, paired: each sparse clip against the "
        "dense one of the same prompt and noise. A setting passes when the whole interval keeps "
        "the limit, fails when none of it does; otherwise back off, or render more prompts.",
        "Every clip was rendered with a processor of its own, calibration included. Times are "
        "medians of whole pipeline calls on this machine.",
        *(line for label in ranked for line in court.trials[label].broken),
    ]
    data = {
        "prompts": list(court.prompts),
        "values": {label: court.trials[label].values for label in ranked},
        "rendered": court.renders.made,
        "found": court.found,
        "states": {label: court.trials[label].state for label in ranked},
    }
    config = {"model": args.model, "seed": court.seed, **court.renders.call}
    config |= {label: repr(court.trials[label].setting.processor()) for label in ranked}
    tables = {
        "Limits": Table(_HEAD, _lines(court, ranked)),
        "Definitions": pages.definitions(court.metrics.values()),
    }
    report = Report(
        "gen-accel verdict", summary, methods, tables=tables, clips=clips, plots=plots,
        pictures={"Density": pictures}, notes=notes, config=config, versions=versions(), data=data,
    )  # fmt: skip
    return write_report(folder, report)


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _frames(court: Court, clip: Render, i: int, without: str = "") -> dict[str, list[float]]:
    """Metric -> values per frame of a clip, for metrics that have them and do not need ``without``.

    The dense clip against itself is perfect, and no curve.
    """
    found = {}
    for name, metric in court.metrics.items():
        if metric.per_frame is not None and without not in metric.needs:
            given: dict[str, Any] = {"video": clip.frames, "reference": court.dense[i].frames}
            given["prompt"] = court.prompts[i]
            if metric.network is not None:
                given["network"] = court.sources.get(metric)
            values = metric.per_frame(**{need: given[need] for need in metric.needs})
            found[name] = values.flatten().tolist()
    return found
