"""Block masks of attention calls that are timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def uniform_mask(heads: int, columns: int, density: float, generator: torch.Generator) -> Tensor:
    """Random lists, equally many blocks in every row."""
    import torch

    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    scores = torch.rand(1, heads, columns, columns, **options)
    kept = scores.topk(max(1, round(density * columns)), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def calibrated_mask(heads: int, columns: int, density: float, generator: torch.Generator) -> Tensor:
    """As a calibration makes them: one threshold for all heads, so that heads and rows differ.

    Each head has a diagonal of its own width, stray mass, and rows of different sharpness.
    """
    import torch

    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    place = torch.arange(columns, device=generator.device)
    distance = (place[:, None] - place).abs() / columns
    width = torch.logspace(-1.5, -0.2, heads, device=generator.device)[:, None, None]
    scores = torch.exp(-distance / width) / width
    scores = scores + 0.3 * torch.rand(heads, columns, columns, **options) ** 4
    scores = scores * torch.exp(0.5 * torch.randn(heads, columns, 1, **options))
    kept = max(heads * columns, round(density * scores.numel()))
    scores.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return (scores >= scores.flatten().topk(kept).values[-1])[None]
