"""Queries and keys of heads that are local along known axes: tight on one, loose on another."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_accel.layout import TokenGrid

TIGHT, LOOSE = 10.0, 3.0
_PAIRS = 8  # rotary pairs per axis
_DIM = 2 * _PAIRS * 3


def planted_heads(
    grid: TokenGrid, axes: list[str], *, noise: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """q and k ``[1, F*H*W, heads, 48]``, rotated by RoPE.

    Head ``i`` is local along the first axis of ``axes[i]`` (a permutation of FHW), less so along
    the second, and not at all along the third: its mass is most compact in exactly that order. The
    locality comes from RoPE alone, as in a real model: before the rotation q and k are constants
    plus noise, so that scores depend on the distance along an axis.
    """
    generator = torch.Generator().manual_seed(seed)
    position = torch.stack(
        torch.meshgrid(*(torch.arange(n).float() for n in grid), indexing="ij"), -1
    ).view(-1, 3)
    q, k = torch.empty(2, grid.numel, len(axes), _DIM).unbind()
    for head, order in enumerate(axes):
        weight = dict(zip(order, (TIGHT, LOOSE, 0.0), strict=True))
        constant = torch.cat([_constant(weight[axis]) for axis in "FHW"])
        for x in (q, k):
            content = noise * torch.randn(grid.numel, _DIM, generator=generator)
            x[:, head] = _rotate(constant + content, position)
    # The carriers divide by sqrt(head_dim); undo it, so that the weights above are score units.
    return q[None] * _DIM**0.5, k[None]


def _constant(weight: float) -> Tensor:
    """A vector whose rotated self-product is ``weight`` at distance 0 and falls off from there."""
    amplitude = (weight / _PAIRS) ** 0.5
    return torch.tensor([amplitude, 0.0]).repeat(_PAIRS)


def _rotate(x: Tensor, position: Tensor) -> Tensor:
    frequency = 100.0 ** (-torch.arange(_PAIRS) / _PAIRS)
    angle = (position[:, :, None] * frequency).flatten(1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
