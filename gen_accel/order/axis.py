"""Axis orders: the six ways to flatten a frames x height x width grid, chosen per attention head.

A head that aggregates locally along one or two axes has its mass on far-off diagonals when those
axes run slowly. Flattened in the right order the same mass lies inside few blocks (PAROAttention,
arXiv 2506.16054, section 3). Attention is unchanged by any order that q, k and v share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gen_accel.kernels.fused import fused
from gen_accel.kernels.prepare import AxisPlaces, prepare, restore
from gen_accel.layout import TokenGrid, TokenLayout

# Index -> axes from slowest to fastest. The numbering is that of the paper's authors; 2 and 5 undo
# each other, so an index must never be applied twice in place of its inverse.
AXIS_ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
RASTER = 0
_AXES = tuple(tuple("FHW".index(axis) for axis in name) for name in AXIS_ORDERS)


def candidate_orders(grid: TokenGrid) -> tuple[int, ...]:
    """Indices into `AXIS_ORDERS` that give different token orders on this grid.

    Six for a video; two for an image (``frames=1``), where only the order of H and W matters.
    """
    seen: dict[tuple[int, ...], int] = {}
    for index, axes in enumerate(_AXES):
        seen.setdefault(tuple(a for a in axes if grid[a] > 1), index)
    return tuple(sorted(seen.values()))


@lru_cache(maxsize=64)
def axis_permutation(grid: TokenGrid, order: int) -> Tensor:
    """``perm[i]`` = raster index of the token that stands at place ``i``; int64 ``[F*H*W]``."""
    return torch.arange(grid.numel, device="cpu").view(*grid).permute(*_AXES[order]).reshape(-1)


def inverse_permutation(perm: Tensor) -> Tensor:
    """``inverse[perm] = arange``: where each raster token stands; same shape as ``perm``."""
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.numel(), dtype=perm.dtype, device=perm.device)
    return inverse


@dataclass(frozen=True)
class AxisOrder:
    """One axis order per head.

    The ordered sequence is ``[video in the head's order, text before, text after]``: attention does
    not care where a key stands, and with the text behind it the video starts on a block edge.

    Args:
        heads: For each head an index into `AXIS_ORDERS`.
    """

    heads: tuple[int, ...]

    def __post_init__(self) -> None:
        for head, order in enumerate(self.heads):
            if not 0 <= order < len(AXIS_ORDERS):
                raise ValueError(
                    f"order {order} of head {head}: an axis order is 0..{len(AXIS_ORDERS) - 1} "
                    f"({', '.join(AXIS_ORDERS)})"
                )

    def reorder(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Put the tokens of each head into its order.

        Args:
            x: ``[batch, tokens, heads, head_dim]`` in the model's order.
            layout: Where video and text stand in ``x``.

        Returns:
            Same shape; a view of ``[batch, heads, tokens, head_dim]`` memory, which is what the
            carriers read fastest.
        """
        self._check(x, layout)
        if fused(x):
            return prepare(x, _places(self.heads, layout, x.device)).transpose(1, 2)
        batch, tokens, heads, dim = x.shape
        before, video = layout.text_before, layout.grid.numel
        out = x.new_empty(batch, heads, tokens, dim)
        for source, target in self._views(x, out, layout):
            target.copy_(source)
        out[:, :, video : video + before] = x[:, :before].transpose(1, 2)
        out[:, :, video + before :] = x[:, before + video :].transpose(1, 2)
        return out.transpose(1, 2)

    def restore(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Undo `reorder`: back to the model's order, contiguous ``[batch, tokens, heads, dim]``."""
        self._check(x, layout)
        if fused(x):
            return restore(x.transpose(1, 2), _places(self.heads, layout, x.device))
        before, video = layout.text_before, layout.grid.numel
        out = x.new_empty(x.shape)
        ordered = x.transpose(1, 2)
        for target, source in self._views(out, ordered, layout):
            target.copy_(source)
        out[:, :before] = x[:, video : video + before]
        out[:, before + video :] = x[:, video + before :]
        return out

    def places(self, layout: TokenLayout, device: torch.device) -> AxisPlaces:
        """This order as kernels read it; kept."""
        return _places(self.heads, layout, device)

    def _views(
        self, model: Tensor, ordered: Tensor, layout: TokenLayout
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of equally shaped views: a head's video in the model's and the ordered tensor."""
        grid, start = layout.grid, layout.text_before
        head = 0
        # Neighbouring heads of one order move in one copy.
        for order, run in itertools.groupby(self.heads):
            count = len(list(run))
            axes = _AXES[order]
            raster = model[:, start : start + grid.numel, head : head + count].unflatten(1, grid)
            flat = ordered[:, head : head + count, : grid.numel]
            yield (
                raster.permute(0, 4, *(1 + a for a in axes), 5),
                flat.unflatten(2, tuple(grid[a] for a in axes)),
            )
            head += count

    def _check(self, x: Tensor, layout: TokenLayout) -> None:
        if x.shape[1] != layout.tokens or x.shape[2] != len(self.heads):
            raise ValueError(
                f"tensor {tuple(x.shape)}: grid {layout.grid} with {layout.text} text tokens and "
                f"{len(self.heads)} head orders needs [batch, {layout.tokens}, {len(self.heads)}, "
                "head_dim]"
            )


@lru_cache(maxsize=256)
def _places(heads: tuple[int, ...], layout: TokenLayout, device: torch.device) -> AxisPlaces:
    axes = [_AXES[order] for order in heads]
    with torch.inference_mode(False):  # cached, and for calls of any mode
        return AxisPlaces.from_axes(axes, tuple(layout.grid), layout.text_before, device)


def axis_order(heads: Sequence[int] | Tensor) -> AxisOrder:
    """`AxisOrder` from any sequence of order indices, one per head."""
    return AxisOrder(tuple(int(order) for order in heads))
