"""The demonstration: one video dense and with PARO, side by side, with time and fidelity."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gen_accel.eval.fidelity import psnr, ssim
from gen_accel.eval.report import Media, Picture, Report, Row, heatmap, write_report
from gen_accel.eval.video import side_by_side, write_video
from gen_accel.layout import TokenLayout

if TYPE_CHECKING:
    from gen_accel.demo_trained import Trained
    from gen_accel.install import Handle

PROMPT = "coloured lights drifting through fog"
FPS = 8

NOTES = (
    "The weights are built, not trained: each head averages over a neighbourhood that is narrow in "
    "two axes of time, height, width. PARO does not know that and has to find it. How a trained "
    "model looks with it, the clips of the small trained one tell.",
    "Times are whole pipeline calls: text encoder, all denoising steps, calibration, VAE. "
    "Everything ran in fp32 on the CPU, the dense run on PyTorch's own attention kernel.",
    "PSNR and SSIM compare the decoded frames with those of the dense run, before any video codec.",
)


@dataclass(frozen=True)
class DemoSettings:
    """What to run; the defaults make 9x32x32 = 9216 tokens.

    Args:
        density: Share of the attention blocks PARO keeps, in (0, 1].
        dense_steps: First share of the steps that stays dense.
        num_inference_steps: Denoising steps.
        height: Pixels, a multiple of 8.
        width: Pixels, a multiple of 8.
        num_frames: Frames, odd.
        guidance_scale: Classifier-free guidance; above 1 the transformer runs twice a step.
        seed: Seed of weights and noise.
    """

    density: float = 0.25
    dense_steps: float = 0.2
    num_inference_steps: int = 15
    height: int = 256
    width: int = 256
    num_frames: int = 17
    guidance_scale: float = 4.0
    seed: int = 0


def run_demo(folder: str | Path, settings: DemoSettings = DemoSettings()) -> Path:
    """Render the demo video dense and sparse and write the comparison.

    Args:
        folder: Gets dense.mp4, paro.mp4, side_by_side.mp4, report.json, index.html and, where
            there is a trained model (in a clone), its clips.
        settings: What to run.

    Returns:
        Path of the page.

    Raises:
        ValueError: A setting is out of range, or the folder cannot be written to.
    """
    from gen_accel import ParoProcessor, apply
    from gen_accel.demo_model import demo_pipeline
    from gen_accel.demo_trained import run_trained

    # Refused before anything runs.
    processor = ParoProcessor(
        density=settings.density, dense_steps=settings.dense_steps, min_tokens=0
    )
    pipe = demo_pipeline(settings.seed)
    _render(pipe, settings, "warm-up", num_inference_steps=1, height=32, width=32, num_frames=3)
    dense, dense_seconds = _render(pipe, settings, "dense")
    with apply(pipe, processor) as handle:
        sparse, sparse_seconds = _render(pipe, settings, "PARO")
    pictures = _attention_pictures(pipe, settings, handle)
    rows = (
        Row("dense", dense_seconds, note="PyTorch scaled_dot_product_attention"),
        Row(
            "PARO",
            sparse_seconds,
            handle.stats()["transformer"].mean_density,
            float(psnr(sparse, dense)),
            float(ssim(sparse, dense)),
            f"density {settings.density:g}, first {settings.dense_steps:.0%} of the steps dense",
        ),
    )
    folder = Path(folder)
    labels = [f"dense, {dense_seconds:.1f} s", f"PARO, {sparse_seconds:.1f} s"]
    for name, frames in (
        ("dense.mp4", dense),
        ("paro.mp4", sparse),
        ("side_by_side.mp4", side_by_side([dense, sparse], labels=labels)),
    ):
        write_video(folder / name, frames, fps=FPS)
    trained = run_trained(folder, settings.density, settings.dense_steps)
    return write_report(folder, _report(settings, rows, pictures, handle, trained))


def _render(pipe: Any, settings: DemoSettings, name: str, **changes: Any) -> tuple[Tensor, float]:
    """Frames ``[frames, channels, height, width]`` in [0, 1], and the seconds they took."""
    pipe.set_progress_bar_config(desc=f"{name:>8}", disable=name == "warm-up")
    generator = torch.Generator().manual_seed(settings.seed + 1)
    started = time.perf_counter()
    video = pipe(
        prompt=PROMPT, generator=generator, output_type="pt", **{**_call(settings), **changes}
    ).frames[0]
    return video.clamp(0, 1), time.perf_counter() - started


def _call(settings: DemoSettings) -> dict[str, Any]:
    """Arguments of the pipeline."""
    names = ("num_inference_steps", "height", "width", "num_frames", "guidance_scale")
    chosen = {name: getattr(settings, name) for name in names}
    return {**chosen, "negative_prompt": "", "max_sequence_length": 64}


def _attention_pictures(
    pipe: Any, settings: DemoSettings, handle: Handle
) -> Mapping[str, list[Picture]]:
    """Where the mass of one head lies, in raster order and in the order that was chosen."""
    from gen_accel.capture import capture
    from gen_accel.kernels.mass import block_mass
    from gen_accel.order.raster import RasterOrder

    plan = handle.plan
    if plan is None:
        return {}
    pipe.set_progress_bar_config(disable=True)
    layer = 1  # its heads are wide in time, which raster order has slowest: there is most to see
    call = {**_call(settings), "num_inference_steps": 1}
    seen = capture(pipe, [PROMPT], seed=settings.seed + 1, **call)
    q, k = next((one.q, one.k) for one in seen if one.layer == layer)
    layout, chosen = TokenLayout(plan.grid), plan.components["transformer"].layers[layer]
    kept = int(plan.density * (plan.grid.numel // plan.block))
    mass, share = [], []
    for order in (RasterOrder(), chosen.orders):
        blocks = block_mass(
            order.reorder(q, layout),
            order.reorder(k, layout),
            block=plan.block,
            blocks=plan.grid.numel // plan.block,
            rows_per_block=16,
        )
        mass.append(blocks)
        share.append(blocks.topk(kept, -1).values.sum(-1).mean(-1))
    head = int((share[1] - share[0]).argmax())
    top = float(max(blocks[head].max() for blocks in mass)) ** 0.5
    before, after = (heatmap(blocks[head].sqrt(), largest=top) for blocks in mass)
    name = chosen.order_names[head]
    title = f"Where head {head} of layer {layer} looks, in blocks of {plan.block} tokens"
    return {
        title: [
            Picture(before, f"Raster order FHW: {plan.density:.0%} of the blocks can hold "
                    f"{float(share[0][head]):.1%} of the attention."),
            Picture(after, f"Order {name}, which PARO chose: the same number holds "
                    f"{float(share[1][head]):.1%}."),
            Picture(heatmap(chosen.masks[0, head].float()), "The blocks PARO kept for it, "
                    f"{float(chosen.masks[0, head].float().mean()):.1%} of them. Heads share the "
                    "budget of a layer."),
        ]
    }  # fmt: skip


def _report(
    settings: DemoSettings,
    rows: tuple[Row, Row],
    pictures: Mapping[str, list[Picture]],
    handle: Handle,
    trained: Trained | None,
) -> Report:
    from gen_accel.cli.doctor import examine

    machine = examine()
    dense, sparse = rows
    plan, stats = handle.plan, handle.stats()["transformer"]
    config: dict[str, Any] = {
        "model": "WanPipeline built in gen_accel/demo_model.py",
        "prompt": PROMPT,
        **dataclasses.asdict(settings),
        "processor": repr(handle.processor),
        "device": machine["devices"][0],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    data: dict[str, Any] = {
        "attention_seconds": stats.seconds,
        "calls": {"sparse": stats.sparse, "dense": stats.dense},
    }
    notes = list(NOTES)
    if plan is not None:
        config["tokens"] = f"{plan.grid} = {plan.grid.numel}"
        layers = plan.components["transformer"].layers
        data["orders"] = {n: p.order_names for n, p in layers.items()}
        data["mass_kept"] = plan.mass_kept()
        spent = stats.seconds.get("calibrate", 0.0)
        notes.append(
            f"Calibration took {spent:.1f} s of PARO's time; the kept blocks hold "
            f"{plan.mass_kept():.2%} of the attention it saw."
        )
    else:
        notes.append("PARO stayed dense: " + "; ".join(stats.dense))
    if trained is not None:
        data["trained"] = {"psnr": trained.psnr, "density": trained.density}
        notes.append(trained.summary)
    else:
        notes.append("A clone of the repository shows clips of a small trained model here as well.")
    speedup = dense.seconds / sparse.seconds
    summary = (
        f"{sparse.seconds:.1f} s instead of {dense.seconds:.1f} s ({speedup:.2f}x), "
        f"{sparse.psnr:.1f} dB PSNR to the dense video, with one line of code: "
        f"pipe.set_attn_processor(ParoProcessor(density={settings.density:g}))."
    )
    return Report(
        title="A video transformer, dense and with PARO",
        summary=summary,
        rows=rows,
        media=(Media("dense.mp4", "dense"), Media("paro.mp4", "PARO")),
        clips={} if trained is None else trained.clips,
        pictures=pictures,
        notes=notes,
        config=config,
        versions={"python": machine["python"], **machine["packages"]},
        data=data,
    )
