"""Options that several benchmarks share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from gen_accel.cli.options import flag

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def list_of(item: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A parser of items with commas between."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(item(part.strip()) for part in text.split(","))

    return parse


def positive(text: str) -> int:
    """A number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


def sizes(text: str) -> tuple[int, ...]:
    """Frames, height, width."""
    found = tuple(map(positive, text.split("x")))
    if len(found) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be frames x height x width, as 8x32x36")
    return found


def share(text: str) -> float:
    """A number above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a share in (0, 1]")
    return value


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(DTYPES)}")
    return text


# Name -> keywords of add_argument.
_OPTIONS: dict[str, dict[str, Any]] = {
    # Of every benchmark.
    "threads": {"type": positive, "help": "CPU threads (torch decides)"},
    "out": {"metavar": "FILE", "help": "append the results to this JSON-lines file"},
    "seed": {"type": int, "default": 0, "help": "of everything random"},
    "device": {"default": "cpu", "help": "cpu or cuda"},
    # Tensors.
    "tokens": {"type": positive, "default": 8192, "help": "length of the sequence"},
    "grid": {"type": sizes, "default": "8x32x36", "metavar": "FxHxW", "help": "video tokens"},
    "heads": {"type": positive, "default": 4, "help": "attention heads"},
    "head_dims": {"type": list_of(positive), "default": (64, 128), "metavar": "D,D"},
    "dtypes": {"type": list_of(_dtype), "default": ("fp32", "bf16"), "metavar": "T,T"},
    "block": {"type": positive, "default": 128, "help": "tokens per block"},
    "densities": {"type": list_of(share), "default": (0.25, 0.125), "metavar": "X,X",
                  "help": "kept shares"},
    "repeats": {"type": positive, "default": 15, "help": "rounds that are timed"},
    # What is cut into pieces, and goes on where it stopped.
    "suite": {"default": "hopper", "help": "hopper, or smoke: tiny, on the CPU"},
    "limit": {"type": float, "default": 420, "help": "seconds for all pieces"},
    "piece_limit": {"type": float, "default": 40, "help": "seconds for one piece"},
    "again": {"action": "store_true",
              "help": "also what the file already holds; given again, it goes on where it stopped"},
    # What is written besides.
    "table": {"metavar": "FILE", "help": "write the results as this Markdown page"},
    "plot": {"metavar": "FILE", "help": "write them as this SVG"},
    "docs": {"metavar": "FILE", "help": "put the table between the marks in this page"},
    # Clips of the procedural world, and models trained in it.
    "clips": {"type": positive, "default": 24, "help": "clips of the procedural world"},
    "frames": {"type": positive, "default": 17, "help": "frames of each"},
    "size": {"type": positive, "default": 64, "help": "pixels of a frame's side"},
    "model": {"default": "hunyuan-video", "help": "which toy"},
    "folder": {"metavar": "DIR", "help": "where it is, when not in models/"},
    "prompts": {"type": positive, "default": 4, "help": "captions on either side"},
}  # fmt: skip
TENSORS = ("heads", "head_dims", "dtypes", "block", "densities", "repeats", "device", "seed")
TOY_MODEL = ("model", "folder")


def add(parser: argparse.ArgumentParser, *names: str, **changed: dict[str, Any]) -> None:
    """Add shared options.

    Args:
        parser: Of a benchmark.
        names: Which.
        **changed: Option -> keywords of ``add_argument`` that differ here.
    """
    for name in (*names, *changed):
        settings = {**_OPTIONS[name], **changed.get(name, {})}
        also = ["--density"] if name == "densities" else []
        parser.add_argument(flag(name), *also, **settings)
