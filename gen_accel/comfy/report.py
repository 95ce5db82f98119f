"""What a run did, as text and as a picture."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_accel.comfy.run import Run

_CELL = 16  # pixels per step and block


def report(run: Run) -> str:
    """Settings, kept density by step and block, reasons of dense calls, times."""
    stats = run.stats
    dense = sum(stats.dense.values())
    lines = [
        f"{run.policy!r}",
        f"sparse between {run.span.start:g} and {run.span.end:g} of the noise schedule",
        f"token grid {', '.join(map(str, run.grids)) or 'unknown'}",
        f"self-attention: {stats.sparse} sparse calls, {dense} dense",
    ]
    if stats.sparse:
        lines.append(f"density {stats.mean_density:.4f} on carrier {stats.carrier}")
    lines += [f"  dense: {count} x {reason}" for reason, count in stats.dense.items()]
    lines += [f"  not ours: {count} x {reason}" for reason, count in run.declined.items()]
    for axis, name in ((0, "step"), (1, "block")):
        means = _means(stats.density, axis)
        if means:
            found = ", ".join(f"{at}: {value:.3f}" for at, value in means.items())
            lines.append(f"density by {name}: {found}")
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in stats.seconds.items())
    lines.append(f"run {run.seconds:.2f} s" + (f", of that {parts}" if parts else ""))
    if not parts:
        lines[-1] += " (profile=true on the node times the parts)"
    if run.plan is not None:
        lines.append(f"{run.plan!r} keeps {run.plan.mass_kept():.1%} of the softmax mass")
    return "\n".join(lines)


def density_map(run: Run) -> Tensor:
    """``[1, height, width, 3]`` in 0..1: steps downwards, blocks to the right."""
    found = run.stats.density
    steps = 1 + max((step or 0 for step, _ in found), default=0)
    layers = 1 + max((layer for _, layer in found), default=0)
    cells = torch.ones(steps, layers)
    for (step, layer), kept in found.items():
        cells[step or 0, layer] = kept
    cells = cells.repeat_interleave(_CELL, 0).repeat_interleave(_CELL, 1)
    return cells[None, :, :, None].expand(-1, -1, -1, 3).contiguous()


def _means(density: dict[tuple[int | None, int], float], axis: int) -> dict[int | None, float]:
    groups: dict[int | None, list[float]] = {}
    for at, kept in density.items():
        groups.setdefault(at[axis], []).append(kept)
    return {at: sum(found) / len(found) for at, found in sorted(groups.items(), key=_first)}


def _first(item: tuple[int | None, list[float]]) -> int:
    return -1 if item[0] is None else item[0]
