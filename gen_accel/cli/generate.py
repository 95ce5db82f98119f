"""gen-accel generate: render prompts with a sparse pipeline, and show what it cost.

Under ``accelerate launch`` (or torchrun) the processes share the prompts, and started again they do
what is left.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli import options
from gen_accel.cli.options import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.cli.jobs import Jobs
    from gen_accel.install import Component, Handle
    from gen_accel.processors import Policy

# Names that may stand before a dot: processor.density=0.2, pipeline.max_sequence_length=256.
SECTIONS = ("processor", "pipeline")
PLAN = "plan.safetensors"  # of the first prompt, until all are done


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "generate",
        help="render prompts, optionally beside the dense model",
        description=__doc__.partition("\n")[0],
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
    parser.add_argument(
        "--fps", type=options.positive, help="frames per second of the files (16)", **more
    )
    parser.add_argument("--compare", action="store_true", help="render dense too", **more)
    parser.add_argument("--warmup", action="store_true", help="one untimed call first", **more)


def run(args: argparse.Namespace) -> int:
    """Render what is left, measure; the last process writes the folder up."""
    from gen_accel.cli import pipeline as shared
    from gen_accel.cli.doctor import versions
    from gen_accel.cli.jobs import Jobs
    from gen_accel.cli.renders import fingerprint
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
    compare = getattr(args, "compare", False) and processor is not None
    methods = (["dense"] if compare else []) + ([name] if processor is not None else ["dense"])
    follows_from = {
        "model": args.model,
        "checkpoint": fingerprint(args.model),
        "prompts": prompts,
        "seed": getattr(args, "seed", 0),
        "call": call,
        "dtype": getattr(args, "dtype", None),
        "methods": methods,
        "processor": repr(processor),
        "fps": getattr(args, "fps", 16.0),
        "versions": versions(),
    }
    worker = _Worker(args, pipe, processor, methods, call, prompts)
    jobs = Jobs(folder, follows_from, len(prompts), shared=shared.processes() > 1)
    try:
        worker.render(jobs)
    except Exception:
        jobs.abandon()
        raise
    with jobs.finish() as records:
        if records is not None:
            if save_plan is not None:
                worker.save_plan(save_plan, jobs.work / PLAN)
            print(f"wrote {_write(folder, args, records, methods, processor, call)}")
    return 0


class _Worker:
    """Renders prompts with one pipeline, dense and sparse in turn."""

    def __init__(
        self,
        args: argparse.Namespace,
        pipe: Any,
        processor: Policy | None,
        methods: list[str],
        call: dict[str, Any],
        prompts: list[str],
    ) -> None:
        self.args = args
        self.pipe = pipe
        self.processor = processor
        self.methods = methods
        self.call = call
        self.prompts = prompts
        self.handle: Handle | None = None
        self.made = False  # the plan in use is of our own run

    def render(self, jobs: Jobs) -> None:
        """Do what this process may claim."""
        from gen_accel.planner.calibrated import CalibratedPlanner

        learns = False
        if self.processor is not None:
            self._apply(self.processor)
            planners = [component.planner for component in self._components]
            learns = any(isinstance(p, CalibratedPlanner) and p.given is None for p in planners)
        warm = not getattr(self.args, "warmup", False)
        plan = jobs.work / PLAN
        # All prompts follow the plan of the first one, whichever process they are rendered in.
        for i in jobs.claims(first_alone=learns):
            if learns and self.processor is not None and not self.made and plan.exists():
                self._apply(dataclasses.replace(self.processor, plan=str(plan)))  # type: ignore[call-arg]
                learns = False
            if not warm:
                for method in self.methods:
                    self._clip(method, self.prompts[0])
                warm = True
            record = self._record(jobs.folder, i)
            if learns and i == 0 and self.handle is not None and self.handle.plan is not None:
                self.handle.plan.save(plan)
                self.made = True
            jobs.done(i, record)

    def save_plan(self, path: str, shared: Path) -> None:
        """Keep the plan of the run, whoever made it.

        Raises:
            UsageError: There is none.
        """
        if shared.exists():
            shutil.copyfile(shared, path)
            return
        if self.handle is None or self.handle.plan is None:
            raise UsageError("--save-plan: the run stayed dense and made no plan; see the log")
        self.handle.plan.save(path)

    @property
    def _components(self) -> list[Component]:
        return [] if self.handle is None else self.handle.components

    def _apply(self, processor: Policy) -> None:
        from gen_accel import apply

        self.handle = apply(self.pipe, processor)

    def _clip(self, method: str, prompt: str) -> tuple[Tensor, float]:
        """One call; the processors step aside for a dense one and keep what they learnt."""
        from gen_accel.cli import pipeline as shared

        for component in self._components:
            component.remove()
            if method != "dense":
                component.install()
        return shared.generate(self.pipe, prompt, getattr(self.args, "seed", 0), self.call)

    def _record(self, folder: Path, i: int) -> dict[str, Any]:
        """Render a prompt with every method, write the files, say what it cost."""
        from gen_accel.cli import pages
        from gen_accel.eval.fidelity import psnr, ssim
        from gen_accel.eval.video import write_video

        found: dict[str, Any] = {}
        reference = None
        for method in self.methods:
            self.pipe.set_progress_bar_config(desc=f"{method} {i + 1}/{len(self.prompts)}")
            pixels, seconds = self._clip(method, self.prompts[i])
            one: dict[str, Any] = {"seconds": seconds, "density": 1.0, "psnr": None, "ssim": None}
            if reference is not None:
                one["psnr"] = float(psnr(pixels, reference))
                one["ssim"] = float(ssim(pixels, reference))
            reference = pixels
            if method != "dense" and self.handle is not None:
                stats = list(self.handle.stats().values())
                one["density"] = sum(s.mean_density for s in stats) / len(stats)
                one["run"] = pages.density(self.handle)
                one["summary"] = self.handle.summary().splitlines()
            suffix = ".png" if len(pixels) == 1 else ".mp4"
            alone = len(self.methods) == 1
            one["file"] = f"{i:03d}{suffix}" if alone else f"{i:03d}.{method}{suffix}"
            write_video(folder / one["file"], pixels, fps=getattr(self.args, "fps", 16.0))
            found[method] = one
        return {"prompt": self.prompts[i], "clips": found}


def _write(
    folder: Path,
    args: argparse.Namespace,
    records: list[dict[str, Any]],
    methods: list[str],
    processor: Policy | None,
    call: dict[str, Any],
) -> Path:
    from gen_accel.cli.doctor import versions
    from gen_accel.eval.report import Media, Report, Row, write_report

    rows, media = [], []
    for method in methods:
        clips = [record["clips"][method] for record in records]
        mean = {
            key: sum(clip[key] for clip in clips) / len(clips)
            for key in ("seconds", "density", "psnr", "ssim")
            if clips[0][key] is not None
        }
        rows.append(Row(method, **mean))
        print(_line(rows[-1], rows[0]))
    for record in records:
        for method, clip in record["clips"].items():
            media.append(Media(clip["file"], f"{method}: {record['prompt']}"))
    config = {"model": args.model, "seed": getattr(args, "seed", 0), **call}
    if processor is not None:
        config["processor"] = repr(processor)
    seconds = {m: [record["clips"][m]["seconds"] for record in records] for m in methods}
    prompts = [record["prompt"] for record in records]
    data: dict[str, Any] = {"prompts": prompts, "seconds": seconds}
    notes = ["Times are whole pipeline calls on this machine, averaged over the prompts."]
    last = records[-1]["clips"][methods[-1]]
    if "summary" in last:
        data["summary"], data["density"] = last["summary"], last["run"]
        notes += last["summary"][1:]
    summary = f"{len(prompts)} prompt(s), {', '.join(methods)}."
    if len(rows) == 2:
        speedup = rows[0].seconds / rows[1].seconds
        summary = f"{rows[1].method} took {rows[1].seconds:.1f} s, {speedup:.2f}x as fast as dense."
    report = Report("gen-accel generate", summary, rows, media, {}, notes, config, versions(), data)
    return write_report(folder, report)


def _line(row: Any, baseline: Any) -> str:
    line = f"{row.method}: {row.seconds:.1f} s"
    if row is not baseline:
        line += f" ({baseline.seconds / row.seconds:.2f}x), density run {row.density:.3f}"
        line += f", PSNR {row.psnr:.1f} dB, SSIM {row.ssim:.4f} to dense"
    return line
