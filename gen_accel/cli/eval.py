"""gen-accel eval: compare videos with a reference and with their prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli import networks, options
from gen_accel.cli.options import UsageError

if TYPE_CHECKING:
    from gen_accel.eval.compare import Comparison, Pair

DEFAULT = "psnr,ssim,flicker"


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "eval",
        help="score videos against a reference and a prompt",
        description=__doc__,
        epilog="Clips of folders are paired by name. Exit code 2 when a clip could not be scored.",
    )
    more = {"default": argparse.SUPPRESS}
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="files, or folders of clips")
    parser.add_argument("--reference", metavar="X", help="file or folder to compare with", **more)
    parser.add_argument("--mask", metavar="X", help="masks of what was removed, white", **more)
    parser.add_argument("--prompt", action="append", help="what the clips should show", **more)
    parser.add_argument("--prompts", metavar="FILE", help="one prompt per clip and line", **more)
    parser.add_argument("--metrics", help=f"names with commas between, or all ({DEFAULT})", **more)
    parser.add_argument("--output", metavar="DIR", help="folder (outputs/eval)", **more)
    parser.add_argument("--players", type=int, help="clips shown on the page (4)", **more)
    parser.add_argument(
        "--fps", type=options.positive, help="of players, where no file says (8)", **more
    )
    parser.add_argument("--device", metavar="X", help=options.OPTIONS["device"]["help"], **more)
    networks.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Score, print, write; 2 when something could not be scored."""
    from gen_accel.cli.pipeline import device_of
    from gen_accel.eval.compare import Comparison, pair_up
    from gen_accel.eval.files import check_writable
    from gen_accel.eval.load import find_clips

    folder = Path(getattr(args, "output", "outputs/eval"))
    check_writable(folder)
    prompts = options.prompts(args) if {"prompt", "prompts"} & vars(args).keys() else []
    optional = {name: getattr(args, name, None) for name in ("reference", "mask")}
    found = {name: find_clips(path) if path else None for name, path in optional.items()}
    candidates = {name: find_clips(path) for name, path in _labels(args.videos).items()}
    pairs, errors = pair_up(candidates, found["reference"], found["mask"], prompts)
    given = [name for name, clips in found.items() if clips] + ["prompt"] * bool(prompts)
    clips = max((sum(p.candidate == c for p in pairs) for c in candidates), default=0)

    sources = networks.Networks(args, device_of(args))
    names = getattr(args, "metrics", DEFAULT if found["reference"] else "flicker")
    # What was asked for by name is computed, or fails.
    stills = names in (DEFAULT, "flicker", "all") and _stills(pairs)
    metrics, left = networks.choose(names, given, sources, clips, stills=stills)
    comparison = Comparison(metrics, sources.all(metrics.values()))
    _score(comparison, pairs, getattr(args, "players", 4))

    errors += comparison.errors
    for error in errors:
        print(f"gen-accel eval: {error}", file=sys.stderr)
    print(_table(comparison, list(candidates)))
    for line in _left_out(left):
        print(line)
    if any(scored.values for scored in comparison.scored):
        page = _write(folder, args, comparison, list(candidates), left, errors)
        print(f"wrote {page}")
    if errors:
        failed = {scored.pair for scored in comparison.scored if scored.errors}
        alone = len(errors) - len(comparison.errors)
        print(f"{len(failed) + alone} of {len(pairs) + alone} clips failed")
    return 2 if errors else 0


def _labels(videos: list[str]) -> dict[str, str]:
    """Shortest names that tell the candidates apart."""
    paths = [Path(video) for video in videos]
    for name in (lambda p: p.stem if p.is_file() else p.name, str):
        labels = [name(path) or str(path) for path in paths]
        if len(set(labels)) == len(labels):
            return dict(zip(labels, videos))
    raise UsageError(f"{videos[0]}: a video is given twice; name each once")


def _stills(pairs: list[Pair]) -> bool:
    """Whether all clips have one frame; one that cannot be read is told when it is scored."""
    from gen_accel.eval.load import read_clip

    def still(path: Path) -> bool:
        try:
            return len(read_clip(path).frames) == 1
        except (ValueError, OSError):
            return True

    return all(still(pair.path) for pair in pairs)


def _score(comparison: Comparison, pairs: list[Pair], players: int) -> None:
    from tqdm import tqdm

    shown = sorted({pair.name for pair in pairs})[:players]
    for pair in tqdm(pairs, desc="eval", unit="clip", disable=len(pairs) < 2):
        comparison.add(pair, frames=pair.name in shown)


def _table(comparison: Comparison, candidates: list[str]) -> str:
    totals = {name: comparison.totals(name) for name in candidates}
    width = max(12, *(len(name) + 2 for name in candidates))
    lines = [f"{'metric':22}{'better':8}" + "".join(f"{name:>{width}}" for name in candidates)]
    for name, metric in comparison.metrics.items():
        cells = (_number(totals[c][0].get(name)) for c in candidates)
        lines.append(f"{name:22}{metric.better:8}" + "".join(f"{c:>{width}}" for c in cells))
    notes = dict.fromkeys(note for _, found in totals.values() for note in found)
    lines += [f"  {note}" for note in [*notes, *_infinite(comparison)]]
    for metric, pair, mean, ends, count in _differences(comparison, candidates):
        lines.append(f"{metric:22}{pair}: {mean} ({ends}, {count} clips)")
    return "\n".join(lines)


