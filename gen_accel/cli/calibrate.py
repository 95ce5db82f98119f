"""gen-accel calibrate: watch dense runs of a model and write a plan file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli import options
from gen_accel.cli.options import UsageError

if TYPE_CHECKING:
    from gen_accel.plan import AttentionPlan

SECTIONS = ("pipeline",)


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "calibrate", help="make a plan file from dense runs", description=__doc__
    )
    options.add(parser, *options.OPTIONS)
    more = {"default": argparse.SUPPRESS}
    parser.add_argument("--output", metavar="FILE", help="plan (plan.safetensors)", **more)
    parser.add_argument("--density", type=float, help="share of the blocks to keep (0.3)", **more)
    parser.add_argument(
        "--groups", help="step groups with masks of their own, or paper (4)", **more
    )
    parser.add_argument("--dense-steps", type=float, help="dense first share (0.2)", **more)
    parser.add_argument("--block", type=int, help="tokens per block: 16, 32, 64, 128", **more)
    parser.add_argument("--criterion", help="how orders are chosen: mass or paper", **more)
    parser.add_argument("--rows-per-block", type=int, help="sampled query rows (16)", **more)
    parser.add_argument("--order-prompts", type=int, help="prompts that choose orders (1)", **more)
    parser.add_argument(
        "--precision", metavar="auto|NAME,..",
        help="choose one per layer and head by its measured error: auto, or what to try, cheapest "
        "first", **more,
    )  # fmt: skip
    parser.add_argument("--max-error", type=float, help="relative L2 error allowed (0.02)", **more)


def run(args: argparse.Namespace) -> int:
    """Calibrate and save."""
    from gen_accel.cli import pipeline as shared
    from gen_accel.eval.files import check_writable

    prompts = options.prompts(args)
    options.require(args, "model")
    path = Path(getattr(args, "output", "plan.safetensors"))
    if path.is_dir():
        raise UsageError(f"--output {path}: a folder; name the plan file")
    check_writable(path.parent)
    names = (
        "density", "groups", "dense_steps", "block", "criterion", "rows_per_block",
        "order_prompts", "precision", "max_error",
    )  # fmt: skip
    settings = {n: getattr(args, n) for n in names if hasattr(args, n)}
    if settings.get("precision", "auto") != "auto":
        settings["precision"] = settings["precision"].split(",")
    if str(settings.get("groups", "")).isdigit():
        settings["groups"] = int(settings["groups"])
    device = shared.device_of(args)
    _check(settings)

    import torch

    from gen_accel.calibration import calibrate

    pipe = shared.load_pipeline(args, device)
    call = shared.call_arguments(args, pipe)
    call["generator"] = torch.Generator().manual_seed(getattr(args, "seed", 0))
    plan = calibrate(pipe, prompts, **settings, **call)
    path.parent.mkdir(parents=True, exist_ok=True)
    plan.save(path)
    print(
        f"wrote {path}: grid {plan.grid}, density {plan.density:g}, mass kept "
        f"{plan.mass_kept():.4f}, calibrated in {plan.info['seconds']:.1f} s"
    )
    if "precision" in plan.info:
        print(_precisions(plan))
    return 0


def _precisions(plan: AttentionPlan) -> str:
    """How many heads of each layer got which precision, and the largest error among them."""
    from gen_accel.precision import EXACT

    measured = plan.info["precision"]
    tried = measured["tried"]
    lines = [
        f"| heads by precision, error at most {measured['max_error']:g} | {' | '.join(tried)} | "
        "not quantised | worst error |",
        "|---" * (len(tried) + 3) + "|",
    ]
    for component, part in plan.components.items():
        for layer, entry in sorted(part.layers.items()):
            if entry.precision is None:
                continue
            errors, chosen = measured["errors"][component][str(layer)], entry.precision.names
            counts = [chosen.count(name) for name in (*tried, EXACT)]
            kept = [errors[n][head] for head, n in enumerate(chosen) if n != EXACT]
            worst = f"{max(kept):.4f}" if kept else ""
            row = (f"{component} {layer}", *map(str, counts), worst)
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _check(settings: dict[str, Any]) -> None:
    """Meet bad settings before a model is loaded: the library checks them, but later."""
    from gen_accel import ParoProcessor
    from gen_accel.precision import CHEAPEST, PrecisionMeter

    common = ("density", "dense_steps", "block", "criterion", "rows_per_block")
    ParoProcessor(**{name: settings[name] for name in common if name in settings})
    if "precision" in settings:
        candidates = CHEAPEST if settings["precision"] == "auto" else settings["precision"]
        PrecisionMeter(candidates, settings.get("max_error", 0.02))
    elif "max_error" in settings:
        raise UsageError("--max-error limits what --precision chooses; add --precision auto")
