"""``gen-accel bench tails``: what selections find and tails mend, on a trained toy model.

Attention calls of dense runs on held-out captions are kept, and every order, selection and tail is
tried on them; static masks are calibrated on the calls of other captions. ``bench mixtures`` then
renders whole clips with some of them beside the dense ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.options import TOY_MODEL, add

if TYPE_CHECKING:
    import torch

    from gen_accel.capture import Captured
    from gen_accel.planner.base import Planner

TAILS = (
    "drop", "rectified", "rectified+gapr", "joint", "joint/4", "joint+variance", "joint/4+variance",
)  # fmt: skip
DENSITIES = (0.5, 0.3, 0.2, 0.1)
FOUND = (0.25, 0.125)  # densities at which selections are compared


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, *TOY_MODEL, "prompts", "table", "plot")


def run(args: argparse.Namespace) -> int:
    """Print both tables and store their rows."""
    import torch

    from gen_accel.eval.files import write_text
    from gen_accel.eval.harness import append_rows

    with torch.no_grad():
        known, held_out = _calls(args)
        bench = TailBench(known, held_out, args.model)
        selections = bench.selections(FOUND)
        tails = bench.tails(DENSITIES)
    tables = [
        table(selections, "name", "density", "softmax mass found, mean"),
        table(selections, "name", "density", "as a share of the best lists'", "share"),
    ]
    for density in DENSITIES:
        rows = [row for row in tails if row["config"]["density"] == density]
        tables.append(table(rows, "name", "tail", f"density {density:g}: relative L2 to dense"))
    print(*tables, sep="\n")
    if args.table:
        write_text(Path(args.table), "\n".join(tables))
    if args.out:
        append_rows(args.out, [*selections, *tails])
    if args.plot:
        plot(tails, Path(args.plot))
    return 0


def _calls(args: argparse.Namespace) -> tuple[list[Captured], list[Captured]]:
    """Attention calls of validation captions, for calibration, and of test captions."""
    from gen_accel.capture import capture
    from gen_accel.eval.toys import load_toy, toy_call

    pipe = load_toy(args.model, args.folder)
    call = toy_call(args.model)
    call["num_inference_steps"] = 12
    watched = (3, 6, 9)
    known = capture(pipe, prompts("val", args.prompts), steps=watched, seed=100, **call)
    return known, capture(pipe, prompts("test", args.prompts), steps=watched, seed=200, **call)


def prompts(split: str, number: int) -> list[str]:
    """Captions of scenes with something in them."""
    from gen_accel.eval.world.caption import describe
    from gen_accel.eval.world.scene import TOY, sample_scene

    found: list[str] = []
    seed = 0
    while len(found) < number:
        scene = sample_scene(seed, TOY, split)
        if scene.things:
            found.append(describe(scene, clip=TOY.frames > 1).text)
        seed += 1
    return found


@dataclass
class TailBench:
    """Every selection with every tail on the same calls.

    Args:
        known: Calls that static masks are calibrated on.
        held_out: Calls that are measured.
        model: Name of the toy.
        block: Tokens per block.
    """

    known: Sequence[Captured]
    held_out: Sequence[Captured]
    model: str
    block: int = 16

    def __post_init__(self) -> None:
        self.layers = 1 + max(call.layer for call in self.known)
        self.exact = [dense(call) for call in self.held_out]

    def planners(self) -> dict[str, Callable[[float], Planner]]:
        """Name -> planner at a density."""
        from gen_accel.order.curve import CurveOrder
        from gen_accel.order.raster import RasterOrder
        from gen_accel.planner.pooled import PooledPlanner
        from gen_accel.planner.window import WindowPlanner, WindowSetting
        from gen_accel.select.pooled import PooledSetting

        def pooled(order: Any, **settings: Any) -> Callable[[float], Planner]:
            return lambda density: PooledPlanner(
                PooledSetting(density=density, **settings), order, self.block, self.layers
            )

        def window(density: float) -> Planner:
            setting = WindowSetting(density=density, block=self.block, rim="whole")
            return WindowPlanner(setting, self.layers)

        curve, free = CurveOrder(), {"neighbours": False}
        return {
            "raster+pooled": pooled(RasterOrder(), **free),
            "curve+pooled": pooled(curve, **free),
            "curve+pooled, neighbours": pooled(curve),
            "curve+sub-blocks": pooled(curve, parts=4, **free),
            "curve+sub-blocks, layer budget": pooled(curve, parts=4, budget="layer", **free),
            "axis+static": lambda density: self._static("axis", density),
            "curve+static": lambda density: self._static("curve", density),
            "tile+window": window,
        }

    def _static(self, order: str, density: float) -> Planner:
        from gen_accel.plan import AttentionPlan, ComponentPlan
        from gen_accel.planner.calibrated import CalibratedPlanner
        from gen_accel.recorder import Measurement, Recorder
        from gen_accel.schedule import Schedule

        setting = Measurement(density, self.block, order, rows_per_block=None)
        recorder = Recorder(self.known[0].layout, setting)
        for call in self.known if order == "axis" else ():
            recorder.observe_orders(call.layer, call.q, call.k, call.layout)
        for call in self.known:
            recorder.observe_mass(call.layer, call.q, call.k, call.layout)
        plans = {layer: recorder.layer_plan(layer) for layer in range(self.layers)}
        component = ComponentPlan(self.model, (0.0,), plans)
        plan = AttentionPlan(recorder.grid, self.block, density, {self.model: component})
        schedule = Schedule(0, 0, (), 0)
        return CalibratedPlanner(self.model, self.model, self.layers, schedule, setting, plan)

    def tails(self, densities: Iterable[float]) -> list[dict[str, Any]]:
        """Relative L2 distance of the video's output to dense attention."""
        from gen_accel.kernels.api import block_sparse_attention
        from gen_accel.tail import TailSetting

        rows = []
        settings = {name: TailSetting.parse(name) for name in TAILS}
        for density in densities:
            for name, planner_at in self.planners().items():
                planner = planner_at(density)
                errors: dict[str, list[float]] = {tail: [] for tail in TAILS}
                kept = []
                for call, exact in zip(self.held_out, self.exact):
                    order, q, k, v, blocks, pooled, real = _planned(planner, call)
                    kept.append(video_density(blocks, pooled))
                    for tail, setting in settings.items():
                        stands = setting.make(q, k, v, blocks, pooled=pooled, real=real)
                        out = block_sparse_attention(q, k, v, blocks, tail=stands)
                        errors[tail].append(relative_l2(order.restore(out, call.layout), exact))
                for tail, values in errors.items():
                    config = {"tail": tail, "density": density, "kept": sum(kept) / len(kept)}
                    rows.append(self._row("tail", name, values, "relative L2", config))
        return rows

    def selections(self, densities: Iterable[float]) -> list[dict[str, Any]]:
        """Softmax mass that a selection finds, among that of all video keys and the text.

        The best lists: by the exact block masses in the same order, as many blocks for every query
        block.
        """
        rows = []
        for density in densities:
            for name, planner_at in self.planners().items():
                planner = planner_at(density)
                found = [self._found(planner, call, density) for call in self.held_out]
                masses, best, kept = (list(column) for column in zip(*found))
                config = {
                    "density": density,
                    "kept": sum(kept) / len(kept),
                    "best": sum(best) / len(best),
                    "share": sum(masses) / sum(best),
                }
                rows.append(self._row("selection", name, masses, "mass", config))
        return rows

    def _found(self, planner: Planner, call: Captured, density: float) -> tuple[float, ...]:
        from gen_accel.kernels.mass import block_mass

        _, q, k, _, blocks, pooled, _ = _planned(planner, call)
        number = pooled // blocks.block_kv
        mass = block_mass(q, k, block=blocks.block_kv, blocks=number)
        chosen = blocks.mask()[0, :, :number, :number]
        best = mass.topk(max(1, round(density * number)), -1).values.sum(-1).mean()
        found = (mass * chosen).sum(-1).mean()
        return float(found), float(best), video_density(blocks, pooled)

    def _row(
        self, kind: str, name: str, values: list[float], unit: str, config: dict[str, Any]
    ) -> dict[str, Any]:
        from gen_accel.eval.harness import result_row

        ordered = sorted(values)
        quartiles = ordered[len(values) // 4], ordered[3 * len(values) // 4]
        config = {**config, "block": self.block, "grid": list(self.held_out[0].layout.grid)}
        mean = sum(values) / len(values)
        return result_row(
            kind, name, mean, unit, n=len(values), spread=quartiles, config=config,
            model=f"toy-{self.model}", shape=self.held_out[0].q.shape,
        )  # fmt: skip


def _planned(planner: Planner, call: Captured) -> tuple[Any, ...]:
    """Order, ordered q, k, v, blocks, pooled keys and which of them exist."""
    from gen_accel.kernels.blocks import Blocks

    planner.begin(call.context)
    planned: Any = planner.lookup(call.layer, call.layout, call.layout.text, call.q.device, None)
    q, k, v = (planned.order.reorder(x, call.layout) for x in (call.q, call.k, call.v))
    blocks = planned.blocks
    if not isinstance(blocks, Blocks):
        blocks, _ = blocks(q, k)
    return planned.order, q, k, v, blocks, planned.pooled, planned.real


def video_density(blocks: Any, pooled: int) -> float:
    """Kept share of the blocks between video tokens."""
    number = pooled // blocks.block_kv
    return float(blocks.mask()[..., :number, :number].float().mean())


def dense(call: Captured) -> torch.Tensor:
    """Dense attention of the video's queries."""
    import torch.nn.functional as F

    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    return _video(F.scaled_dot_product_attention(q, k, v).transpose(1, 2), call)


def relative_l2(out: torch.Tensor, exact: torch.Tensor) -> float:
    """|out - exact| / |exact|; ``out`` may have text around the video."""
    return float((out[:, : exact.shape[1]] - exact).norm() / exact.norm())


def _video(x: torch.Tensor, call: Captured) -> torch.Tensor:
    start = call.layout.text_before
    return x[:, start : start + call.layout.grid.numel]


def table(
    rows: Sequence[dict[str, Any]],
    line: str,
    column: str,
    title: str,
    value: str = "value",
    digits: int = 3,
) -> str:
    """Markdown: one line per ``line``, one column per ``column`` of the rows."""

    def of(row: dict[str, Any], key: str) -> Any:
        return row[key] if key in row else row["config"][key]

    names = list(dict.fromkeys(of(row, line) for row in rows))
    columns = list(dict.fromkeys(of(row, column) for row in rows))
    cells = {(of(row, line), of(row, column)): of(row, value) for row in rows}
    head = f"| {title} | " + " | ".join(map(str, columns)) + " |"
    lines = [head, "|---" * (len(columns) + 1) + "|"]
    for name in names:
        values = (f"{cells[name, c]:.{digits}f}" if (name, c) in cells else "" for c in columns)
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Error over kept blocks, a panel per tail."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    tails = list(dict.fromkeys(row["config"]["tail"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(tails), figsize=(2.6 * len(tails), 3.2), sharey=True, constrained_layout=True
    )
    for panel, tail in zip(panels, tails):
        for name in names:
            some = [r for r in rows if r["name"] == name and r["config"]["tail"] == tail]
            some.sort(key=lambda r: r["config"]["kept"])
            x = [r["config"]["kept"] for r in some]
            panel.plot(x, [r["value"] for r in some], marker="o", markersize=3, label=name)
        panel.set_title(tail, fontsize=9)
        panel.set_xlabel("kept blocks")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative L2 to dense")
    panels[-1].legend(fontsize=6)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
