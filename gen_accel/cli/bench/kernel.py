"""``gen-accel bench kernel``: attention calls at the sizes of real models, beside dense ones.

The work is cut into pieces. What was measured is in the results file at once; run again, the
command does what is left.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gen_accel.cli.bench.again import Again
from gen_accel.cli.bench.options import add, list_of


@dataclass(frozen=True)
class Case:
    """One call: a grid of video tokens, text behind them."""

    name: str
    grid: tuple[int, int, int]
    text: int
    heads: int
    dim: int = 128
    block: int = 128

    @property
    def video(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.video + self.text

    @property
    def pooled(self) -> int:
        """Video tokens in whole blocks; with text, the block they share is always seen."""
        return self.video // self.block * self.block if self.text else self.video


@dataclass(frozen=True)
class Suite:
    """Calls and what runs them."""

    cases: tuple[Case, ...]
    device: str
    impls: tuple[str, ...]
    flex: bool
    densities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    repeats: int = 20
    precisions: tuple[str, ...] = ()  # quantised calls


_PARTS = ("dense", "realistic", "around", "uniform", "quantised", "flex")
PRECISIONS = ("int8", "int8+int8", "int8+fp8")  # those with kernels

SUITES = {
    "hopper": Suite(
        (
            Case("Wan-14B 720p", (21, 45, 80), 0, 40),
            Case("HunyuanVideo 720p", (33, 45, 80), 256, 24),
            Case("FLUX-4K", (1, 256, 256), 512, 24),
            Case("Cosmos-7B", (16, 44, 80), 0, 32),
            Case("Wan-1.3B 480p", (21, 30, 52), 0, 12),
        ),
        device="cuda",
        impls=("triton",),
        flex=True,
        precisions=PRECISIONS,
    ),
    "smoke": Suite(
        (Case("smoke", (2, 8, 8), 20, 2, dim=32, block=32),),
        device="cpu",
        impls=("gather", "triton"),
        flex=False,
        densities=(0.3,),
        repeats=1,
        precisions=("int8+int8",),
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, "suite", "limit", "piece_limit", "again", "table", "plot", "seed")
    parts = f"with commas between ({','.join(_PARTS)})"
    parser.add_argument("--parts", type=list_of(_part), metavar="P,P", help=parts)


def _part(text: str) -> str:
    if text not in _PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(_PARTS)}")
    return text


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, print it, write the table; 1 when a result was wrong."""
    suite = prepare_run(SUITES, args.suite)
    from gen_accel.cli.bench.kernel_pieces import Piece, attempt, free_gpu
    from gen_accel.cli.bench.kernel_table import kernel_page, kernel_plot
    from gen_accel.eval.files import check_writable, write_text
    from gen_accel.eval.harness import append_rows, read_rows

    out = Path(args.out or f"eval/results/kernel_{args.suite}.jsonl")
    check_writable(out.parent)
    ends = time.monotonic() + args.limit
    again = Again(out, args.again)
    good, broken, late = True, False, []
    for number, (case, part) in enumerate(_pieces(suite)):
        if args.parts and part.split()[0] not in args.parts:
            continue
        rows = read_rows(out) if out.exists() else []
        here = partial(_is_result_of, suite=args.suite, case=case, part=part, device=suite.device)
        known = [row for row in rows if again.counts(row) and here(row)]
        if known:
            good &= told_wrong(known)
            continue
        left = ends - time.monotonic()
        if left <= 0:
            late.append(f"{case.name}, {part}")
            continue
        make = partial(Piece, suite, case, part, args.seed + number)
        piece = attempt(make, min(args.piece_limit, left), f"{case.name}, {part}")
        good &= piece is not None and not piece.wrong
        if piece is not None:
            append_rows(out, piece.rows(args.suite))
        del piece
        if not free_gpu():
            good, broken = False, True
            break
    again.end(bool(late) or broken)
    for name in late:
        print(f"not measured, time was up: {name}; run the command again")
    rows = read_rows(out) if out.exists() else []
    rows = [row for row in rows if row["config"].get("suite") == args.suite]
    if args.table and rows:
        write_text(args.table, kernel_page(rows))
    if args.plot and rows:
        write_text(args.plot, kernel_plot(rows))
    return 0 if good else 1


def told_wrong(rows: list[dict[str, Any]]) -> bool:
    """Say which of a piece's newest rows are wrong; whether none is."""
    from gen_accel.eval.harness import newest

    wrong = [row for row in newest(rows) if "wrong" in row["config"]]
    for row in wrong:
        config = row["config"]
        print(f"{config['case']}, {config['part']}: {row['name']} WRONG: {config['wrong']}")
    return not wrong


def prepare_run(suites: Mapping[str, Suite], name: str) -> Suite:
    """The suite of that name, where this machine can run it."""
    if name not in suites:
        raise ValueError(f"--suite {name}: it must be one of {', '.join(suites)}")
    suite = suites[name]
    if suite.device == "cpu" and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # no GPU runs the kernels of this suite
    import torch

    if suite.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--suite {name}: torch sees no GPU; use --suite smoke")
    return suite


def _pieces(suite: Suite) -> Iterator[tuple[Case, str]]:
    """What matters most comes first: time may be up before the end."""
    parts = ["dense"]
    lists = ("realistic", "uniform")
    parts += [f"{name} {density:g}" for name in lists for density in suite.densities]
    parts.insert(1 + len(suite.densities), "around")
    if suite.precisions:
        parts += ["quantised dense", *(f"quantised {density:g}" for density in suite.densities)]
    if suite.flex:
        parts += [f"flex {density:g}" for density in suite.densities]
    for part, case in itertools.product(parts, suite.cases):
        yield case, part


def _is_result_of(row: dict[str, Any], suite: str, case: Case, part: str, device: str) -> bool:
    """Whether this row is a result of that piece on this machine, with this code."""
    from gen_accel.eval.harness import result_row

    here = result_row("kernel", "", 0.0, "ms", device=device)
    config = {"suite": suite, "case": case.name, "part": part}
    return all(row[key] == here[key] for key in ("device", "versions", "commit")) and all(
        row["config"].get(key) == value for key, value in config.items()
    )
