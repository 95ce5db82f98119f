"""gen-accel generate: render prompts with a sparse pipeline, and show what it cost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli import options
from gen_accel.cli.options import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.install import Handle

# Names that may stand before a dot: processor.density=0.2, pipeline.max_sequence_length=256.
SECTIONS = ("processor", "pipeline")


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "generate",
        help="render prompts, optionally beside the dense model",
        description=__doc__,
        epilog="processor.NAME=VALUE sets an option of the processor, pipeline.NAME=VALUE one of "
        "the pipeline's call.",
    )
    options.add(parser, *options.OPTIONS)
    more = {"default": argparse.SUPPRESS}
    parser.add_argument("--output", metavar="DIR", help="folder (outputs/generate)", **more)
    parser.add_argument(
        "--processor", metavar="NAME", help="paro (default), spaattn, gna, sparse or none", **more
    )
    parser.add_argument("--plan", metavar="FILE", help="plan written by calibrate", **more)
    parser.add_argument("--save-plan", metavar="FILE", help="keep the plan the run made", **more)
    parser.add_argument("--fps", type=float, help="frames per second of the files (16)", **more)
    parser.add_argument("--compare", action="store_true", help="render dense too", **more)
    parser.add_argument("--warmup", action="store_true", help="one untimed call first", **more)


def run(args: argparse.Namespace) -> int:
    """Render, measure, write the folder."""
    from gen_accel.cli import pipeline as shared
    from gen_accel.eval.files import check_writable

    prompts = options.prompts(args)
    options.require(args, "model")
    folder = Path(getattr(args, "output", "outputs/generate"))
    check_writable(folder)
    save_plan = getattr(args, "save_plan", None)
    if save_plan is not None:
        check_writable(Path(save_plan).parent)
    settings = dict(args.sections["processor"])
    named = settings.pop("name", "paro")  # processor: {name: paro, ...} in a file
    name = str(getattr(args, "processor", named))
    processor = shared.make_processor(name, settings, getattr(args, "plan", None))
    device = shared.device_of(args)
    if save_plan is not None and not hasattr(processor, "plan"):
        raise UsageError("--save-plan needs a processor that makes one; use --processor paro")

    pipe = shared.load_pipeline(args, device)
    call = shared.call_arguments(args, pipe)
    seed, fps = getattr(args, "seed", 0), getattr(args, "fps", 16.0)
    compare = getattr(args, "compare", False) and processor is not None
    methods = (["dense"] if compare else []) + ([name] if processor is not None else ["dense"])

    results: dict[str, list[tuple[Tensor, float]]] = {}
    handle = None
    for method in methods:
        if method != "dense":
            from gen_accel import apply

            handle = apply(pipe, processor)
        if getattr(args, "warmup", False):
            shared.generate(pipe, prompts[0], seed, call)
        results[method] = []
        for i, prompt in enumerate(prompts):
            pipe.set_progress_bar_config(desc=f"{method} {i + 1}/{len(prompts)}")
            results[method].append(shared.generate(pipe, prompt, seed, call))

    if save_plan is not None and handle is not None:
        if handle.plan is None:
            raise UsageError("--save-plan: the run stayed dense and made no plan; see the log")
        handle.plan.save(save_plan)
    page = _write(folder, args, prompts, results, handle, call, fps)
    print(f"wrote {page}")
    return 0


def _write(
    folder: Path,
    args: argparse.Namespace,
    prompts: list[str],
    results: dict[str, list[tuple[Tensor, float]]],
    handle: Handle | None,
    call: dict[str, Any],
    fps: float,
) -> Path:
    from gen_accel.cli import pages
    from gen_accel.cli.doctor import versions
    from gen_accel.eval.report import Media, Report, Row, write_report
    from gen_accel.eval.video import write_video

    baseline = next(iter(results))
    rows, media = [], []
    for method, clips in results.items():
        fidelity = _fidelity(clips, results[baseline]) if method != baseline else (None, None)
        stats = list(handle.stats().values()) if handle is not None and method != "dense" else []
        density = sum(s.mean_density for s in stats) / len(stats) if stats else 1.0
        mean = sum(seconds for _, seconds in clips) / len(clips)
        rows.append(Row(method, mean, density, *fidelity))
        print(_line(rows[-1], rows[0]))
    for i, prompt in enumerate(prompts):
        for method, clips in results.items():
            pixels = clips[i][0]
            suffix = ".png" if len(pixels) == 1 else ".mp4"
            file = f"{i:03d}{suffix}" if len(results) == 1 else f"{i:03d}.{method}{suffix}"
            write_video(folder / file, pixels, fps=fps)
            media.append(Media(file, f"{method}: {prompt}"))
    config = {"model": args.model, "seed": getattr(args, "seed", 0), **call}
    if handle is not None:
        config["processor"] = repr(handle.processor)
    seconds = {method: [s for _, s in clips] for method, clips in results.items()}
    data: dict[str, Any] = {"prompts": prompts, "seconds": seconds}
    notes = ["Times are whole pipeline calls on this machine, averaged over the prompts."]
    if handle is not None:
        data["summary"] = handle.summary().splitlines()
        data["density"] = pages.density(handle)
        notes += handle.summary().splitlines()[1:]
    summary = f"{len(prompts)} prompt(s), {', '.join(results)}."
    if len(rows) == 2:
        speedup = rows[0].seconds / rows[1].seconds
        summary = f"{rows[1].method} took {rows[1].seconds:.1f} s, {speedup:.2f}x as fast as dense."
    report = Report("gen-accel generate", summary, rows, media, {}, notes, config, versions(), data)
    return write_report(folder, report)


def _fidelity(
    clips: list[tuple[Tensor, float]], reference: list[tuple[Tensor, float]]
) -> tuple[float, float]:
    from gen_accel.eval.fidelity import psnr, ssim

    pairs = [(a, b) for (a, _), (b, _) in zip(clips, reference, strict=True)]
    mean = lambda measure: sum(float(measure(a, b)) for a, b in pairs) / len(pairs)  # noqa: E731
    return mean(psnr), mean(ssim)


def _line(row: Any, baseline: Any) -> str:
    line = f"{row.method}: {row.seconds:.1f} s"
    if row is not baseline:
        line += f" ({baseline.seconds / row.seconds:.2f}x), density run {row.density:.3f}"
        line += f", PSNR {row.psnr:.1f} dB, SSIM {row.ssim:.4f} to dense"
    return line