def _differences(comparison: Comparison, candidates: list[str]) -> list[tuple[str, ...]]:
    """Clip by clip against the first candidate: clips differ more than candidates do."""
    import math

    from gen_accel.eval.verdict import interval

    first, *others = candidates
    values = {c: {s.pair.name: s.values for s in comparison.scored if s.pair.candidate == c}
              for c in candidates}  # fmt: skip
    found: list[tuple[str, ...]] = []
    for name in comparison.metrics:
        for other in others:
            pairs = [(values[other][clip].get(name, math.nan), one.get(name, math.nan))
                     for clip, one in values[first].items() if clip in values[other]]  # fmt: skip
            both = [mine - its for mine, its in pairs if math.isfinite(mine - its)]
            if len(both) > 1:
                mean, half = interval(both)
                ends = f"{_number(mean - half)} .. {_number(mean + half)}"
                found.append((name, f"{other} - {first}", _number(mean), ends, str(len(both))))
    return found


def _infinite(comparison: Comparison) -> list[str]:
    """One line per metric with values that no difference can count."""
    import math

    found = []
    for name in comparison.metrics:
        values = [s.values[name] for s in comparison.scored if name in s.values]
        if count := sum(not math.isfinite(value) for value in values):
            found.append(f"{name}: not finite for {count} clip(s), which differences leave out")
    return found


def _left_out(left: Mapping[str, str]) -> list[str]:
    """One line per reason."""
    reasons = dict.fromkeys(left.values())
    return [f"left out: {', '.join(n for n in left if left[n] == why)}: {why}" for why in reasons]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.3e}"


def _rows(comparison: Comparison, candidates: list[str], args: argparse.Namespace) -> list[Any]:
    """One result per clip and metric, and one per candidate and metric."""
    import math

    from gen_accel.eval.harness import result_row

    rows = []
    for candidate in candidates:
        common = {"candidate": candidate, "reference": getattr(args, "reference", None)}
        mine = [scored for scored in comparison.scored if scored.pair.candidate == candidate]
        for name, value in comparison.totals(candidate)[0].items():
            unit = comparison.metrics[name].unit
            values = {scored.pair.name: scored.values.get(name) for scored in mine}
            for clip, one in values.items():
                if one is not None and math.isfinite(one):
                    config = {**common, "clip": clip}
                    rows.append(result_row("eval clip", name, one, unit, config=config))
            if math.isfinite(value):
                rows.append(result_row("eval", name, value, unit, n=len(mine), config=common))
    return rows


def _write(
    folder: Path,
    args: argparse.Namespace,
    comparison: Comparison,
    candidates: list[str],
    left: Mapping[str, str],
    errors: list[str],
) -> Path:
    import json

    from gen_accel.cli.doctor import versions
    from gen_accel.cli.pages import curves, density_pictures, run_of
    from gen_accel.eval.files import write_text
    from gen_accel.eval.report import Report, Table, write_report

    rows = _rows(comparison, candidates, args)
    write_text(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    totals = {name: comparison.totals(name) for name in candidates}
    metrics = comparison.metrics
    results = [
        (name, m.better, *(_number(totals[c][0].get(name)) for c in candidates), m.definition)
        for name, m in metrics.items()
    ]
    scored = [s for s in comparison.scored if s.values]
    tables = {"Metrics": Table(("metric", "better", *candidates, "definition"), results)}
    if len(scored) > len(candidates):
        per_clip = [(s.pair.name, s.pair.candidate, *(_number(s.values.get(n)) for n in metrics))
                    for s in scored]  # fmt: skip
        tables["Clips"] = Table(("clip", "candidate", *metrics), per_clip)
    if differences := _differences(comparison, candidates):
        head = ("metric", "pair", "mean difference", "95 % interval", "clips")
        note = "Differences of the same clip, so that what a prompt does to both cancels."
        tables["Paired differences"] = Table(head, differences, note)
    clips, plots, pictures = {}, {}, {}
    for name in dict.fromkeys(s.pair.name for s in scored if s.frames):
        same = [s for s in scored if s.pair.name == name]
        clips[name] = _players(folder, args, [s.pair for s in same])
        plots[f"{name}, frame by frame"] = curves(
            {s.pair.candidate: s.frames for s in same}, metrics.values()
        )
    config: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("debug", "command")}
    for label, path in {s.pair.candidate: s.pair.path for s in scored}.items():
        made = run_of(path)
        config |= {f"{label}: {key}": value for key, value in made.get("config", {}).items()}
        if made.get("density"):
            pictures[f"Density of {label}"] = density_pictures(made["density"])
    count = len({s.pair.name for s in scored})
    against = f" against {args.reference}" if hasattr(args, "reference") else ""
    notes = dict.fromkeys(note for _, found in totals.values() for note in found)
    notes |= dict.fromkeys(_infinite(comparison))
    return write_report(
        folder,
        Report(
            "gen-accel eval",
            f"{', '.join(candidates)}{against}: {count} clip(s), {len(metrics)} metrics"
            + (f", {len(errors)} failure(s)." if errors else "."),
            tables=tables,
            clips=clips,
            plots=plots,
            pictures=pictures,
            notes=[*errors, *notes, *_left_out(left)],
            config=config,
            versions=versions(),
        ),
    )


def _players(folder: Path, args: argparse.Namespace, pairs: list[Pair]) -> Any:
    from gen_accel.cli.pages import players
    from gen_accel.eval.load import read_clip

    first = read_clip(pairs[0].path)
    videos = {} if pairs[0].reference is None else {
        "reference": read_clip(pairs[0].reference).frames
    }  # fmt: skip
    for pair in pairs:
        frames = read_clip(pair.path).frames
        if frames.shape == first.frames.shape:
            videos[pair.candidate] = frames
    reference = "reference" if pairs[0].reference is not None else None
    fps = first.fps or getattr(args, "fps", 8.0)
    return players(folder, pairs[0].name, videos, reference, fps)
