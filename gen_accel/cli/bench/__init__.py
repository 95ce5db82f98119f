"""``gen-accel bench``: benchmarks, each with options of its own."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from gen_accel.cli.bench.options import add
from gen_accel.cli.options import Parser, dotted

# A module each: add_options(parser) and run(args) -> exit code. NAME_part.py belongs to NAME.py.
BENCHMARKS = {
    "attention": "one attention call against dense SDPA and FlexAttention; also without a name",
    "gna": "GNA windows on block edges, and the same at stride 1",
    "pooled": "calls that choose their blocks themselves",
    "tails": "what tails mend, on calls of a toy model",
    "mixtures": "order, selection and tail, on whole clips of a toy model",
    "precision": "what quantising costs, on calls and clips of a toy model",
    "kernel": "calls of real models on a GPU, every kernel there is",
    "tune": "tile sizes of the Triton kernel, for this GPU",
    "e2e": "denoising steps of whole transformers, dense and sparse",
    "wipe": "removal of objects by Object-WIPER, with ground truth",
    "ground": "what expressions mean, by RefAM, with ground truth",
    "damage": "which metric sees which damage",
    "metrics": "what metrics cost",
}


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Names a default where there is one to name."""
        return super()._get_help_string(action) if action.default else action.help


class _Benchmark(Parser):
    """Parser of one benchmark, whose module is imported when it is asked for."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse here what is not known, where the options to choose from are."""
        if not any(action.dest == "out" for action in self._actions):
            module = _module(self.prog.split()[-1])
            self.description = module.__doc__
            module.add_options(self)
            add(self, "threads", "out")
        found, extra = super().parse_known_args(args, namespace)
        dotted(extra, (), [n[2:] for a in self._actions for n in a.option_strings if n[:2] == "--"])
        return found, extra


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "bench", help="time and judge; bench NAME --help", description=__doc__
    )
    names = parser.add_subparsers(dest="what", metavar="NAME", parser_class=_Benchmark)
    for name, what in BENCHMARKS.items():
        names.add_parser(name, help=what, formatter_class=_Defaults)
    parser.set_defaults(attention=names.choices["attention"])


def run(args: argparse.Namespace) -> int:
    """Run one; 1 when a result was wrong."""
    import torch

    from gen_accel.eval.files import check_writable

    if args.what is None:
        args = argparse.Namespace(**vars(args.attention.parse_args([])), what="attention")
    for kind in ("out", "table", "plot"):
        if path := getattr(args, kind, None):
            check_writable(Path(path).parent)
    device = getattr(args, "device", "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU; use --device cpu")
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return _module(args.what).run(args)
    finally:
        torch.set_num_threads(threads)


def _module(name: str) -> Any:
    return importlib.import_module(f"gen_accel.cli.bench.{name}")
