"""Executes the attention calls of one transformer: dense, watched, or from the plan."""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.kernels.api import block_sparse_attention
from gen_accel.kernels.blocks import Blocks
from gen_accel.layout import ForwardContext, TokenGrid, TokenLayout, Unsupported
from gen_accel.plan import AttentionPlan, ComponentPlan, LayerPlan, PlanError
from gen_accel.recorder import Measurement, Recorder
from gen_accel.schedule import Schedule

log = logging.getLogger("gen_accel")

CALIBRATING = "calibrating"
_engines: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@dataclass
class RunStats:
    """What one pipeline call did in one transformer.

    Attributes:
        sparse: Number of sparse attention calls.
        dense: Reason -> number of calls that stayed dense for it.
        density: ``(step, layer)`` -> kept share of all blocks of that call, text included.
        seconds: Time in ``"dense"``, ``"sparse"`` (order, carrier, inverse) and ``"calibrate"``.
            Without ``profile=True`` only CPU calls are timed: a GPU would have to be synchronised.
        carrier: Implementation that ran the sparse calls, or "".
    """

    sparse: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    density: dict[tuple[int | None, int], float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    carrier: str = ""

    @property
    def mean_density(self) -> float:
        """Mean density over the sparse calls; 1.0 when there were none."""
        return sum(self.density.values()) / len(self.density) if self.density else 1.0


class Engine:
    """Runs the attention of one transformer by a schedule and a plan.

    Args:
        name: Component name in the pipeline, e.g. ``"transformer"``.
        model: Model string, see `ComponentPlan.model`.
        layers: Number of attention modules it serves.
        schedule: Which calls stay dense.
        measurement: How to calibrate when there is no plan.
        layout_of: Family's layout function.
        plan: Plan to execute, or None to calibrate during the dense first steps.
        scheduler: Returns the pipeline's scheduler, or None for a bare transformer.
        precision: Numbers the carrier computes in.
        impl: Carrier.
        profile: Synchronise the device around calls so that `RunStats.seconds` holds on GPUs.
    """

    def __init__(
        self,
        *,
        name: str,
        model: str,
        layers: int,
        schedule: Schedule,
        measurement: Measurement,
        layout_of: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], TokenLayout] | None,
        plan: AttentionPlan | None = None,
        scheduler: Callable[[], Any] | None = None,
        precision: str = "auto",
        impl: str = "auto",
        profile: bool = False,
    ) -> None:
        self.name = name
        self.model = model
        self.layers = layers
        self.schedule = schedule
        self.measurement = measurement
        self.given = plan
        self.precision = precision
        self.impl = impl
        self.profile = profile
        self.context = ForwardContext()
        self.stats = RunStats()
        # Overridden by gen_accel.calibrate, which watches whole dense runs.
        self.observer: Callable[[int, Tensor, Tensor, TokenLayout], None] | None = None
        self._layout_of = layout_of
        self._scheduler = scheduler
        self._timesteps: Any = None
        self._reason: str | None = None
        self._watch: str | None = None
        self._recorder: Recorder | None = None
        self._made: dict[TokenGrid, tuple[Recorder, ComponentPlan]] = {}
        self._blocks: dict[Any, tuple[Blocks, float]] = {}
        self._said: set[str] = set()
        self.number = next(_numbers)
        _engines[self.number] = self

    # -- once per forward ----------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the transformer: where and when are we, and what follows from it."""
        previous = self.context
        context = ForwardContext(run=previous.run)
        try:
            assert self._layout_of is not None
            context.layout = self._layout_of(module, args, kwargs)
        except Unsupported as reason:
            context.reason = str(reason)
        scheduler = self._scheduler() if self._scheduler is not None else None
        if scheduler is not None and getattr(scheduler, "timesteps", None) is not None:
            context.step = _step_index(scheduler)
            context.steps = len(scheduler.timesteps)
            sigmas = getattr(scheduler, "sigmas", None)
            if sigmas is not None and context.step < len(sigmas):
                context.sigma = float(sigmas[context.step])
            # set_timesteps() makes a new tensor: the one sign of a new run all pipelines share.
            fresh = scheduler.timesteps is not self._timesteps
            self._timesteps = scheduler.timesteps
        else:
            context.sigma = _timestep(args, kwargs) / 1000
            fresh = previous.sigma is None or context.sigma > previous.sigma
        if fresh:
            context.run += 1
            self.stats = RunStats()
        elif (context.step, context.sigma) == (previous.step, previous.sigma):
            context.branch = previous.branch + 1
        self.context = context
        self._reason = self.schedule.step_reason(context)
        self._say_reason()
        self._prepare(new_step=context.branch == 0)

    def _prepare(self, new_step: bool) -> None:
        """Bring the plan for this grid, or decide what this forward has to show for one."""
        self._watch = None
        layout = self.context.layout
        if layout is None or layout.tokens < self.schedule.min_tokens:
            return
        if self.given is not None:
            self._check_given(layout.grid)
            return
        if self._recorder is None or self._recorder.grid != layout.grid:
            self._switch_grid(layout)
        assert self._recorder is not None
        if new_step:
            self._finish_layers()
        step, steps = self.context.step, self.context.steps
        if not self._missing():
            return
        if self._reason is None:
            self._watch = "mass"
        elif step is not None and steps is not None:
            # The last dense step is the one most like the steps the masks are for.
            last = self.schedule.dense_step_count(steps) - 1
            self._watch = {last: "mass", last - 1: "orders"}.get(step)

    def _check_given(self, grid: TokenGrid) -> None:
        assert self.given is not None
        if self.given.grid != grid:
            raise PlanError(
                f"plan was made for grid {self.given.grid}, this run has {grid}: calibrate at this "
                "resolution and frame count, or leave plan=None to calibrate during the run"
            )

    def _switch_grid(self, layout: TokenLayout) -> None:
        if self._recorder is not None and layout.grid not in self._made:
            log.info(
                "%s: grid %s instead of %s, calibrating again",
                self.name,
                layout.grid,
                self._recorder.grid,
            )
        if layout.grid not in self._made:
            component = ComponentPlan(self.model, sigmas=(0.0,))
            self._made[layout.grid] = Recorder(layout, self.measurement), component
        self._recorder = self._made[layout.grid][0]
        self._blocks.clear()

    def _finish_layers(self) -> None:
        assert self._recorder is not None
        for layer in self._missing():
            if self._recorder.observed(layer):
                self.component.layers[layer] = self._recorder.layer_plan(layer)

    def _missing(self) -> list[int]:
        """Layers that will run sparse and have no plan yet."""
        return [
            layer
            for layer in range(self.layers)
            if layer not in self.component.layers
            and not self.schedule.is_dense_layer(layer, self.layers)
        ]

    # -- once per attention call ---------------------------------------------------------------

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int | Tensor,
        backend: Any = None,
        heads: slice | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of one module.

        Args:
            q: ``[batch, tokens, heads, head_dim]``, RoPE applied, tokens in the model's order.
            k: Same shape.
            v: Same shape.
            layer: Index of the module, an integer or a tensor of one on the CPU.
            backend: diffusers attention backend of the dense calls.
            heads: Which heads of the layer these are, when they are sharded.
            mask: The stock processor's mask; used only when the layout is unknown.
        """
        if torch.compiler.is_compiling():
            # Opaque to the compiler: no graph break, and no recompilation when the step changes.
            start, stop = (heads.start, heads.stop) if heads is not None else (-1, -1)
            name = None if backend is None else str(getattr(backend, "value", backend))
            number = torch.as_tensor(layer)
            return _attend_op(q, k, v, mask, number, self.number, name, start, stop)
        layer = int(layer)
        layout = self.context.layout
        if layout is not None and layout.tokens != q.shape[1]:
            layout = None
            self._dense(layer, f"{q.shape[1]} tokens do not match the token grid")
        if layout is None:
            self._dense(layer, self._reason or self.context.reason)
            return _dense_attention(q, k, v, backend, mask)
        valid = layout.text_valid or (layout.text_after,)
        if len(set(valid)) == 1:
            return self._attend(q, k, v, layer, backend, heads, layout, valid[0])
        # Prompts of different lengths in one batch: each sees its own text, and no mask is needed.
        return torch.cat(
            [
                self._attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], layer, backend, heads,
                             layout, text)
                for i, text in enumerate(valid)
            ]
        )  # fmt: skip

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        backend: Any,
        heads: slice | None,
        layout: TokenLayout,
        text_after: int,
    ) -> Tensor:
        keys = layout.tokens - layout.text_after + text_after
        reason = self._reason
        if reason is None and self.schedule.is_dense_layer(layer, self.layers):
            reason = "dense layer"
        if reason is None and layer not in self.component.layers:
            reason = CALIBRATING if self.given is None else "layer not in the plan"
        if reason is None:
            plan = self.component.layers[layer]
            return self._sparse(
                q, k, v, layer, plan, heads, layout, layout.text_before + text_after
            )
        self._dense(layer, reason)
        k, v = k[:, :keys], v[:, :keys]
        self._observe(layer, q, k, layout)
        started = self._clock(q)
        out = _dense_attention(q, k, v, backend)
        self._spend("dense", started, q)
        return out

    def _sparse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        plan: LayerPlan,
        heads: slice | None,
        layout: TokenLayout,
        text: int,
    ) -> Tensor:
        started = self._clock(q)
        if heads is not None and len(plan.orders.heads) != q.shape[2]:
            plan = plan.heads(heads)
        group = self.component.group(self.context.sigma)
        key = (layer, group, text, layout.text, q.device, heads and (heads.start, heads.stop))
        if key not in self._blocks:
            lists = plan.blocks(group, layout, self.block, q.device, text)
            self._blocks[key] = lists, lists.density()
        blocks, density = self._blocks[key]
        order = plan.orders
        q, k, v = (order.reorder(x, layout) for x in (q, k, v))
        k, v = k[:, : blocks.kv_len], v[:, : blocks.kv_len]
        out = block_sparse_attention(q, k, v, blocks, precision=self.precision, impl=self.impl)
        out = order.restore(out, layout)
        self._spend("sparse", started, q)
        self.stats.sparse += 1
        self.stats.density[self.context.step, layer] = density
        return out

    # -- book-keeping --------------------------------------------------------------------------

    @property
    def component(self) -> ComponentPlan:
        """The plan of this transformer for the current grid; its layers fill while calibrating."""
        if self.given is not None:
            return self.given.components[self.name]
        assert self._recorder is not None
        return self._made[self._recorder.grid][1]

    def made(self) -> ComponentPlan | None:
        """The plan this engine made for the current grid; None until every layer has one."""
        if self._recorder is None:
            return None
        self._finish_layers()
        return None if self._missing() else self.component

    @property
    def recorder(self) -> Recorder | None:
        """The recorder of the current grid, or None before the first forward."""
        return self._recorder

    @property
    def block(self) -> int:
        """Tokens per block of the current plan."""
        if self.given is not None:
            return self.given.block
        assert self._recorder is not None
        return self._recorder.block

    def enter(self, context: ForwardContext) -> None:
        """Set the context by hand: for a processor that was put on a module without the hook."""
        self.context = context
        self._reason = self.schedule.step_reason(context)
        self._say_reason()
        self._prepare(new_step=True)

    def _observe(self, layer: int, q: Tensor, k: Tensor, layout: TokenLayout) -> None:
        if self.observer is not None:
            self.observer(layer, q, k, layout)
            return
        if self._watch is None or self._recorder is None or layer not in self._missing():
            return
        before = self._recorder.seconds
        if self._watch == "orders":
            self._recorder.observe_orders(layer, q, k, layout)
        else:
            self._recorder.observe_mass(layer, q, k, layout)
        self._add_seconds("calibrate", self._recorder.seconds - before)

    def _dense(self, layer: int, reason: str) -> None:
        self.stats.dense[reason] = self.stats.dense.get(reason, 0) + 1

    def _say_reason(self) -> None:
        """Log once why whole forwards stay dense, unless the schedule asked for it."""
        reason = self._reason
        if reason is None or "of the steps" in reason or reason in self._said:
            return
        self._said.add(reason)
        log.warning("%s: attention stays dense: %s", self.name, reason)

    def _clock(self, x: Tensor) -> float | None:
        if x.device.type == "cpu":
            return time.perf_counter()
        if not self.profile:
            return None
        torch.accelerator.synchronize()
        return time.perf_counter()

    def _spend(self, part: str, started: float | None, x: Tensor) -> None:
        if started is None:
            return
        if x.device.type != "cpu":
            torch.accelerator.synchronize()
        self._add_seconds(part, time.perf_counter() - started)

    def _add_seconds(self, part: str, seconds: float) -> None:
        self.stats.seconds[part] = self.stats.seconds.get(part, 0.0) + seconds


def _dense_attention(
    q: Tensor, k: Tensor, v: Tensor, backend: Any, mask: Tensor | None = None
) -> Tensor:
    """The baseline's own dense kernel, or a comparison with the baseline would mean nothing."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)


def _step_index(scheduler: Any) -> int:
    """Index of the coming step: None before the first one, which image-to-image may start late."""
    for name in ("step_index", "begin_index"):
        index = getattr(scheduler, name, None)
        if index is not None:
            return int(index)
    return 0


def _timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Timestep of a forward, for a transformer without a pipeline; one device sync per forward."""
    value = kwargs.get("timestep", args[1] if len(args) > 1 else 0.0)
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)


@torch.library.custom_op("gen_accel::attend", mutates_args=())
def _attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
    engine: int,
    backend: str | None,
    start: int,
    stop: int,
) -> Tensor:
    heads = None if start < 0 else slice(start, stop)
    out = _engines[engine].attend(q, k, v, layer=layer, backend=backend, heads=heads, mask=mask)
    return out.contiguous()


@_attend_op.register_fake
def _(q, k, v, mask, layer, engine, backend, start, stop):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format)
