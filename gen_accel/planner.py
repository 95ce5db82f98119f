"""Where an engine's orders and block lists come from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.layout import ForwardContext, TokenGrid, TokenLayout
from gen_accel.plan import AttentionPlan, ComponentPlan, PlanError
from gen_accel.recorder import Measurement, Recorder
from gen_accel.schedule import Schedule
from gen_accel.select.gna import gna_plan, head_windows
from gen_accel.select.suggest import fitting_tile, suggest
from gen_accel.select.window import Window

log = logging.getLogger("gen_accel")

CALIBRATING = "calibrating"
_BLOCK = 128  # places per tile where nothing says otherwise


class Order(Protocol):
    """A token order: `AxisOrder`, `TileOrder`."""

    def reorder(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """From the model's order."""

    def restore(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Back to it."""


class Planned(NamedTuple):
    """What a sparse call executes.

    Attributes:
        order: Token order.
        blocks: Block lists of the ordered sequence.
        density: Kept share of all blocks, text included.
    """

    order: Order
    blocks: Blocks
    density: float


class Windowed(NamedTuple):
    """What a library executes that takes windows themselves.

    Attributes:
        windows: The window of every head; one when they share it.
        density: Kept share of all keys.
    """

    windows: list[Window]
    density: float


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

    def observe(self, layer: int, q: Tensor, k: Tensor, layout: TokenLayout) -> None:
        """See a dense call it watches.

        Args:
            layer: Layer index.
            q: ``[batch, tokens, heads, head_dim]``, in the model's order.
            k: Same, cut behind the last valid text token.
            layout: Layout of the call.
        """


class CalibratedPlanner:
    """Static masks: from a given plan, or from what the dense first steps of the run show.

    Args:
        name: Component name in the pipeline, e.g. ``"transformer"``.
        model: Model string, see `ComponentPlan.model`.
        layers: Number of attention modules.
        schedule: Which calls stay dense.
        measurement: How to calibrate.
        given: Plan to execute; None calibrates.
    """

    def __init__(
        self,
        name: str,
        model: str,
        layers: int,
        schedule: Schedule,
        measurement: Measurement,
        given: AttentionPlan | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.layers = layers
        self.schedule = schedule
        self.measurement = measurement
        self.given = given
        self.recorder: Recorder | None = None
        self._sigma: float | None = None
        self._watch: str | None = None
        self._made: dict[TokenGrid, tuple[Recorder, ComponentPlan]] = {}
        self._lists: dict[Any, tuple[Blocks, float]] = {}

    @property
    def component(self) -> ComponentPlan:
        """The plan of this transformer for the current grid; its layers fill while calibrating."""
        if self.given is not None:
            return self.given.components[self.name]
        assert self.recorder is not None
        return self._made[self.recorder.grid][1]

    @property
    def block(self) -> int:
        """Tokens per block."""
        if self.given is not None:
            return self.given.block
        assert self.recorder is not None
        return self.recorder.block

    def begin(self, context: ForwardContext) -> None:
        """Bring the plan for this grid, or decide what this forward has to show for one."""
        self._watch = None
        self._sigma = context.sigma
        layout = context.layout
        if layout is None or layout.tokens < self.schedule.min_tokens:
            return
        if self.given is not None:
            self._check_given(layout.grid)
            return
        if self.recorder is None or self.recorder.grid != layout.grid:
            self._switch_grid(layout)
        if context.branch == 0:
            self._finish_layers()
        if not self._missing():
            return
        if self.schedule.step_reason(context) is None:
            self._watch = "mass"
        elif context.step is not None and context.steps is not None:
            # The last dense step is the one most like the steps the masks are for.
            last = self.schedule.dense_step_count(context.steps) - 1
            self._watch = {last: "mass", last - 1: "orders"}.get(context.step)

    def lookup(
        self, layer: int, layout: TokenLayout, text: int, device: torch.device, heads: slice | None
    ) -> Planned | str:
        """See `Planner.lookup`."""
        plan = self.component.layers.get(layer)
        if plan is None:
            return CALIBRATING if self.given is None else "layer not in the plan"
        # A rank that calibrated for itself knows only its own heads.
        if heads is not None and len(plan.orders.heads) > heads.stop - heads.start:
            plan = plan.heads(heads)
        group = self.component.group(self._sigma)
        key = layer, group, layout.text, text, device, heads and (heads.start, heads.stop)
        if key not in self._lists:
            lists = plan.blocks(group, layout, self.block, device, text)
            self._lists[key] = lists, lists.density()
        return Planned(plan.orders, *self._lists[key])

    def watches(self, layer: int) -> bool:
        """See `Planner.watches`."""
        return self._watch is not None and layer in self._missing()

    def observe(self, layer: int, q: Tensor, k: Tensor, layout: TokenLayout) -> None:
        """See `Planner.observe`."""
        assert self.recorder is not None
        if self._watch == "orders":
            self.recorder.observe_orders(layer, q, k, layout)
        else:
            self.recorder.observe_mass(layer, q, k, layout)

    def made(self) -> ComponentPlan | None:
        """The plan that was made for the current grid; None until every layer has one."""
        if self.recorder is None:
            return None
        self._finish_layers()
        return None if self._missing() else self.component

    def _check_given(self, grid: TokenGrid) -> None:
        assert self.given is not None
        if self.given.grid != grid:
            raise PlanError(
                f"plan was made for grid {self.given.grid}, this run has {grid}: calibrate at this "
                "resolution and frame count, or leave plan=None to calibrate during the run"
            )

    def _switch_grid(self, layout: TokenLayout) -> None:
        if layout.grid not in self._made:
            if self.recorder is not None:
                old, new = self.recorder.grid, layout.grid
                log.info("%s: grid %s instead of %s, calibrating again", self.name, new, old)
            component = ComponentPlan(self.model, sigmas=(0.0,))
            self._made[layout.grid] = Recorder(layout, self.measurement), component
        self.recorder = self._made[layout.grid][0]
        self._lists.clear()

    def _finish_layers(self) -> None:
        assert self.recorder is not None
        for layer in self._missing():
            if self.recorder.observed(layer):
                self.component.layers[layer] = self.recorder.layer_plan(layer)

    def _missing(self) -> list[int]:
        """Layers that will run sparse and have no plan yet."""
        return [
            layer
            for layer in range(self.layers)
            if layer not in self.component.layers
            and not self.schedule.is_dense_layer(layer, self.layers)
        ]


@dataclass(frozen=True)
class WindowSetting:
    """A window for any grid; see `gen_accel.GnaProcessor` for the fields."""

    window: Any = "auto"
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    causal: bool | Sequence[bool] = False
    density: float = 0.25
    tile: str | Sequence[int] = "auto"
    block: int | None = None
    border: str = "shift"

    def plan(
        self,
        layer: int,
        layout: TokenLayout,
        text: int,
        device: torch.device,
        heads: slice | None = None,
    ) -> Planned:
        """Order and block lists of one layer; arguments as `Planner.lookup`."""
        grid, window, settings, tile = self._resolve(layer, layout, heads)
        order, blocks = gna_plan(
            grid,
            window,
            **settings,
            tile=tile,
            block=self.block,
            border=self.border,
            text=layout.text,
            text_keys=text,
            device=device,
        )
        return Planned(order, blocks, blocks.density())

    def windows(self, layer: int, layout: TokenLayout, heads: slice | None = None) -> Windowed:
        """The windows of one layer; arguments as `Planner.lookup`."""
        grid, window, settings, _ = self._resolve(layer, layout, heads)
        windows = head_windows(grid, window, **settings)
        return Windowed(windows, sum(w.density for w in windows) / len(windows))

    def _resolve(
        self, layer: int, layout: TokenLayout, heads: slice | None
    ) -> tuple[tuple[int, ...], Any, dict[str, Any], Any]:
        """Grid, window, its other settings and the tile, as `gna_plan` takes them."""
        window: Any = self.window
        if isinstance(window, Mapping):
            window = window.get(layer, "auto")
        settings: dict[str, Any] = {
            "stride": self.stride,
            "dilation": self.dilation,
            "causal": self.causal,
        }
        per_head = isinstance(window, Sequence) and not isinstance(window, str)
        per_head = per_head and isinstance(window[0], Window)
        grid: tuple[int, ...] = tuple(layout.grid)
        # An image has no frames to look over, so two numbers or one describe its window.
        if grid[0] == 1 and not any(_axes(x) == 3 for x in (window, *settings.values(), self.tile)):
            grid = grid[1:]
        tile: Any = self.tile
        if isinstance(window, str):
            if tile == "auto":
                tile = fitting_tile(grid, self.block or _BLOCK, self.border)
            window, settings = suggest(grid, self.density, tile, border=self.border)[0], {}
        elif per_head:
            window, settings = window[heads] if heads is not None else window, {}
        return grid, window, settings, tile


def _axes(setting: Any) -> int:
    """Number of axes a setting speaks of, 0 where it speaks of all alike."""
    if isinstance(setting, Sequence) and not isinstance(setting, str) and len(setting):
        return len(setting[0].grid) if isinstance(setting[0], Window) else len(setting)
    return len(setting.grid) if isinstance(setting, Window) else 0


class WindowPlanner:
    """Windows: geometry alone decides.

    Args:
        setting: The window.
        layers: Number of attention modules.
        lists: False hands out the windows themselves instead of block lists.
    """

    def __init__(self, setting: WindowSetting, layers: int = 0, lists: bool = True) -> None:
        self.setting = setting
        self.layers = layers
        self.lists = lists
        self._grid: TokenGrid | None = None
        self._planned: dict[Any, Planned | Windowed] = {}

    def begin(self, context: ForwardContext) -> None:
        """Forget the lists of another grid."""
        if context.layout is not None and context.layout.grid != self._grid:
            self._grid = context.layout.grid
            self._planned.clear()

    def lookup(
        self, layer: int, layout: TokenLayout, text: int, device: torch.device, heads: slice | None
    ) -> Planned | Windowed | str:
        """See `Planner.lookup`."""
        # Layers share their lists unless each has a window of its own.
        own = layer if isinstance(self.setting.window, Mapping) else None
        key = own, layout.text, text, device, heads and (heads.start, heads.stop)
        if key not in self._planned:
            self._planned[key] = (
                self.setting.plan(layer, layout, text, device, heads)
                if self.lists
                else self.setting.windows(layer, layout, heads)
            )
        return self._planned[key]

    def watches(self, layer: int) -> bool:
        """Nothing to watch."""
        return False

    def observe(self, layer: int, q: Tensor, k: Tensor, layout: TokenLayout) -> None:
        """Never called."""
        raise AssertionError("a window is not calibrated")
