"""Pooled selection: queries and keys of the call decide."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.fused import fused
from gen_accel.kernels.tail import BlockScores, block_scores
from gen_accel.layout import ForwardContext, TokenGrid, TokenLayout
from gen_accel.order.curve import CurveOrder
from gen_accel.order.raster import RasterOrder
from gen_accel.plan import default_block_size
from gen_accel.planner.base import Planned
from gen_accel.select.neighbours import block_neighbours, frame_blocks
from gen_accel.select.pooled import PooledSetting, choose_blocks, choose_lists

if TYPE_CHECKING:
    from gen_accel.hoist import Hoist


class PooledPlanner:
    """Chooses blocks from pooled queries and keys, for one order that all heads share.

    Args:
        setting: The rule.
        order: Order of all heads.
        block: Tokens per block; None takes `default_block_size`.
        layers: Number of attention modules.

    Attributes:
        hoist: Applies the order once per forward, where that is possible; None never does.
    """

    def __init__(
        self,
        setting: PooledSetting,
        order: CurveOrder | RasterOrder,
        block: int | None = None,
        layers: int = 0,
    ) -> None:
        self.setting = setting
        self.order = order
        self.block = block
        self.layers = layers
        self.hoist: Hoist | None = None
        self._context = ForwardContext()
        self._kept: dict[Any, tuple[int, Blocks]] = {}
        self._asked: Counter[Any] = Counter()

    def begin(self, context: ForwardContext) -> None:
        """Lists do not outlive a run or a grid."""
        before = self._context
        grids = [c.layout and c.layout.grid for c in (before, context)]
        # Branches of guidance may have text of different lengths, which the keys tell apart.
        if context.run != before.run or grids[0] != grids[1]:
            self._kept.clear()
        self._context = context
        self._asked.clear()

    def lookup(
        self, layer: int, layout: TokenLayout, text: int, device: torch.device, heads: slice | None
    ) -> Planned | str:
        """See `Planner.lookup`."""
        grid = layout.grid
        block = self.block or default_block_size(grid)
        # The ragged end shares its block with text, if there is any, and text is never pooled.
        pooled = grid.numel // block * block if layout.text else grid.numel
        if pooled <= block:
            return f"grid {grid} has no two blocks of {block}"

        def select(q: Tensor, k: Tensor) -> tuple[Blocks, BlockScores | None]:
            call = layer, self._context.branch, text, heads and (heads.start, heads.stop)
            # Samples with text of one length come one by one, and each has lists of its own.
            key = call, self._asked[call]
            self._asked[call] += 1
            step = self._context.step
            made, blocks = self._kept.get(key, (0, None))
            if blocks is not None and step is not None and step - made < self.setting.refresh:
                return blocks, None
            blocks, scores = self._select(q, k, grid, block, pooled)
            # Without steps nobody can tell when lists have grown old.
            if self.setting.refresh > 1 and step is not None:
                self._kept[key] = step, blocks
            return blocks, scores

        order = self.order if self.hoist is None else self.hoist.remaining
        return Planned(order, select, pooled)

    def _select(
        self, q: Tensor, k: Tensor, grid: TokenGrid, block: int, pooled: int
    ) -> tuple[Blocks, BlockScores | None]:
        setting, context = self.setting, self._context
        scale = q.shape[-1] ** -0.5
        scores = block_scores(q, k, block, block, pooled=pooled, scale=scale, parts=setting.parts)
        number = scores.video.shape[-1]
        video = BlockScores(scores.video[:, :, :number], scores.text[:, :, :number])
        progress = 0.0
        if context.step is not None and context.steps:
            progress = context.step / context.steps
        forced = None
        if setting.neighbours or setting.first_frame:
            forced = _forced(
                self.order, grid, block, setting.neighbours, setting.first_frame, q.device
            )[:number, :number]
        density = setting.density_at(progress)
        rows, columns = -(-q.shape[1] // block), -(-k.shape[1] // block)
        left = scores if setting.parts == 1 else None
        if setting.by_rank and fused(q):
            lists = choose_lists(video, setting, density, forced, rows, columns)
            return Blocks(*lists, q.shape[1], k.shape[1], block, block), left
        chosen = choose_blocks(video, setting, density, forced)
        full = torch.ones(*chosen.shape[:2], rows, columns, dtype=torch.bool, device=q.device)
        full[:, :, :number, :number] = chosen
        blocks = Blocks.from_mask(
            full,
            q_len=q.shape[1],
            kv_len=k.shape[1],
            block_size=block,
            # On a GPU the longest list is not asked for: the answer would have to be waited for.
            width=None if q.device.type == "cpu" else columns,
        )
        return blocks, left

    def watches(self, layer: int) -> bool:
        """Nothing to watch."""
        return False

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
        """Never called."""
        raise AssertionError("a pooled selection is not calibrated")


@lru_cache(maxsize=16)
def _forced(
    order: CurveOrder | RasterOrder,
    grid: TokenGrid,
    block: int,
    neighbours: bool,
    first_frame: bool,
    device: torch.device,
) -> Tensor:
    number = -(-grid.numel // block)
    forced = torch.eye(number, dtype=torch.bool, device="cpu")
    permutation = order.permutation(grid)
    if neighbours:
        forced |= torch.as_tensor(block_neighbours(permutation, grid, block), device="cpu")
    if first_frame:
        first = torch.as_tensor(frame_blocks(permutation, grid, block), device="cpu")
        forced |= first[:, None] & first
    with torch.inference_mode(False):
        return forced.to(device)
