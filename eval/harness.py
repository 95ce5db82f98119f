"""Timing side by side, and the result lines that tables and plots are rendered from."""

from __future__ import annotations

import functools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("gen-accel", "torch", "triton", "diffusers", "transformers")
_FLUSH_BYTES = 256 << 20  # more than any L2 cache


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one candidate, one per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        """Time that ``share`` of the rounds did not exceed, interpolated, in seconds."""
        ordered = sorted(self.seconds)
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile, in seconds."""
        return self.quantile(0.25), self.quantile(0.75)

    def speedup_over(self, baseline: Timing) -> float:
        """Median over the rounds of ``baseline / self``.

        Paired, so that a load that comes and goes meets both.
        """
        return statistics.median(b / s for b, s in zip(baseline.seconds, self.seconds))


def measure(
    fns: Mapping[str, Callable[[], Any]],
    repeats: int = 20,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time functions against each other: in every round each runs once, in rotating order.

    Args:
        fns: Candidates by name.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
        device: On a CUDA device, events are the clock, and the L2 cache is flushed before each
            call.

    Returns:
        A `Timing` for each name.

    Raises:
        ValueError: There is nothing to time.
    """
    if not fns or repeats < 1:
        raise ValueError(f"{len(fns)} functions, repeats={repeats}: at least one of each is needed")
    seconds_of = _cuda_clock(device) if torch.device(device).type == "cuda" else _wall_clock
    names = list(fns)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            passed = seconds_of(fns[name])
            if turn >= 0:
                seconds[name].append(passed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _wall_clock(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _cuda_clock(device: torch.device | str) -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds_of(fn: Callable[[], Any]) -> float:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds_of


def result_row(
    kind: str,
    name: str,
    value: float,
    unit: str,
    *,
    n: int = 1,
    spread: Sequence[float] | None = None,
    config: Mapping[str, Any] | None = None,
    model: str | None = None,
    shape: Sequence[int] | None = None,
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """One measurement, with where and when it was made.

    Args:
        kind: Family of measurements, e.g. ``"attention"``.
        name: What was measured.
        value: The number.
        unit: Its unit.
        n: From how many repetitions.
        spread: Lower and upper quartile, in the same unit.
        config: Whatever else sets this measurement apart from its neighbours.
        model: Model id or path.
        shape: Of the tensors.
        seed: Of the random numbers.
        device: Where it ran; stored with the name of the hardware.
    """
    return {
        "kind": kind,
        "name": name,
        "value": value,
        "unit": unit,
        "n": n,
        "spread": None if spread is None else list(spread),
        "config": dict(config or {}),
        "model": model,
        "shape": None if shape is None else list(shape),
        "seed": seed,
        "device": device_name(device),
        "versions": dict(_versions()),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON-lines file; its folder is made when missing.

    Raises:
        ValueError: A value is not finite or not JSON, or the file cannot be written; nothing is
            written then.
    """
    try:
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"result row: {error}; rows hold finite numbers and plain data") from error
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"cannot write results to {path}: {error.strerror}") from error


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, oldest first.

    Raises:
        ValueError: A line is not a row.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or not {"kind", "name", "value"} <= row.keys():
            raise ValueError(f"{path}, line {number}: a row needs kind, name and value")
        rows.append(row)
    return rows


def newest(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each measurement, in the order in which they first came.

    A measurement is a kind, a device, the ``case`` and ``part`` of ``config``, and a name.
    """
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        config = row["config"]
        known = row["kind"], row["device"], config["case"], config["part"], row["name"]
        latest[known] = dict(row)
    return list(latest.values())


def device_name(device: torch.device | str = "cpu") -> str:
    """Name of the hardware, e.g. ``"cpu: AMD EPYC 9R14, 2 threads"``."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return device.type
    return f"cpu: {_cpu()}, {torch.get_num_threads()} threads"


@functools.cache
def commit() -> str | None:
    """Commit of this clone, ``+`` behind it when tracked files were changed; None outside one.

    A copy without ``.git`` may name its commit in a file ``.commit``.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed, maybe inside a clone of something else
        said = root / ".commit"
        return (said.read_text().strip() or None) if said.is_file() else None
    git = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--abbrev=12",
        "--exclude=*",
        "--dirty=+",
    ]
    try:
        run = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
