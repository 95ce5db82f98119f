"""``gen-accel bench tune``: time the tile sizes of the Triton kernel and write the table it reads.

Every configuration worth timing (`kernels.triton.config.candidates`) is checked, then timed on
unbalanced lists of each band of densities; the fastest goes into ``tuned.json``.
"""

from __future__ import annotations

import argparse
import itertools
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gen_accel.cli.bench.again import Again
from gen_accel.cli.bench.kernel import PRECISIONS, Case, Suite, prepare_run
from gen_accel.cli.bench.kernel_codes import on_codes
from gen_accel.cli.bench.kernel_pieces import Candidate, Piece
from gen_accel.cli.bench.options import add

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.kernels.blocks import Blocks
    from gen_accel.kernels.operands import Operands
    from gen_accel.kernels.tail import Tail
    from gen_accel.kernels.triton.config import Config, Key

# What is tuned on. Long enough that a launch is noise, short enough that compiling dominates.
SUITES = {
    "hopper": Suite(
        (Case("tune", (21, 30, 52), 0, 12),), "cuda", ("triton",), flex=False, precisions=PRECISIONS
    ),
    "smoke": Suite((Case("tune", (2, 8, 8), 0, 2),), "cpu", ("triton",), flex=False, repeats=1),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, "suite", "limit", "piece_limit", "again", "head_dims", "dtypes", "block", "seed")


def run(args: argparse.Namespace) -> int:
    """Write the fastest configurations; 1 when a configuration gave a wrong result."""
    suite = prepare_run(SUITES, args.suite)
    if suite.device == "cpu" and not args.out:
        raise ValueError(
            f"--suite {args.suite}: times of a CPU must not ship; name a file with --out"
        )
    from gen_accel.cli.bench.kernel_pieces import attempt, free_gpu
    from gen_accel.eval.files import write_text
    from gen_accel.eval.harness import result_row
    from gen_accel.kernels.triton import config as configs

    out = Path(args.out or configs.TUNED)
    entries, again = configs.read(out), Again(out, args.again)
    here = result_row("tune", "", 0.0, "ms", device=suite.device)
    about = {name: here[name] for name in ("device", "versions", "commit")}
    ends = time.monotonic() + args.limit
    good, broken, late = True, False, 0
    for key, band in itertools.product(_keys(args, suite), configs.DENSITIES):
        # What is known of a key and a band, whatever the rest of its entry says.
        wanted = configs.entry(key, band, configs.candidates(key)[0])
        known = [e for e in entries if all(e[n] == wanted[n] for n in ("key", "density"))]
        if any(again.counts(entry) for entry in known):
            for entry in known:
                for name, why in entry.get("wrong", {}).items():
                    print(f"{_title(key, band)}: {name} WRONG: {why}")
                    good = False
            continue
        left = ends - time.monotonic()
        if left <= 0:
            late += 1
            continue
        make = partial(_TunePiece, suite, key, band, args.seed)
        piece = attempt(make, min(args.piece_limit, left), _title(key, band))
        good &= piece is not None and not piece.wrong
        timings = {} if piece is None else piece.timings
        if piece is not None and timings:
            milliseconds, name = min((1e3 * t.median, name) for name, t in timings.items())
            about["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            wrong = {"wrong": piece.wrong} if piece.wrong else {}  # told again by the next run
            found = configs.entry(key, band, piece.configs[name], ms=milliseconds, **about, **wrong)
            entries = [entry for entry in entries if entry not in known] + [found]
            write_text(out, configs.dump(entries))
        del piece, timings
        if not free_gpu():
            good, broken = False, True
            break
    again.end(bool(late) or broken)
    print(f"{out}: {len(entries)} entries")
    if late:
        print(f"not measured, time was up: {late}; run the command again")
    return 0 if good else 1


def _title(key: Key, band: float) -> str:
    return f"{', '.join(map(str, key))}, up to {band:g}"


def _keys(args: argparse.Namespace, suite: Suite) -> list[Key]:
    import torch

    from gen_accel.kernels.triton.config import Key

    capability = 0
    if suite.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    block = (args.block, args.block)
    small = args.block < 128  # such rows are merged, which needs masks
    return [
        Key(capability, dim, dtype, block, small, tail, precision)
        for precision in ("", *suite.precisions)
        for dim in args.head_dims
        for dtype in args.dtypes
        if dtype != "fp32"
        for tail in (False, True)
    ]


class _TunePiece(Piece):
    """All configurations of one key at one density."""

    def __init__(self, suite: Suite, key: Key, band: float, seed: int) -> None:
        self.key = key
        self.configs: dict[str, Config] = {}
        self.codes: Operands | None = None
        case = suite.cases[0]
        case = Case(case.name, case.grid, 0, case.heads, key.head_dim, key.block[0])
        super().__init__(suite, case, f"realistic {min(band, 0.6) * 0.9:g}", seed)
        self.part = f"{', '.join(map(str, key))}, density up to {band:g}"

    def build(self) -> list[Candidate]:
        """One candidate per configuration."""
        import torch
        from triton.runtime.errors import OutOfResources

        from gen_accel.kernels.triton.config import candidates

        self.absences = (*self.absences, OutOfResources)  # shared memory is but estimated
        if self.key.dtype == "fp16":
            self.q, self.k, self.v = (x.to(torch.float16) for x in (self.q, self.k, self.v))
        density = float(self.part.split()[1])
        blocks = self.blocks("realistic", density)
        tail = self.tail("joint" if self.key.tail else None, blocks)
        row = {"density": blocks.density(), "tflop": self.tflop(blocks)}
        self.configs = {" ".join(map(str, c)): c for c in candidates(self.key)}
        error = partial(self.error, blocks, tail)
        allowed = None
        if self.key.precision:
            from gen_accel.kernels.operands import operands
            from gen_accel.kernels.quant import PRECISIONS

            self.codes = operands(self.q, self.k, self.v, PRECISIONS[self.key.precision])
            allowed = self.lossy(self.key.precision, blocks, tail)
        return [
            Candidate(name, partial(self._run, blocks, tail, config), error, row, allowed)
            for name, config in self.configs.items()
        ]

    def _run(self, blocks: Blocks, tail: Tail | None, config: Config) -> Tensor:
        from gen_accel.kernels.triton.launch import attend

        if self.codes is not None:
            return on_codes(self, self.codes, blocks, tail=tail, config=config)
        tensors = (self.q, self.k, self.v)
        return attend(*tensors, blocks, self.scale, tail=tail, config=config)[0]
