"""``gen-accel simulate``: what a GNA window costs, and what a whole run of a model will take."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli.options import UsageError

if TYPE_CHECKING:
    from gen_accel.simulate import Simulation

_DESCRIPTION = """window (default): counts the key tiles that a window visits and the speed-up they
allow. Sizes are written AxBxC, slowest axis first, for grids of one to three axes; one number holds
for all axes, and "full" as a window leaves an axis unrestricted. e2e: seconds of a whole run of a
published model, from counted work and the rates of a device."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "simulate",
        help="speed bounds of a sliding window; e2e: a forecast for a whole run",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    add("what", nargs="?", default="window", choices=("window", "e2e"))
    add("--grid", metavar="FxHxW", help="video tokens after patchify")
    add("--window", metavar="FxHxW", help="keys each query sees along each axis")
    add("--stride", default="1", metavar="FxHxW", help="queries that share a window (default 1)")
    add(
        "--dilation", default="1", metavar="FxHxW", help="distance of neighbouring keys (default 1)"
    )
    add("--causal", default="0", metavar="FxHxW", help="1 on axes where no key follows its query")
    add("--tile-q", metavar="FxHxW", help="query tile (default: the one that fits the grid)")
    add("--tile-kv", metavar="FxHxW", help="key tile (default: the query tile)")
    add("--border", choices=("shift", "snap"), default="shift",
        help="snap is not GNA: windows keep to key tile edges at ragged borders")  # fmt: skip
    add("--attention-share", type=float, metavar="SHARE",
        help="share of the dense run that is attention, for the end-to-end bound")  # fmt: skip
    add("--dense-steps", metavar="K/N",
        help="K of N denoising steps stay dense (0/1; e2e: a fifth of the model's)")  # fmt: skip
    add("--sweep", action="store_true", help="list the best windows for --density")
    add("--density", type=float, default=0.25, help="share of visible keys (default 0.25)")
    add("--count", type=int, default=10, help="rows of the sweep (default 10)")
    add("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    add("--plot", type=Path, metavar="FILE", help="draw density against bound (needs matplotlib)")
    add("--json", action="store_true", help="print one JSON line per setting")
    add = parser.add_argument_group("e2e").add_argument
    add("--model", default="hunyuan-video", help="as of bench e2e (hunyuan-video)")
    add("--height", type=int, help="pixels (as published)")
    add("--width", type=int, help="pixels (as published)")
    add("--num-frames", type=int, help="frames (as published)")
    add("--device", default="h200", help="whose rates are assumed (h200)")
    add("--rates", type=Path, metavar="FILE", help="rows of bench e2e or bench kernel instead")
    add("--windows", action="store_true", help="the blocks kept are those of GNA windows")
    add("--case", help="of FILE: the case whose rates count (all)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print one setting, or the sweep; or a forecast."""
    if args.what == "e2e":
        return _forecast(args)
    if args.grid is None:
        raise UsageError("--grid is missing: video tokens after patchify, as 30x48x80")
    from gen_accel.select.suggest import fitting_tile
    from gen_accel.select.window import Window
    from gen_accel.simulate import simulate, sweep

    grid = _sizes("--grid", args.grid)
    axes = len(grid)
    if axes > 3 or min(grid) < 1:
        raise UsageError(f"--grid {args.grid}: one to three axes, each at least 1, as 30x48x80")
    if args.window is None and not args.sweep:
        raise UsageError("--window is missing: give FxHxW, or --sweep to see which ones are good")
    if args.plot is not None and not args.sweep:
        raise UsageError("--plot draws a sweep: add --sweep")
    tile_kv = _all_axes("--tile-kv", args.tile_kv, axes) if args.tile_kv else None
    if args.tile_q:
        tile_q = _all_axes("--tile-q", args.tile_q, axes)
    else:
        tile_q = tile_kv or fitting_tile(grid, border=args.border)
    if args.sweep:
        found = sweep(
            grid, tile_q, tile_kv, density=args.density, border=args.border, count=args.count
        )
        if not found:
            raise UsageError(
                f"--density {args.density}: no window of whole tiles comes within 10 %; "
                "take another density or smaller tiles"
            )
    else:
        window = Window(
            grid,
            _setting("--window", args.window, axes),
            _setting("--stride", args.stride, axes),
            _setting("--dilation", args.dilation, axes),
            tuple(bool(n) for n in _all_axes("--causal", args.causal, axes)),
        )
        if args.border == "snap":
            window = replace(window, snap=tile_kv or tile_q)
        found = [simulate(window, tile_q, tile_kv)]

    sparse_share = 1 - _fraction("--dense-steps", args.dense_steps or "0/1")
    rows = [_row(simulation, args.attention_share, sparse_share) for simulation in found]
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if args.plot is not None:
        _plot(args.plot, sweep(grid, tile_q, tile_kv, border=args.border, count=1000), args.density)
    if args.json:
        print("\n".join(json.dumps(row) for row in rows))
    else:
        print(_table(rows) if args.sweep else _report(rows[0]))
    return 0


def _forecast(args: argparse.Namespace) -> int:
    """Print seconds by part, and of the run."""
    from dataclasses import asdict

    from gen_accel.eval.harness import read_rows
    from gen_accel.forecast import ASSUMED, describe, forecast, read_rates
    from gen_accel.published import published

    if not 0 < args.density <= 1:
        raise UsageError(f"--density {args.density:g}: a share of the keys lies in (0, 1]")
    model = published(args.model)
    height, width, frames = (
        asked or usual
        for asked, usual in zip((args.height, args.width, args.num_frames), model.size)
    )
    grid = model.grid(height, width, frames)
    if args.rates is None and args.device not in ASSUMED:
        raise UsageError(f"--device {args.device}: rates are known of {', '.join(ASSUMED)}; "
                         "or give --rates FILE")  # fmt: skip
    if args.rates is None:
        rates = ASSUMED[args.device]
    else:
        rows = [r for r in read_rows(args.rates) if args.case in (None, r["config"].get("case"))]
        rates = read_rates(rows)
    steps, dense = model.steps, math.ceil(0.2 * model.steps)
    if args.dense_steps is not None:
        _fraction("--dense-steps", args.dense_steps)
        dense, steps = map(int, args.dense_steps.split("/"))
    found = forecast(model, grid, args.density, rates, args.windows)
    if args.json:
        run = found.run(steps, dense, model.forwards)
        print(json.dumps({"model": model.name, "grid": list(grid), "density": args.density,
                          "steps": steps, "dense_steps": dense, "forwards": model.forwards,
                          **asdict(found), "run_s": run, "rates": rates.source}))  # fmt: skip
    else:
        print(describe(model, grid, args.density, steps, dense, rates, args.windows))
    return 0


def _row(
    simulation: Simulation, attention_share: float | None, sparse_share: float
) -> dict[str, Any]:
    """One setting as plain data; the keys are the columns of the CSV."""
    from gen_accel.simulate import end_to_end, simulate

    window, tiles = simulation.window, (simulation.tile_q, simulation.tile_kv)
    total = None
    if attention_share is not None:
        total = end_to_end(simulation.bound_worst, attention_share, sparse_share)
    return {
        "grid": _text(window.grid),
        "window": _text(axis.size for axis in window.axes),
        "stride": _text(axis.stride for axis in window.axes),
        "dilation": _text(axis.dilation for axis in window.axes),
        "causal": _text(int(axis.causal) for axis in window.axes),
        "tile_q": _text(simulation.tile_q),
        "tile_kv": _text(simulation.tile_kv),
        "density": window.density,
        "key_tiles": simulation.key_tiles,
        "visited_worst": simulation.worst,
        "visited_mean": simulation.mean,
        "mask_free": simulation.mask_free,
        "padding": simulation.padding,
        "bound_flops": simulation.bound_flops,
        "bound_worst": simulation.bound_worst,
        "bound_mean": simulation.bound_mean,
        "bound_stride_1": simulate(replace(window, stride=1), *tiles).bound_worst,
        "attention_share": attention_share,
        "sparse_steps": sparse_share,
        "end_to_end": total,
        "block_sparse": simulation.problem is None,
        "problem": simulation.problem,
    }


def _report(row: dict[str, Any]) -> str:
    tokens = math.prod(int(n) for n in row["grid"].split("x"))
    extras = [f"stride {row['stride']}"]
    extras += [f"dilation {row['dilation']}"] * (set(row["dilation"]) - set("1x") != set())
    extras += [f"causal {row['causal']}"] * ("1" in row["causal"])
    lines = {
        "grid": f"{row['grid']}, {tokens:,} tokens",
        "window": f"{row['window']}, {', '.join(extras)}: density {row['density']:.4f}, "
        f"sparsity {1 - row['density']:.1%}",
        "tiles": f"{row['tile_q']} queries, {row['tile_kv']} keys; padding {row['padding']:.1%}",
        "visited": f"{row['visited_worst']} (worst) and {row['visited_mean']:.1f} (mean) "
        f"of {row['key_tiles']} key tiles; {row['mask_free']:.0%} of the visits need no mask",
        "bounds": f"{row['bound_worst']:.2f}x (worst), {row['bound_mean']:.2f}x (mean), "
        f"{row['bound_flops']:.2f}x by visible pairs; with stride 1 {row['bound_stride_1']:.2f}x",
        "block-sparse": "yes" if row["block_sparse"] else f"no: {row['problem']}",
    }
    if row["end_to_end"] is not None:
        lines["end to end"] = (
            f"{row['end_to_end']:.2f}x, with attention {row['attention_share']:.1%} of the dense "
            f"run and {row['sparse_steps']:.0%} of the steps sparse"
        )
    return "\n".join(f"{name:<12}  {text}" for name, text in lines.items())


def _table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "window": "{window}",
        "stride": "{stride}",
        "density": "{density:.4f}",
        "worst": "{visited_worst}",
        "mean": "{visited_mean:.1f}",
        "bound": "{bound_worst:.2f}x",
        "stride 1": "{bound_stride_1:.2f}x",
        "mask-free": "{mask_free:.0%}",
        "block-sparse": "{block_sparse}",
    }
    if rows[0]["end_to_end"] is not None:
        columns["end to end"] = "{end_to_end:.2f}x"
    cells = [list(columns)]
    for row in rows:
        shown = {**row, "block_sparse": "yes" if row["block_sparse"] else "no"}
        cells.append([text.format(**shown) for text in columns.values()])
    widths = [max(map(len, column)) for column in zip(*cells)]
    head = "grid {grid}, query tiles {tile_q}, key tiles {tile_kv} ({key_tiles} of them)"
    lines = [head.format(**rows[0])]
    lines += ["  ".join(map(str.rjust, line, widths)) for line in cells]
    return "\n".join(lines)


def _plot(path: Path, tried: list[Simulation], density: float) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'gen-accel[plot]'") from error

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    kinds = {"perfectly block-sparse": True, "partly visible tiles": False}
    for (label, kind), color in zip(kinds.items(), ("tab:blue", "tab:orange")):
        shown = [s for s in tried if (s.problem is None) == kind]
        axes.scatter(
            [s.window.density for s in shown],
            [s.bound_worst for s in shown],
            s=8,
            color=color,
            label=label,
        )
    axes.axvline(density, color="gray", linewidth=0.8, linestyle="--")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="density (share of visible keys)",
        ylabel="bound on the speed-up, worst query tile",
        title=f"windows on {_text(tried[0].window.grid)}, key tiles {_text(tried[0].tile_kv)}",
    )
    axes.legend()
    figure.savefig(path)


def _sizes(flag: str, text: str) -> tuple[int, ...]:
    """``"18x24x24"`` as numbers, ``"full"`` as -1."""
    try:
        return tuple(-1 if part == "full" else int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UsageError(f"{flag} {text}: write numbers with x between them, as 30x48x80") from None


def _setting(flag: str, text: str, axes: int) -> int | tuple[int, ...]:
    sizes = _sizes(flag, text)
    if len(sizes) not in (1, axes):
        raise UsageError(f"{flag} {text}: the grid has {axes} axes; give one number, or {axes}")
    return sizes[0] if len(sizes) == 1 else sizes


def _all_axes(flag: str, text: str, axes: int) -> tuple[int, ...]:
    setting = _setting(flag, text, axes)
    return (setting,) * axes if isinstance(setting, int) else setting


def _fraction(flag: str, text: str) -> float:
    part, _, whole = text.partition("/")
    try:
        share = int(part) / int(whole)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{flag} {text}: write K/N, as 15/50") from None
    if not 0 <= share <= 1:
        raise UsageError(f"{flag} {text}: K of N steps, so K is 0..N")
    return share


def _text(sizes: Iterable[int]) -> str:
    return "x".join("full" if size < 0 else str(size) for size in sizes)
