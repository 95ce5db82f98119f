"""``gen-accel bench mixtures``: whole clips of a toy model, each mixture beside the dense run."""

from __future__ import annotations

import argparse
from typing import Any

from gen_accel.cli.bench.options import TOY_MODEL, add
from gen_accel.cli.bench.tails import prompts, table

MIXTURES = (
    ("axis", "static"), ("curve", "static"), ("curve", "pooled"), ("tile", "window"),
)  # fmt: skip
TAILS = ("drop", "rectified+gapr", "joint", "joint/4")
STEPS = 12


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, *TOY_MODEL, "prompts", "densities")


def run(args: argparse.Namespace) -> int:
    """Print PSNR to dense for every mixture and store the rows."""
    import torch
    from tqdm import tqdm

    from gen_accel.eval.fidelity import psnr
    from gen_accel.eval.harness import append_rows, result_row
    from gen_accel.eval.toys import load_toy, toy_call
    from gen_accel.install import apply

    pipe = load_toy(args.model, args.folder)
    call = {**toy_call(args.model), "num_inference_steps": STEPS, "output_type": "pt"}
    texts = prompts("test", args.prompts)

    def render(number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + number)
        out = pipe(prompt=texts[number], generator=generator, **call)[0]
        return out.reshape(-1, *out.shape[-3:]).clamp(0, 1)

    settings = [(d, *m, t) for d in args.densities for m in MIXTURES for t in TAILS]
    bar = tqdm(total=len(texts) * (1 + len(settings)), desc="clips", unit="clip")
    dense = []
    for number in range(len(texts)):
        dense.append(render(number))
        bar.update()
    rows = []
    for density, order, select, tail in settings:
        values: list[float] = []
        policy = processor(order, select, tail, density)
        with apply(pipe, policy) as handle:
            for number, right in enumerate(dense):
                values.append(float(psnr(render(number), right)))
                bar.update()
            ran = handle.stats()["transformer"].mean_density
        config = {"density": density, "tail": tail, "ran": ran, "steps": STEPS}
        rows.append(
            result_row(
                "mixture", f"{order}+{select}", sum(values) / len(values), "dB", n=len(values),
                spread=spread(values), config={**config, "values": values},
                model=f"toy-{args.model}",
            )
        )  # fmt: skip
        if args.out:
            append_rows(args.out, rows[-1:])
    bar.close()
    for density in args.densities:
        some = [row for row in rows if row["config"]["density"] == density]
        print(table(some, "name", "tail", f"density {density:g}: PSNR to dense, dB"))
    return 0


def processor(order: str, select: str, tail: str, density: float) -> Any:
    """A mixture for a toy's few tokens: blocks of 16, the first fifth of the steps dense."""
    from gen_accel.processors import SparseProcessor

    return SparseProcessor(
        order=order, select=select, tail=tail, density=density, block=16, min_tokens=0
    )


def spread(values: list[float]) -> tuple[float, float] | None:
    """Ends of the 95 % t interval of the mean; a single clip has none."""
    from gen_accel.eval.verdict import interval

    if len(values) < 2:
        return None
    mean, half = interval(values)
    return mean - half, mean + half
