"""What the pages of ``eval`` and ``verdict`` are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.eval.metric import Metric
    from gen_accel.eval.plot import Plot
    from gen_accel.eval.report import Media, Picture, Table
    from gen_accel.install import Handle

GAIN = 8  # of the shown difference


def players(
    folder: Path, name: str, videos: Mapping[str, Tensor], reference: str | None, fps: float
) -> list[Media]:
    """Write videos that are shown side by side, and how each differs from the reference.

    Args:
        folder: Of the page.
        name: Of the clip; file names begin with it.
        videos: Label -> frames, all of one shape.
        reference: Label of the one the others are compared with.
        fps: Frames per second.
    """
    from gen_accel.eval.features import unit_range
    from gen_accel.eval.report import Media

    shown = {label: unit_range(video) for label, video in videos.items()}
    if reference is not None:
        wanted = shown[reference]
        for label in [label for label in videos if label != reference]:
            difference = (shown[label] - wanted).abs() * GAIN
            shown[f"{label} - {reference}, x{GAIN}"] = difference.clamp(0, 1)
    media = []
    for i, (label, video) in enumerate(shown.items()):
        file = _write(folder, f"{name}.{i}", video, fps)
        media.append(Media(file, label))
    return media


def _write(folder: Path, stem: str, video: Tensor, fps: float) -> str:
    import torch.nn.functional as F

    from gen_accel.eval.video import write_video

    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)
    suffix = ".png" if len(video) == 1 else ".mp4"
    height, width = video.shape[-2:]
    # H.264 needs even sizes.
    even = F.pad(video, (0, width % 2, 0, height % 2), mode="replicate")
    write_video(folder / f"{stem}{suffix}", even, fps=fps)
    return f"{stem}{suffix}"


def definitions(metrics: Iterable[Metric]) -> Table:
    """What each metric is."""
    from gen_accel.eval.report import Table

    rows = [(m.name, m.unit or "-", m.better, m.definition) for m in metrics]
    return Table(("metric", "unit", "better", "definition"), rows)


def curves(
    frames: Mapping[str, Mapping[str, list[float]]], metrics: Iterable[Metric]
) -> list[Plot]:
    """One chart per metric from candidate -> metric -> values per frame."""
    from gen_accel.eval.plot import Plot

    plots = []
    for metric in metrics:
        series = {label: values[metric.name] for label, values in frames.items()
                  if any(map(math.isfinite, values.get(metric.name, ())))}  # fmt: skip
        if series:
            title = f"{metric.name}, {metric.better} is better"
            plots.append(Plot(series, title, y=metric.unit))
    return plots


def density(handle: Handle) -> dict[str, Any]:
    """What ran in each transformer, as plain data: ``calls`` holds ``[step, layer, density]``.

    `density_pictures` shows it.
    """
    found = {}
    for component in handle.components:
        stats, engine = component.engine.stats, component.engine
        calls = [[step, layer, round(d, 4)] for (step, layer), d in sorted(stats.density.items())
                 if step is not None]  # fmt: skip
        found[component.name] = {
            "steps": engine.context.steps or 1 + max((call[0] for call in calls), default=0),
            "layers": engine.layers,
            "sparse": stats.sparse,
            "dense": dict(stats.dense),
            "mean": stats.mean_density,
            "carrier": stats.carrier,
            "calls": calls,
        }
    return found


def density_pictures(run: Mapping[str, Any], label: str = "") -> list[Picture]:
    """Kept share per layer (down) and step (across); pale is dense."""
    import torch

    from gen_accel.eval.report import Picture, heatmap

    pictures = []
    for name, part in run.items():
        kept = torch.ones(part["layers"], part["steps"])
        for step, layer, share in part["calls"]:
            kept[layer, step] = share
        dense = "; ".join(f"{count} calls dense: {why}" for why, count in part["dense"].items())
        caption = (
            f"{label or name}: {part['layers']} layers (down) x {part['steps']} steps (across), "
            f"pale is dense. {part['sparse']} calls sparse, density {part['mean']:.3f} on average"
            + (f"; {dense}" if dense else "")
        )
        pixels = heatmap(kept, largest=1.0).repeat(12, 0).repeat(12, 1)
        pictures.append(Picture(pixels, caption))
    return pictures


def run_of(path: Path) -> dict[str, Any]:
    """What ``generate`` wrote beside a clip: its report.json, or nothing."""
    try:
        found = json.loads((path.parent / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
