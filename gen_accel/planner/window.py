"""Windows: geometry alone decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gen_accel.layout import ForwardContext, TokenGrid, TokenLayout
from gen_accel.order.tile import TileOrder
from gen_accel.planner.base import Lists, Planned, Windowed
from gen_accel.select.gna import gna_plan, head_windows, tile_shape
from gen_accel.select.suggest import fitting_tile, suggest
from gen_accel.select.window import Window

_BLOCK = 128  # places per tile where nothing says otherwise


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
    rim: str = "mask"

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
            rim=self.rim,
            device=device,
        )
        return Planned(order, blocks, order.places(layout.grid), _real(order, layout.grid, device))

    def check(self, layout: TokenLayout, layers: int) -> None:
        """Raise ValueError where a setting does not fit this grid; cheaper than a plan."""
        own = isinstance(self.window, Mapping)
        for layer in range(layers) if own else (0,):
            grid, window, settings, tile = self._resolve(layer, layout, None)
            windows = head_windows(grid, window, **settings)
            if not isinstance(tile, str):
                frames, height, width = (axis.dilation for axis in windows[0].axes)
                order = TileOrder(tile_shape(tile, len(grid)), (frames, height, width), self.block)
                order.places(layout.grid)

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


def _real(order: TileOrder, grid: TokenGrid, device: torch.device) -> Tensor | None:
    """Which places hold a token; None where all do."""
    real = order.coordinates(grid)[0] >= 0
    return None if real.all() else torch.from_numpy(real).to(device)


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
        min_tokens: Shorter sequences stay dense, so that nothing has to fit them.
    """

    def __init__(
        self, setting: WindowSetting, layers: int = 0, lists: bool = True, min_tokens: int = 0
    ) -> None:
        self.setting = setting
        self.layers = layers
        self.lists = lists
        self.min_tokens = min_tokens
        self._planned = Lists()
        self._checked: TokenGrid | None = None

    def begin(self, context: ForwardContext) -> None:
        """Forget the lists of another grid, and of other prompts.

        Raises:
            ValueError: A setting does not fit the grid: now, not behind the dense steps.
        """
        self._planned.begin(context)
        layout = context.layout
        if layout is None or layout.grid == self._checked or layout.tokens < self.min_tokens:
            return
        self.setting.check(layout, self.layers)
        self._checked = layout.grid

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

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
        """Never called."""
        raise AssertionError("a window is not calibrated")
