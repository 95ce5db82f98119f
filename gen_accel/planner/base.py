"""What an engine asks: which order, which blocks, or why a call has to be dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.tail import BlockScores
from gen_accel.layout import ForwardContext, TokenLayout
from gen_accel.precision import HeadPrecisions
from gen_accel.select.window import Window

CALIBRATING = "calibrating"

Select = Callable[[Tensor, Tensor], tuple[Blocks, BlockScores | None]]


class Order(Protocol):
    """A token order: `AxisOrder`, `TileOrder`, `CurveOrder`."""

    def reorder(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """From the model's order."""

    def restore(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Back to it."""


class Planned(NamedTuple):
    """What a sparse call executes.

    Attributes:
        order: Token order.
        blocks: Block lists of the ordered sequence, or the function that chooses them from its
            queries and keys (and the scores it chose by).
        pooled: How many keys, counted from the first of the ordered sequence, lie in blocks that
            may be hidden, which is what a tail can stand in for. The others are seen by all.
        real: bool ``[pooled]``, those of them that exist; None: all.
        precision: Of each head of the call, or None: the processor says.
    """

    order: Order
    blocks: Blocks | Select
    pooled: int
    real: Tensor | None = None
    precision: HeadPrecisions | None = None


class Windowed(NamedTuple):
    """What a library executes that takes windows themselves.

    Attributes:
        windows: The window of every head; one when they share it.
        density: Kept share of all keys.
    """

    windows: list[Window]
    density: float


class Lists(dict[Any, Any]):
    """What a planner made for one grid, kept while runs ask for the text lengths of those before.

    Every length has lists of its own; those of all prompts ever seen would fill the memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._layouts: set[TokenLayout] = set()
        self._run = -1

    def begin(self, context: ForwardContext) -> None:
        """Once per forward: let go of what belongs to another grid, or to other prompts."""
        layout, run = context.layout, context.run
        if layout is None:
            return
        other_grid = any(known.grid != layout.grid for known in self._layouts)
        if other_grid or (run != self._run and layout not in self._layouts):
            self.clear()
            self._layouts.clear()
            self._run = run
        self._layouts.add(layout)


class Planner(Protocol):
    """Decides for one transformer; an `Engine` asks it and executes.

    Attributes:
        layers: Number of attention modules.
    """

    layers: int

    def begin(self, context: ForwardContext) -> None:
        """Once per forward of the transformer."""

    def lookup(
        self, layer: int, layout: TokenLayout, text: int, device: torch.device, heads: slice | None
    ) -> Planned | Windowed | str:
        """What to execute, or why the call has to be dense.

        Args:
            layer: Layer index.
            layout: Layout of the call.
            text: Text tokens that are attended to (padding left out).
            device: Where the lists are needed.
            heads: Which of the layer's heads the call has, when they are sharded.
        """

    def watches(self, layer: int) -> bool:
        """Whether it wants to see the dense calls of this layer in this forward."""

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
        """See a dense call it watches.

        Args:
            layer: Layer index.
            q: ``[batch, tokens, heads, head_dim]``, in the model's order.
            k: Same, cut behind the last valid text token.
            v: Shape of k.
            layout: Layout of the call.
        """
