"""``bench e2e --weights PATH``: whole clips of a checkpoint, timed and judged against dense."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli import networks, options
from gen_accel.cli.options import UsageError
from gen_accel.cli.renders import Renders, Setting

if TYPE_CHECKING:
    from gen_accel.cli.bench.e2e import Case

_METRICS = "psnr,ssim,flicker"
_PROMPTS = ("a red circle moves to the right", "a blue square and a green circle")


def clip_rows(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for dense and for each method at each density: seconds of a clip, its scores.

    Clips are kept in ``OUTPUT/clips``: what is there is not rendered again.

    Args:
        case: Its methods and densities count; the model is that of the checkpoint.
        args: Options of the benchmark.
    """
    import statistics

    from gen_accel.cli import pipeline as shared
    from gen_accel.cli.verdict import Court, _toy_call
    from gen_accel.eval.harness import result_row

    own = argparse.Namespace(model=args.weights, dtype=case.dtype, device=args.device)
    own.sections = {"pipeline": {}}
    given = {"height": args.height, "width": args.width, "num_frames": args.num_frames}
    call = {**_toy_call(args.weights), **{k: v for k, v in given.items() if v is not None}}
    prompts = list(_PROMPTS)
    if args.prompt_file is not None:
        prompts = options.prompts(argparse.Namespace(prompts=args.prompt_file))
    if len(prompts) < 2:
        raise UsageError(f"--prompt-file {args.prompt_file}: one prompt; give at least 2")

    def load() -> Any:
        pipe = shared.load_pipeline(own, args.device)
        pipe.set_progress_bar_config(disable=True)
        # The first call of a process is slower than those that count.
        shared.generate(pipe, prompts[0], args.seed, {**call, "num_inference_steps": 2})
        return pipe

    folder = Path(args.output or "outputs/e2e-custom") / "clips"
    renders = Renders(folder, own, call, args.device, load)
    sources = networks.Networks(own, args.device)
    metrics, _ = networks.choose(_METRICS + ",defects", ("reference",), sources, len(prompts))
    court = Court(renders, prompts, args.seed, [], metrics, sources)
    settings = [
        Setting(method, method, {"dense_steps": case.dense_steps, "min_tokens": 0}).at(density)
        for method in case.methods
        for density in case.densities
    ]
    dense = [clip.seconds for clip in court.dense]

    def row(name: str, seconds: list[float], density: float, scores: dict[str, float]) -> Any:
        return result_row(
            "e2e clips",
            name,
            statistics.median(seconds),
            "s",
            n=len(prompts),
            spread=[min(seconds), max(seconds)],
            config={
                "density": density,
                "x": statistics.median(d / s for d, s in zip(dense, seconds)),
                "scores": scores,
                "call": {key: value for key, value in call.items()},
                "dtype": case.dtype,
            },
            model=str(args.weights),
            seed=args.seed,
            device=args.device,
        )

    rows = [row("dense", dense, 1.0, {})]
    for setting in settings:
        trial = court.judge(setting)
        scores = {n: statistics.fmean(v) for n, v in trial.values.items() if n != "defects"}
        rows.append(row(setting.label, [c.seconds for c in trial.clips], trial.density, scores))
        print(f"  {setting.label}: {rows[-1]['config']['x']:.2f}x, {scores}", flush=True)
        for line in trial.broken:
            print(f"  {line}")
    return rows
