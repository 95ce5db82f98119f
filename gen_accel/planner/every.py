"""No selection: every block is seen, by the carrier instead of the baseline's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.layout import ForwardContext, TokenLayout
from gen_accel.order.raster import RasterOrder
from gen_accel.plan import default_block_size
from gen_accel.planner.base import Lists, Planned


class EveryPlanner:
    """Hands out lists that hold all blocks.

    Args:
        block: Tokens per block; None takes `default_block_size`.
        layers: Number of attention modules.
    """

    def __init__(self, block: int | None = None, layers: int = 0) -> None:
        self.block = block
        self.layers = layers
        self._made = Lists()

    def begin(self, context: ForwardContext) -> None:
        """Forget the lists of another grid, and of other prompts."""
        self._made.begin(context)

    def lookup(
        self, layer: int, layout: TokenLayout, text: int, device: torch.device, heads: slice | None
    ) -> Planned:
        """See `Planner.lookup`."""
        key = layout.text, text, device
        if key not in self._made:
            block = self.block or default_block_size(layout.grid)
            keys = layout.grid.numel + text
            shape = 1, 1, -(-layout.tokens // block), -(-keys // block)
            full = torch.ones(shape, dtype=torch.bool, device=device)
            self._made[key] = Blocks.from_mask(
                full, q_len=layout.tokens, kv_len=keys, block_size=block
            )
        return Planned(RasterOrder(), self._made[key], 0)

    def watches(self, layer: int) -> bool:
        """Nothing to watch."""
        return False

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
        """Never called."""
        raise AssertionError("nothing is calibrated where everything is seen")
