"""From the model's tensors to the carrier's: norm, rotary embedding and order, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_accel.kernels.fused import fused


@dataclass(frozen=True, eq=False)
class AxisPlaces:
    """An order of the grid's axes for each head; the text stands behind the video.

    Attributes:
        strides: int32 ``[H, 3]``: frame f, row y, column x of head h stands at place
            ``f * strides[h, 0] + y * strides[h, 1] + x * strides[h, 2]``.
        grid: Frames, height, width.
        before: Tokens before the video, in the model's order.
    """

    strides: Tensor
    grid: tuple[int, int, int]
    before: int = 0

    @classmethod
    def from_axes(
        cls, axes: Sequence[Sequence[int]], grid: tuple[int, int, int], before: int = 0,
        device: torch.device | str = "cpu",
    ) -> AxisPlaces:  # fmt: skip
        """From the axes (0 frames, 1 height, 2 width) of each head, slowest first."""
        strides = torch.empty(len(axes), 3, dtype=torch.int32, device="cpu")
        for head, order in enumerate(axes):
            for rank, axis in enumerate(order):
                strides[head, axis] = math.prod(grid[a] for a in order[rank + 1 :])
        return cls(strides.to(device), grid, before)

    def places(self, tokens: int) -> Tensor:
        """int64 ``[H, tokens]``: where each token of the model stands."""
        device = self.strides.device
        axes = [torch.arange(size, device=device) for size in self.grid]
        f, y, x = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
        video = (self.strides.long()[:, :, None] * torch.stack([f, y, x])).sum(1)
        heads, size = video.shape
        token = torch.arange(tokens, device=device).expand(heads, -1)
        before, after = token[:, : self.before] + size, token[:, self.before + size :]
        return torch.cat([before, video, after], 1)


@dataclass(frozen=True, eq=False)
class IndexPlaces:
    """One order for all heads.

    Attributes:
        token: int64 ``[places]``: which token of the model stands at each place; one token may
            stand at several (the padding of tiles).
        place: int64 ``[tokens]``: the place a token is read back from.
    """

    token: Tensor
    place: Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotary embedding of some tokens.

    Attributes:
        cos: ``[tokens, head_dim / 2]``, any strides: one number per pair of channels.
        sin: Same shape.
        start: First token that is rotated, in the model's order; those outside stay as they are.
        halves: Channels i and ``i + head_dim / 2`` are a pair (Cosmos), else 2i and 2i + 1 (Wan,
            FLUX, HunyuanVideo).
    """

    cos: Tensor
    sin: Tensor
    start: int = 0
    halves: bool = False


@dataclass(frozen=True, eq=False)
class Norm:
    """RMS norm, in fp32: x / sqrt(mean(x²) + eps) * weight.

    Attributes:
        weight: ``[head_dim]``, each head is normed by itself (HunyuanVideo, FLUX, Cosmos), or
            ``[heads * head_dim]``, a token's heads are normed together (Wan).
        eps: Added to the mean square.
    """

    weight: Tensor
    eps: float


Places = AxisPlaces | IndexPlaces


def prepare(
    x: Tensor, places: Places | None = None, rope: Rope | None = None, norm: Norm | None = None
) -> Tensor:
    """Norm the tokens, rotate them and put them in order: one read, one write.

    Args:
        x: ``[B, S, H, D]`` in the model's order.
        places: Where tokens go; None keeps the order.
        rope: Rotary embedding, or None.
        norm: RMS norm of all tokens, or None; in half precision nothing is rounded between it
            and the rotation.

    Returns:
        ``[B, H, places, D]``, contiguous, in x's dtype.
    """
    if fused(x):
        from gen_accel.kernels.triton import prepare as kernel

        return kernel.prepare(x, *_flatten(places), *_flatten_rope(rope), *_flatten_norm(norm))
    dtype = x.dtype
    if norm is not None:
        x = _norm(x, norm)
    if rope is not None:
        x = _rotate(x, rope)
    x = x.to(dtype)
    x = x.transpose(1, 2)
    if places is None:
        return x.contiguous()
    if isinstance(places, IndexPlaces):
        return x.index_select(2, places.token)
    at = places.places(x.shape[2])[None, :, :, None].expand(x.shape)
    return torch.empty_like(x, memory_format=torch.contiguous_format).scatter_(2, at, x)


def restore(x: Tensor, places: Places | None = None) -> Tensor:
    """Undo the order of `prepare`.

    Args:
        x: ``[B, H, places, D]``.
        places: What `prepare` was given.

    Returns:
        ``[B, S, H, D]``, contiguous, in the model's order.
    """
    if fused(x):
        from gen_accel.kernels.triton import prepare as kernel

        return kernel.restore(x, *_flatten(places))
    if isinstance(places, IndexPlaces):
        x = x.index_select(2, places.place)
    elif places is not None:
        x = x.gather(2, places.places(x.shape[2])[None, :, :, None].expand(x.shape))
    return x.transpose(1, 2).contiguous()


def _norm(x: Tensor, norm: Norm) -> Tensor:
    """In fp32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = x if len(norm.weight) == x.shape[-1] else x.flatten(2)
    scale = torch.rsqrt(parts.square().mean(-1, keepdim=True) + norm.eps)
    return (parts * scale * norm.weight).reshape(x.shape)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    cos, sin = rope.cos[:, None].float(), rope.sin[:, None].float()
    here = slice(rope.start, rope.start + len(cos))
    pairs = (2, -1) if rope.halves else (-1, 2)
    axis = -2 if rope.halves else -1
    real, imag = x[:, here].float().unflatten(-1, pairs).unbind(axis)
    turned = torch.stack([real * cos - imag * sin, imag * cos + real * sin], axis)
    out = x.clone()
    out[:, here] = turned.flatten(-2).to(x.dtype)
    return out


# A compiled graph carries tensors and numbers: the operations take the orders in pieces.


def _flatten(
    places: Places | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[int]]:
    if places is None:
        return None, None, None, []
    if isinstance(places, IndexPlaces):
        return None, places.token, places.place, []
    return places.strides, None, None, [*places.grid, places.before]


def _flatten_rope(rope: Rope | None) -> tuple[Tensor | None, Tensor | None, int, bool]:
    return (None, None, 0, False) if rope is None else (rope.cos, rope.sin, rope.start, rope.halves)


def _flatten_norm(norm: Norm | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.eps)
