"""Static masks: from a plan, or from what the dense first steps of a run show."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.layout import ForwardContext, TokenGrid, TokenLayout
from gen_accel.plan import AttentionPlan, ComponentPlan, PlanError
from gen_accel.planner.base import CALIBRATING, Lists, Planned
from gen_accel.recorder import Measurement, Recorder
from gen_accel.schedule import Schedule

log = logging.getLogger("gen_accel")

# Lists of 75,600 tokens and 40 heads take 55 MB a layer. Those beyond this are made anew in every
# call; throwing old ones out instead would, with layers called in turn, find none of them again.
_LIST_BYTES = 1 << 30
_LIST_SHARE = 16  # of a GPU's memory, one part, where that is more


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
        self._lists = Lists()

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
        self._lists.begin(context)
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
        if heads is not None and plan.masks.shape[1] > heads.stop - heads.start:
            plan = plan.heads(heads)
        group = self.component.group(self._sigma)
        key = layer, group, layout.text, text, device, heads and (heads.start, heads.stop)
        blocks = self._lists.get(key)
        if blocks is None:
            blocks = plan.blocks(group, layout, self.block, device, text)
            self._keep(key, blocks)
        pooled = layout.grid.numel // self.block * self.block
        return Planned(plan.orders, blocks, pooled, precision=plan.precision)

    def _keep(self, key: tuple, blocks: Blocks) -> None:
        """Keep lists while there is room; those of step groups that are over make it."""
        room = _room(blocks.device) - blocks.nbytes
        if sum(kept.nbytes for kept in self._lists.values()) > room:
            for other in [k for k in self._lists if k[1] != key[1]]:
                del self._lists[other]
        if sum(kept.nbytes for kept in self._lists.values()) <= room:
            self._lists[key] = blocks

    def watches(self, layer: int) -> bool:
        """See `Planner.watches`."""
        return self._watch is not None and layer in self._missing()

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
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


def _room(device: torch.device) -> int:
    """Bytes that lists may take."""
    if device.type != "cuda":
        return _LIST_BYTES
    return max(_LIST_BYTES, torch.cuda.get_device_properties(device).total_memory // _LIST_SHARE)
