"""``gen-accel bench damage``: which metric sees which damage."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.options import add

if TYPE_CHECKING:
    from gen_accel.eval.metric import Accumulator, Metric

BEGIN, END = "<!-- gen-accel bench damage -->", "<!-- end -->"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, "clips", "frames", "size", "device", "seed", "docs")


def run(args: argparse.Namespace) -> int:
    """Print the table, append its rows, put it into the docs."""
    from tqdm import tqdm

    from gen_accel.eval.damage import KINDS, STRENGTHS, concordance, damage_series
    from gen_accel.eval.files import put_between
    from gen_accel.eval.harness import append_rows, result_row

    page = Path(args.docs) if args.docs else None
    if page is not None:
        put_between(page, BEGIN, END)
    metrics, networks = measurable(args)
    samples = tqdm(clips_of(args), total=args.clips, desc="damage", unit="clip")
    series = damage_series(samples, list(metrics.values()), networks)

    def row(name: str, kind: str, states: list[Accumulator]) -> dict[str, Any]:
        levels = {str(k): state.compute() for k, state in zip((0, *STRENGTHS), states)}
        return result_row(
            "damage",
            name,
            concordance(states),
            "share of pairs in order",
            n=args.clips,
            config={"damage": kind, "levels": levels, "unit": metrics[name].unit},
            shape=(args.frames, 3, args.size, args.size),
            seed=args.seed,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that FVD of few clips is biased: equally at all strengths
        rows = [row(name, kind, states) for (name, kind), states in series.items()]
    table = _table(rows, list(metrics), KINDS)
    print(table)
    if args.out:
        append_rows(args.out, rows)
    if page is not None:
        put_between(page, BEGIN, END, table)
    return 0


def clips_of(args: argparse.Namespace) -> Any:
    """Samples of the world, as the options ask."""
    from gen_accel.eval.damage import DAMAGE_WORLD, world_samples

    config = replace(DAMAGE_WORLD, frames=args.frames, size=args.size)
    return world_samples(args.clips, config, args.seed)


def measurable(args: argparse.Namespace) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Those that can be measured here, and their networks; prints why the others cannot."""
    from gen_accel.cli.networks import Networks, choose

    sources = Networks(args, args.device)
    chosen, left = choose("all", ["reference", "mask"], sources, args.clips)
    for reason in dict.fromkeys(left.values()):
        print(f"left out: {', '.join(n for n in left if left[n] == reason)}: {reason}")
    return chosen, sources.all(chosen.values())


def _table(rows: list[dict[str, Any]], names: list[str], kinds: tuple[str, ...]) -> str:
    found = {(row["name"], row["config"]["damage"]): row["value"] for row in rows}
    lines = [f"| | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for name in names:
        cells = (found[name, kind] for kind in kinds)
        lines.append(f"| `{name}` | {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(value: float) -> str:
    return f"**{value:.2f}**" if value >= 0.95 else f"{value:.2f}"
