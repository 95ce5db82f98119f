"""``gen-accel bench precision``: what quantising attention costs, on a trained toy model.

Attention calls of dense runs on held-out captions are computed by the definition
(`gen_accel.kernels.reference`: true integers) in every precision and compared with dense fp64
attention; then whole clips are rendered in every precision.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.mixtures import STEPS, spread
from gen_accel.cli.bench.options import TOY_MODEL, add
from gen_accel.cli.bench.tails import _calls, prompts, table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gen_accel.capture import Captured
    from gen_accel.kernels.quant import Precision

GROUP = 64  # queries and keys that share a scale in PAROAttention's P.V


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, *TOY_MODEL, "prompts", "table")


def run(args: argparse.Namespace) -> int:
    """Print the tables and store their rows."""
    import torch

    from gen_accel.eval.files import write_text
    from gen_accel.eval.harness import append_rows

    with torch.no_grad():
        bench = PrecisionBench(*_calls(args), args.model)
        errors, values, weights = bench.errors(), bench.values(), bench.weights()
    rendered = clips(args.model, args.folder, args.prompts)
    rows = [*errors, *values, *weights, *rendered]
    tables = [
        table(errors, "name", "data", "relative L2 to fp64, mean", digits=4),
        table(errors, "name", "data", "the same, worst call", "worst", digits=4),
        table(values, "name", "values", "one scale per channel and: relative L2", digits=4),
        table(weights, "name", "order", "int8 scores, P.V as said: relative L2", digits=4),
        table(rendered, "name", "attention", "PSNR to dense, dB", digits=1),
    ]
    print(*tables, sep="\n")
    if args.table:
        write_text(Path(args.table), "\n".join(tables))
    if args.out:
        append_rows(args.out, rows)
    return 0


@dataclass
class PrecisionBench:
    """Every precision on the same calls.

    Args:
        known: Calls that orders are chosen on.
        held_out: Calls that are measured.
        model: Name of the toy.
    """

    known: Sequence[Captured]
    held_out: Sequence[Captured]
    model: str

    def errors(self) -> list[dict[str, Any]]:
        """Every precision, on the calls as they are and with outliers planted."""
        from gen_accel.kernels.quant import PRECISIONS

        rows = []
        for data, plant in PLANTS.items():
            planted = [plant(call) for call in self.held_out]
            exact = [_exact(call) for call in planted]
            for name, precision in PRECISIONS.items():
                values = [_error(c, x, precision) for c, x in zip(planted, exact)]
                rows.append(self._row("precision", name, values, {"data": data}))
        return rows

    def values(self) -> list[dict[str, Any]]:
        """Which values share a scale, in the model's order."""
        from gen_accel.kernels.quant import PRECISIONS

        exact = [_exact(call) for call in self.held_out]
        rows = []
        for name in ("int8+fp8", "int8+int8"):
            for share in ("channel", "block"):
                precision = PRECISIONS[name]._replace(v_scale=share)
                errors = [_error(c, x, precision) for c, x in zip(self.held_out, exact)]
                config = {"values": {"channel": "all keys", "block": "64 keys"}[share]}
                rows.append(self._row("values", name, errors, config))
        return rows

    def weights(self) -> list[dict[str, Any]]:
        """What shares a scale in P.V, in the model's order and in each head's; and incoherence."""
        from gen_accel.kernels.quant import PRECISIONS
        from gen_accel.order.curve import CurveOrder
        from gen_accel.order.raster import RasterOrder

        axis = self._axis_orders()
        orders: dict[str, Callable[[int], Any]] = {
            "raster": lambda layer: RasterOrder(),
            "axis": axis.__getitem__,
            "curve": lambda layer: CurveOrder(),
        }
        exact = [_exact(call) for call in self.held_out]
        rows = []
        for order, of in orders.items():
            ordered = [_ordered(call, of(call.layer)) for call in self.held_out]
            right = [of(c.layer).reorder(x, c.layout) for c, x in zip(self.held_out, exact)]
            for bits in ("int8", "int4"):
                for group in ("row", "block", "tile"):
                    precision = PRECISIONS["int8+int8"]._replace(pv=bits, p_scale=group)
                    values = [_error(c, x, precision) for c, x in zip(ordered, right)]
                    rows.append(self._row("weights", f"{bits}, {group}", values, {"order": order}))
            values = [incoherence(call.q, call.k) for call in ordered]
            rows.append(self._row("weights", "incoherence", values, {"order": order}, "max / mean"))
        return rows

    def _axis_orders(self) -> dict[int, Any]:
        """Layer -> the orders that calibration chooses."""
        from gen_accel.recorder import Measurement, Recorder

        recorder = Recorder(self.known[0].layout, Measurement())
        for call in self.known:
            recorder.observe_orders(call.layer, call.q, call.k, call.layout)
            recorder.observe_mass(call.layer, call.q, call.k, call.layout)
        layers = {call.layer for call in self.known}
        return {layer: recorder.layer_plan(layer).orders for layer in layers}

    def _row(
        self,
        kind: str,
        name: str,
        values: list[float],
        config: dict[str, Any],
        unit: str = "relative L2",
    ) -> dict[str, Any]:
        from gen_accel.eval.harness import result_row

        ordered = sorted(values)
        quartiles = ordered[len(values) // 4], ordered[3 * len(values) // 4]
        config = {**config, "worst": ordered[-1], "grid": list(self.held_out[0].layout.grid)}
        mean = sum(values) / len(values)
        return result_row(
            kind, name, mean, unit, n=len(values), spread=quartiles, config=config,
            model=f"toy-{self.model}", shape=self.held_out[0].q.shape,
        )  # fmt: skip


def _plain(call: Captured) -> Captured:
    return call


def _key_channel(call: Captured) -> Captured:
    """A channel of all keys far from zero, as models with biased projections have."""
    k = call.k.clone()
    k[..., 7] += 50 * k.std()
    return call._replace(k=k)


def _value_channel(call: Captured) -> Captured:
    v = call.v.clone()
    v[..., 7] *= 50
    return call._replace(v=v)


def _key_token(call: Captured) -> Captured:
    """One key that takes its whole group's range."""
    k = call.k.clone()
    k[:, 100] *= 8
    return call._replace(k=k)


PLANTS = {
    "as captured": _plain,
    "K channel + 50 sd": _key_channel,
    "V channel x 50": _value_channel,
    "one key x 8": _key_token,
}


def _ordered(call: Captured, order: Any) -> Captured:
    q, k, v = (order.reorder(x, call.layout) for x in (call.q, call.k, call.v))
    return call._replace(q=q, k=k, v=v)


def _exact(call: Captured) -> Tensor:
    from gen_accel.kernels.reference import attention

    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    return attention(q, k, v, None, q.shape[-1] ** -0.5)[0]


def _error(call: Captured, exact: Tensor, precision: Precision) -> float:
    from gen_accel.kernels.reference import attention

    scale = call.q.shape[-1] ** -0.5
    out = attention(call.q, call.k, call.v, None, scale, precision=precision)[0]
    return float((out - exact).norm() / exact.norm())


def incoherence(q: Tensor, k: Tensor) -> float:
    """Mean over heads and groups of 64 x 64 weights of their max / mean (PAROAttention's Psi)."""
    scores = q.shape[-1] ** -0.5 * q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    number = q.shape[1] // GROUP
    weights = scores.softmax(-1)[:, :, : number * GROUP, : number * GROUP]
    groups = weights.unflatten(3, (number, GROUP)).unflatten(2, (number, GROUP))
    return float((groups.amax((3, 5)) / groups.mean((3, 5))).mean())


def clips(model: str, folder: str | None, number: int) -> list[dict[str, Any]]:
    """PSNR of whole clips to the stock pipeline's: all blocks seen, and PARO at density 0.3."""
    import torch
    from tqdm import tqdm

    from gen_accel.eval.fidelity import psnr
    from gen_accel.eval.harness import result_row
    from gen_accel.eval.toys import load_toy, toy_call
    from gen_accel.install import apply
    from gen_accel.kernels.quant import PRECISIONS

    pipe = load_toy(model, folder)
    call = {**toy_call(model), "num_inference_steps": STEPS, "output_type": "pt"}
    texts = prompts("test", number)

    def render(index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + index)
        out = pipe(prompt=texts[index], generator=generator, **call)[0]
        return out.reshape(-1, *out.shape[-3:]).clamp(0, 1)

    names = ("fp32", *PRECISIONS)
    bar = tqdm(total=number * (1 + 2 * len(names)), desc="clips", unit="clip")

    def rendered() -> list[torch.Tensor]:
        made = []
        for index in range(number):
            made.append(render(index))
            bar.update()
        return made

    dense, rows = rendered(), []
    for attention in ("all blocks", "PARO 0.3"):
        for name in names:
            with apply(pipe, _processor(attention, name)):
                values = [float(psnr(a, b)) for a, b in zip(rendered(), dense)]
            config = {"attention": attention, "steps": STEPS, "values": values}
            mean = sum(values) / len(values)
            rows.append(
                result_row(
                    "clip", name, mean, "dB", n=number, spread=spread(values), config=config,
                    model=f"toy-{model}",
                )
            )  # fmt: skip
    bar.close()
    return rows


def _processor(attention: str, precision: str) -> Any:
    """Every step quantised where all blocks are seen; a fifth of them dense, for PARO."""
    from gen_accel.processors import ParoProcessor, SparseProcessor

    if attention == "all blocks":
        return SparseProcessor(
            select="all", precision=precision, block=GROUP, min_tokens=0, dense_steps=0.0,
            tail="drop",
        )  # fmt: skip
    return ParoProcessor(precision=precision, density=0.3, block=16, min_tokens=0)
