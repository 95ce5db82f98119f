"""Watches dense attention calls and turns what it saw into layer plans."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gen_accel.kernels.mass import block_mass, order_statistics
from gen_accel.layout import TokenLayout
from gen_accel.order.axis import RASTER, AxisOrder, axis_order, axis_permutation, candidate_orders
from gen_accel.order.curve import CurveOrder
from gen_accel.plan import BLOCK_SIZES, LayerPlan, default_block_size
from gen_accel.select.static import keep_blocks, paper_eps, score_by_mass, score_by_paper

CRITERIA = ("mass", "paper")
ORDERS = ("axis", "raster", "curve")
_ORDER_ROWS = 1024  # enough to tell orders apart: see docs/paro.md


@dataclass(frozen=True)
class Measurement:
    """How orders and masks are measured.

    Args:
        density: Share of the video-to-video blocks to keep, in (0, 1].
        block: Tokens per block, 16, 32, 64 or 128; None picks `default_block_size`.
        order: ``"axis"``, an axis order per head is measured too; ``"raster"`` or ``"curve"``, all
            heads have that one.
        criterion: ``"mass"`` keeps the order whose heaviest blocks hold the most softmax mass;
            ``"paper"`` is PAROAttention's score.
        rows_per_block: Query rows sampled per block when masses are measured; None takes all.
    """

    density: float = 0.3
    block: int | None = None
    order: str = "axis"
    criterion: str = "mass"
    rows_per_block: int | None = 16

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(
                f"density={self.density}: the kept share lies in (0, 1]; 0.3 keeps 30 % of them"
            )
        if self.order not in ORDERS:
            raise ValueError(
                f"order={self.order!r}: static masks stand in one of "
                f"{', '.join(map(repr, ORDERS))}; windows have tile order"
            )
        if self.block is not None and self.block not in BLOCK_SIZES:
            raise ValueError(
                f"block={self.block}: choose one of {', '.join(map(str, BLOCK_SIZES))}, or None"
            )
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion={self.criterion!r}: choose {' or '.join(CRITERIA)}")
        if self.rows_per_block is not None and self.rows_per_block < 1:
            raise ValueError(
                f"rows_per_block={self.rows_per_block}: sample at least one row, or None for all"
            )


class Recorder:
    """Measures one transformer on one token grid.

    First an order per head from the scores seen so far, then block masses in that order; a layer
    whose masses are observed before any score takes its order from that same call.

    Args:
        layout: Token layout of the calls; its grid is fixed, its text may vary.
        measurement: What to measure, and how.
        groups: Number of step groups with masks of their own.
    """

    def __init__(self, layout: TokenLayout, measurement: Measurement, groups: int = 1) -> None:
        self.grid = layout.grid
        self.measurement = measurement
        self.groups = groups
        self.block = measurement.block or default_block_size(self.grid)
        self.blocks = self.grid.numel // self.block
        if self.blocks < 2:
            raise ValueError(
                f"block={self.block}: grid {self.grid} has {self.grid.numel} tokens and needs at "
                "least two blocks; choose a smaller block"
            )
        axis = measurement.order == "axis"
        self.candidates = candidate_orders(self.grid) if axis else (RASTER,)
        self.seconds = 0.0
        self.calls = 0
        self._scores: dict[int, Tensor] = {}
        self._orders: dict[int, AxisOrder | CurveOrder] = {}
        self._mass: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}

    def observed(self, layer: int) -> bool:
        """Whether the masses of this layer were seen."""
        return layer in self._mass

    def observe_orders(self, layer: int, q: Tensor, k: Tensor, layout: TokenLayout) -> None:
        """Score the candidate orders of each head.

        Args:
            layer: Layer index.
            q: ``[batch, tokens, heads, head_dim]`` in the model's order.
            k: Same, cut behind the last valid text token.
            layout: Where video and text stand.
        """
        if len(self.candidates) == 1:
            return
        started = time.perf_counter()
        q, k = video_first(q, layout), video_first(k, layout)
        video = self.grid.numel
        permutations = torch.stack([axis_permutation(self.grid, o) for o in self.candidates])
        # Random rows: evenly spaced ones would alias with the width of the grid.
        generator = torch.Generator("cpu").manual_seed(layer)
        rows = torch.randperm(video, generator=generator, device="cpu")[:_ORDER_ROWS].sort().values
        by_mass = self.measurement.criterion == "mass"
        stats = order_statistics(
            q,
            k,
            permutations.to(q.device),
            block=self.block,
            rows=rows.to(q.device),
            eps=None if by_mass else paper_eps(video),
        )
        density = self.measurement.density
        score = score_by_mass(stats, density) if by_mass else score_by_paper(stats)
        self._require_finite(layer, score)
        self._scores[layer] = self._scores.get(layer, 0) + score.cpu()
        self.seconds += time.perf_counter() - started

    def observe_mass(
        self, layer: int, q: Tensor, k: Tensor, layout: TokenLayout, group: int = 0
    ) -> None:
        """Add the block masses of one call, in each head's order. Arguments as `observe_orders`."""
        if layer not in self._orders:
            if layer not in self._scores:
                self.observe_orders(layer, q, k, layout)
            self._orders[layer] = self._choose(layer, q.shape[2])
        started = time.perf_counter()
        order = self._orders[layer]
        mass = block_mass(
            order.reorder(q, layout),
            reorder_keys(order, k, layout),
            block=self.block,
            blocks=self.blocks,
            rows_per_block=self.measurement.rows_per_block,
        )
        self._require_finite(layer, mass)
        if layer not in self._mass:
            # Whatever the defaults are.
            exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
            self._mass[layer] = torch.zeros(self.groups, *mass.shape, **exact)
            self._seen[layer] = torch.zeros(self.groups, **exact)
        self._mass[layer][group] += mass.cpu()
        self._seen[layer][group] += 1
        self.calls += 1
        self.seconds += time.perf_counter() - started

    def layer_plan(self, layer: int) -> LayerPlan:
        """The plan of a layer from everything observed; its masses are released."""
        seen, mass = self._seen.pop(layer), self._mass.pop(layer)
        # A group without observations (fewer steps than groups) takes its neighbour's masses.
        filled = [min(seen.nonzero().flatten().tolist(), key=lambda g: abs(g - i)) for i in
                  range(self.groups)]  # fmt: skip
        masks, kept = [], []
        for group in filled:
            mean = mass[group] / seen[group]
            keep = keep_blocks(mean, self.measurement.density)
            masks.append(keep)
            # What is not reported (text, the ragged tail) is always kept.
            kept.append(1.0 - float((mean * ~keep).sum(-1).mean()))
        return LayerPlan(self._orders[layer], torch.stack(masks), tuple(kept))

    def _choose(self, layer: int, heads: int) -> AxisOrder | CurveOrder:
        if self.measurement.order == "curve":
            return CurveOrder()
        if len(self.candidates) == 1:
            return axis_order([self.candidates[0]] * heads)
        best = self._scores[layer].argmax(-1)
        return axis_order([self.candidates[i] for i in best])

    @staticmethod
    def _require_finite(layer: int, value: Tensor) -> None:
        if not math.isfinite(float(value.sum())):
            raise ValueError(
                f"layer {layer}: its queries or keys contain NaN or infinity, so nothing can be "
                "measured; check the model's dtype (bf16 or fp32 instead of fp16) and its inputs"
            )


def video_first(x: Tensor, layout: TokenLayout) -> Tensor:
    """The text in front of the video put behind it."""
    if not layout.text_before:
        return x
    end = layout.text_before + layout.grid.numel
    return torch.cat([x[:, layout.text_before : end], x[:, : layout.text_before], x[:, end:]], 1)


def reorder_keys(order: AxisOrder | CurveOrder, k: Tensor, layout: TokenLayout) -> Tensor:
    """Reorder keys that were cut behind the last valid text token."""
    cut = layout.tokens - k.shape[1]
    return order.reorder(k, TokenLayout(layout.grid, layout.text_before, layout.text_after - cut))
