"""What `gen_accel.cli.bench.e2e_steps` measured, as result rows and as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen_accel.cli.bench.e2e_steps import Candidate, Steps

Row = dict[str, Any]


def step_rows(steps: Steps, rates: list[Row]) -> list[Row]:
    """A row for each candidate that was timed: its forward in ms, all else in ``config``.

    What was wrong has a reason instead of a time.

    Args:
        steps: What was measured.
        rates: Rows of kind ``"rate"``, of the same case and device.
    """
    from gen_accel.cli.bench.kernel_pieces import wrong_row
    from gen_accel.eval.harness import result_row

    case = steps.case
    where: Row = {"model": case.whole.name, "seed": case.seed, "device": case.device}
    where["shape"] = [1, case.tokens, case.model.heads, case.model.head_dim]
    rows = []
    for candidate in steps.candidates:
        if candidate.name not in steps.timings:
            continue
        timing = steps.timings[candidate.name]
        rows.append(
            result_row(
                "e2e",
                candidate.name,
                1e3 * timing.median,
                "ms",
                n=len(timing.seconds),
                spread=[1e3 * s for s in timing.spread],
                config=_config(steps, candidate, rates),
                **where,
            )
        )
    return rows + [
        wrong_row("e2e", name, {"wrong": why}, **where) for name, why in steps.wrong.items()
    ]


def _config(steps: Steps, candidate: Candidate, rows: list[Row]) -> Row:
    from gen_accel.cli.bench.e2e_rates import of_precision
    from gen_accel.forecast import forecast, read_rates

    rates = read_rates(of_precision(rows, candidate.precision))
    case, model, whole = steps.case, steps.case.model, steps.case.whole
    timing, baseline = steps.timings[candidate.name], steps.timings[steps.baseline]
    seconds, dense_seconds = timing.median, baseline.median
    attention = sum(t for part, t in candidate.parts.items() if part != "rest")
    total = attention + candidate.parts.get("rest", 0.0)
    windows = candidate.windows
    predicted = forecast(model, case.grid, candidate.density, rates, windows)
    expected = predicted.dense_forward if candidate.dense else predicted.sparse_forward
    # Whole run: all blocks, all steps, both branches. All blocks take alike.
    times = whole.forwards * whole.depth / model.depth
    sparse = 0 if candidate.dense else whole.steps - steps.dense_steps
    run = times * ((whole.steps - sparse) * dense_seconds + sparse * seconds)
    if candidate.dense:
        run = times * whole.steps * seconds
    # With guidance, both forwards of a step calibrate.
    run += candidate.extra * whole.forwards * whole.depth / model.depth
    return {
        "size": list(case.size),
        "grid": list(case.grid),
        "tokens": case.tokens,
        "dtype": case.dtype,
        "dense": candidate.dense,
        "target": candidate.target,
        "density": candidate.density,
        "error": candidate.error,
        "precision": candidate.precision,
        "baseline": steps.baseline,
        "x": timing.speedup_over(baseline),
        "x_stock": timing.speedup_over(steps.timings["stock"]),
        "attention_share": attention / total if total else None,
        "parts_ms": {part: 1e3 * t for part, t in candidate.parts.items()},
        "calibration_ms": 1e3 * candidate.extra,
        "peak_mib": candidate.peak,
        "joules": candidate.joules,
        "predicted_ms": 1e3 * expected,
        "predicted_over_measured": expected / seconds,
        "predicted_x": predicted.dense_forward / expected,
        "blocks": model.depth,
        "of_blocks": whole.depth,
        "steps": whole.steps,
        "dense_steps": steps.dense_steps,
        "forwards": whole.forwards,
        "run_s": run,
        "run_x": times * whole.steps * dense_seconds / run,
        "absent": steps.absent,
    }


def text_of(rows: list[Row], steps: Steps) -> str:
    """The rows as a table for the terminal, with the forecast beside each."""
    head = ["", "ms", "x dense", "x stock", "density", "attention", "forecast", "ratio", "run x"]
    head += ["precision", "error"]
    lines = [("  {:22}" + "{:>11}" * 10).format(*head)]
    for row in rows:
        config = row["config"]
        if row["value"] is None:
            continue
        error = config["error"]
        cells = (
            f"{row['value']:.1f}",
            f"{config['x']:.2f}x",
            f"{config['x_stock']:.2f}x",
            f"{config['density']:.3f}",
            f"{config['attention_share'] or 0:.0%}",
            f"{config['predicted_ms']:.1f}",
            f"{config['predicted_over_measured']:.2f}",
            f"{config['run_x']:.2f}x",
            config["precision"],
            "unchecked" if error is None else f"{error:.1e}",
        )
        lines.append(("  {:22}" + "{:>11}" * 10).format(row["name"], *cells))
    lines += [f"  {name} was not measured: {why}" for name, why in steps.absent.items()]
    lines += [f"  {name} WRONG: {why}" for name, why in steps.wrong.items()]
    return "\n".join(lines)
