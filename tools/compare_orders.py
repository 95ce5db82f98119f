"""Which criterion chooses the better axis orders? Mass kept on prompts and noise it has not seen.

Runs a pipeline densely with two sets of prompts. The first set chooses an order per (layer, head)
by each criterion and makes a static mask at the target density; the second set tells how much of
its softmax mass that mask keeps. Also shows what sampling query rows costs.

    python tools/compare_orders.py models/toy-hunyuan-video \
        --prompts "a red circle" --held-out "a blue square" --out eval/results/orders.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from gen_accel import ParoProcessor, apply
from gen_accel.eval.harness import append_rows, result_row
from gen_accel.kernels.mass import block_mass, order_statistics
from gen_accel.layout import TokenLayout
from gen_accel.order.axis import AXIS_ORDERS, axis_order, axis_permutation
from gen_accel.recorder import Measurement, Recorder, reorder_keys, video_first
from gen_accel.select.static import keep_blocks, mass_kept, paper_eps, score_by_mass, score_by_paper

CRITERIA: dict[str, Callable[..., Tensor]] = {
    "mass": score_by_mass,
    "paper, sign corrected": lambda stats, density: score_by_paper(stats),
    "paper, as printed": lambda stats, density: score_by_paper(stats, as_printed=True),
    "paper, incoherence only": lambda stats, density: score_by_paper(stats, alpha=0.0),
}
SAMPLES = (1, 4, 16)  # rows per block


class Capture:
    """Mean block masses of every layer in every candidate order, and every criterion's scores."""

    def __init__(self, densities: list[float], block: int | None, every: int) -> None:
        self.densities, self.every = densities, every
        self.measurement = Measurement(block=block)
        self.mass: dict[tuple[int, int | None], Tensor] = {}
        self.scores: dict[tuple[int, str, float], Tensor] = {}
        self.calls: Counter[int] = Counter()

    def run(self, pipe: Any, prompts: list[str], call: dict[str, Any], seed: int) -> Capture:
        """Watch one dense run per prompt."""
        with apply(pipe, ParoProcessor(dense_steps=1.0, min_tokens=0)) as handle:
            engine = handle.components[0].engine

            def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
                if engine.context.step % self.every == 0:
                    self.observe(layer, q, k, layout)

            engine.planner.watches, engine.planner.observe = (lambda layer: True), observe
            for number, prompt in enumerate(prompts):
                generator = torch.Generator().manual_seed(seed + number)
                pipe(prompt=prompt, generator=generator, output_type="latent", **call)
        return self

    def observe(self, layer: int, q: Tensor, k: Tensor, layout: TokenLayout) -> None:
        """Add one attention call."""
        recorder = Recorder(layout, self.measurement)
        self.block, self.candidates, video = recorder.block, recorder.candidates, layout.grid.numel
        self.calls[layer] += 1
        for rows in (None, *SAMPLES):
            masses = []
            for candidate in self.candidates:
                order = axis_order([candidate] * q.shape[2])
                ordered = order.reorder(q, layout), reorder_keys(order, k, layout)
                masses.append(
                    block_mass(
                        *ordered, block=self.block, blocks=recorder.blocks, rows_per_block=rows
                    )
                )
            self.mass[layer, rows] = self.mass.get((layer, rows), 0) + torch.stack(masses, 1)
        stats = order_statistics(
            video_first(q, layout),
            video_first(k, layout),
            torch.stack([axis_permutation(layout.grid, o) for o in self.candidates]),
            block=self.block,
            rows=torch.randperm(video)[:1024],
            eps=paper_eps(video),
        )
        for name, criterion in CRITERIA.items():
            for density in self.densities:
                key = layer, name, density
                self.scores[key] = self.scores.get(key, 0) + criterion(stats, density)

    def choice(self, name: str, density: float) -> dict[int, Tensor]:
        """Layer -> index of the chosen candidate, per head."""
        return {layer: self.scores[layer, name, density].argmax(-1) for layer in self.calls}


def kept(
    seen: Capture, fresh: Capture, choice: dict[int, Tensor], density: float, rows: int | None
) -> float:
    """Mass of ``fresh`` that masks made from ``seen`` keep, mean over layers and heads."""
    shares = []
    for layer, orders in choice.items():
        heads = torch.arange(len(orders))
        mask = keep_blocks(seen.mass[layer, rows][heads, orders], density)
        shares.append(mass_kept(fresh.mass[layer, None][heads, orders], mask).mean().item())
    return sum(shares) / len(shares)


def main(argv: list[str] | None = None) -> None:
    """Run both sets of prompts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=4, help="look at every n-th step")
    parser.add_argument("--block", type=int)
    parser.add_argument("--call", type=json.loads, default={}, help="more pipeline arguments, JSON")
    parser.add_argument("--out", help="JSON lines are appended here")
    args = parser.parse_args(argv)
    pipe = DiffusionPipeline.from_pretrained(args.model)
    call = {"num_inference_steps": args.num_inference_steps, **args.call}
    seen = Capture(args.densities, args.block, args.every).run(pipe, args.prompts, call, seed=0)
    fresh = Capture(args.densities, args.block, args.every).run(pipe, args.held_out, call, seed=100)

    table: dict[str, dict[float, float]] = defaultdict(dict)
    for density in args.densities:
        by_mass = seen.choice("mass", density)
        raster = {layer: torch.zeros_like(orders) for layer, orders in by_mass.items()}
        table["raster"][density] = kept(seen, fresh, raster, density, None)
        for name in CRITERIA:
            choice = seen.choice(name, density)
            table[name][density] = kept(seen, fresh, choice, density, None)
        for rows in SAMPLES:
            name = f"mass, {rows} of {seen.block} rows"
            table[name][density] = kept(seen, fresh, by_mass, density, rows)
        names = Counter(AXIS_ORDERS[seen.candidates[i]] for o in by_mass.values() for i in o)
        print(f"orders chosen by mass at density {density}: {dict(names)}")
    print(f"{'mass kept on held-out runs':28s}" + "".join(f"{d:9.2f}" for d in args.densities))
    for name, values in table.items():
        print(f"{name:28s}" + "".join(f"{value:9.4f}" for value in values.values()))
    if args.out:
        lines = [
            result_row(
                "orders",
                "mass kept on held-out runs",
                value,
                "share",
                config={
                    "choice": name,
                    "density": density,
                    "block": seen.block,
                    "every": args.every,
                    "prompts": args.prompts,
                    "held_out": args.held_out,
                    "call": call,
                },
                model=args.model,
            )
            for name, values in table.items()
            for density, value in values.items()
        ]
        append_rows(args.out, lines)


if __name__ == "__main__":
    main()
