"""Calibrate offline: watch whole dense runs and write a plan with masks for every part of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gen_accel.engine import Engine
from gen_accel.install import apply, provenance
from gen_accel.layout import ForwardContext, TokenLayout
from gen_accel.plan import AttentionPlan, ComponentPlan
from gen_accel.planner.base import CALIBRATING, Planned
from gen_accel.precision import CHEAPEST, PrecisionMeter
from gen_accel.processors import ParoProcessor
from gen_accel.recorder import Measurement, Recorder, reorder_keys

PAPER = "paper"


def step_groups(steps: int, dense: int, groups: int | str) -> list[int | None]:
    """Which masks each denoising step contributes to and uses.

    Args:
        steps: Number of denoising steps.
        dense: How many of them run dense at the beginning; they need no masks.
        groups: Number of equal groups, or ``"paper"``: each step of the first half of the run has
            masks of its own, the second half shares one set (PAROAttention, section 4).

    Returns:
        For each step its group, or None where it is dense.
    """
    sparse = steps - dense
    if groups == PAPER:
        own = [max(0, min(step, (steps + 1) // 2) - dense) for step in range(steps)]
        return [None if step < dense else own[step] for step in range(steps)]
    count = min(int(groups), sparse)
    return [None if step < dense else (step - dense) * count // sparse for step in range(steps)]


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str | Mapping[str, Any]],
    *,
    density: float = 0.3,
    groups: int | str = 4,
    dense_steps: float = 0.2,
    block: int | None = None,
    order: str = "axis",
    criterion: str = "mass",
    rows_per_block: int | None = 16,
    order_prompts: int = 1,
    precision: str | Sequence[str] | None = None,
    max_error: float = 0.02,
    progress: bool = True,
    **call: Any,
) -> AttentionPlan:
    """Measure orders and block masks of a pipeline over whole dense runs.

    One pass over the first prompts chooses an order per (layer, head); a second pass over all of
    them measures the block masses in that order, one set per step group. Groups are keyed by noise
    level, so a plan holds for another number of steps of the same scheduler. The procedure is our
    reconstruction of PAROAttention's offline calibration. A third pass, on request, measures what
    quantising costs each head in its order with its blocks.

    Args:
        pipe: The pipeline, without a gen_accel processor (one that is installed is removed).
        prompts: Prompts, or mappings of call arguments where a prompt is not enough (an image). One
            or two are enough: the paper finds attention maps of different prompts 99 % alike.
        density: Share of the video-to-video blocks to keep, in (0, 1].
        groups: Step groups with masks of their own, a number or ``"paper"``; see `step_groups`.
        dense_steps: First share of the steps that will run dense and needs no masks.
        block: Tokens per block; None picks by length.
        order: ``"axis"``, one of six per head; ``"curve"`` or ``"raster"``, one for all.
        criterion: ``"mass"`` or ``"paper"``; see `Measurement`.
        rows_per_block: Query rows sampled per block; None takes all.
        order_prompts: How many prompts the passes for orders and precisions look at.
        precision: Choose one for every layer and head: ``"auto"`` tries
            `gen_accel.precision.CHEAPEST`; a name, or several with the cheapest first, tries those.
            None leaves it to the processor.
        max_error: The cheapest that is tried is chosen whose relative L2 error, in the worst call
            that was looked at, is at most this; heads without one are not quantised.
        progress: Show a progress bar over prompts.
        **call: Arguments of the pipeline: ``height``, ``width``, ``num_frames``,
            ``num_inference_steps``, ``guidance_scale``, ``generator``, ...

    Returns:
        The plan; save it with ``plan.save(path)``. ``plan.info`` says how it was made, how long it
        took, and ``plan.mass_kept()`` how much softmax mass it keeps.

    Raises:
        ValueError: No prompts, or a setting out of range.
    """
    runs = _calls([prompts] if isinstance(prompts, str) else prompts, call)
    measurement = Measurement(density, block, order, criterion, rows_per_block)
    if groups != PAPER and (not isinstance(groups, int) or groups < 1):
        raise ValueError(f"groups={groups!r}: give a number of step groups, or {PAPER!r}")
    if precision == "auto":
        precision = CHEAPEST
    elif isinstance(precision, str):
        precision = [precision]
    started = time.perf_counter()
    policy = ParoProcessor(dense_steps=dense_steps, min_tokens=0)
    watchers = []
    with apply(pipe, policy) as handle:
        for component in handle.components:
            meter = None if precision is None else PrecisionMeter(precision, max_error)
            watcher = _Watcher(component.engine, component.model, measurement, groups, meter)
            component.engine.planner = watcher
            watchers.append(watcher)
        passes = [("orders", runs[:order_prompts])] if order == "axis" else []
        passes.append(("masks", runs))
        if precision is not None:
            passes.append(("precisions", runs[:order_prompts]))
        bar = tqdm(
            total=sum(len(part) for _, part in passes), desc="calibrate", disable=not progress
        )
        for what, part in passes:
            for watcher in watchers:
                watcher.what = what
            for arguments in part:
                bar.set_postfix_str(what)
                pipe(**arguments)
                bar.update()
        bar.close()
    seen = [watcher for watcher in watchers if watcher.recorder is not None]
    components = {watcher.engine.name: watcher.finished() for watcher in seen}
    if not any(component.layers for component in components.values()):
        reasons = {r for watcher in watchers for r in watcher.engine.stats.dense} - {CALIBRATING}
        raise ValueError(
            f"nothing to calibrate: every attention call stays dense ({'; '.join(reasons)})"
        )
    first = seen[0]
    assert first.recorder is not None
    info = provenance(measurement, "offline", time.perf_counter() - started)
    info.update(prompts=len(runs), steps=first.steps, groups=groups, dense_steps=dense_steps)
    if precision is not None:
        errors = {watcher.engine.name: watcher.errors() for watcher in seen}
        info["precision"] = {"max_error": max_error, "tried": list(precision), "errors": errors}
    return AttentionPlan(first.recorder.grid, first.recorder.block, density, components, info)


def _calls(
    prompts: Sequence[str | Mapping[str, Any]], call: Mapping[str, Any]
) -> list[dict[str, Any]]:
    if not prompts:
        raise ValueError("prompts=[]: calibration watches real runs; give one or two prompts")
    runs = []
    for prompt in prompts:
        own = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        # Pixels are not looked at, so they are not decoded.
        runs.append({"output_type": "latent", **call, **own})
    return runs


class _Watcher:
    """The planner of a run that is only watched: dense throughout, recorded by step groups."""

    def __init__(
        self,
        engine: Engine,
        model: str,
        measurement: Measurement,
        groups: int | str,
        meter: PrecisionMeter | None,
    ) -> None:
        self.engine = engine
        self.layers = engine.layers
        self.model = model
        self.measurement = measurement
        self.groups = groups
        self.meter = meter
        self.what = "orders"
        self.steps = 0
        self.recorder: Recorder | None = None
        self._first_sparse = 0
        self._of_step: list[int | None] = []
        self._sigma: dict[int, float] = {}
        self._plan: ComponentPlan | None = None

    def begin(self, context: ForwardContext) -> None:
        """Nothing to prepare."""

    def lookup(
        self, layer: int, layout: TokenLayout, text: int, device: torch.device, heads: slice | None
    ) -> Planned | str:
        """Every call is dense."""
        return CALIBRATING

    def watches(self, layer: int) -> bool:
        """Every layer."""
        return True

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
        context = self.engine.context
        if context.step is None or context.steps is None:
            raise ValueError(
                "calibrate() needs a pipeline with a scheduler, not a bare transformer"
            )
        if self.recorder is not None and (self.recorder.grid, self.steps) != (
            layout.grid,
            context.steps,
        ):
            raise ValueError(
                f"grid {layout.grid} in {context.steps} steps, after {self.recorder.grid} in "
                f"{self.steps}: a plan is for one grid and number of steps; make one for each"
            )
        if self.recorder is None:
            self.steps = context.steps
            self._first_sparse = self.engine.schedule.dense_step_count(context.steps)
            self._of_step = step_groups(context.steps, self._first_sparse, self.groups)
            count = 1 + max((g for g in self._of_step if g is not None), default=0)
            self.recorder = Recorder(layout, self.measurement, count)
        group = self._of_step[context.step]
        if group is None:
            return
        self._sigma[group] = min(self._sigma.get(group, float("inf")), context.sigma or 0.0)
        if self.what == "masks":
            self.recorder.observe_mass(layer, q, k, layout, group)
        elif (context.step - self._first_sparse) % 4 == 0:  # neighbouring steps look alike
            if self.what == "orders":
                self.recorder.observe_orders(layer, q, k, layout)
            else:
                self._observe_precisions(layer, q, k, v, layout, group)

    def _observe_precisions(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, group: int
    ) -> None:
        assert self.recorder is not None and self.meter is not None
        started = time.perf_counter()
        plan = self.plan.layers[layer]
        text = k.shape[1] - layout.grid.numel
        blocks = plan.blocks(group, layout, self.recorder.block, q.device, text)
        q = plan.orders.reorder(q, layout)
        k, v = (reorder_keys(plan.orders, x, layout) for x in (k, v))
        self.meter.observe(layer, q, k, v, blocks)
        self.recorder.seconds += time.perf_counter() - started

    def errors(self) -> dict[str, dict[str, list[float]]]:
        """Layer -> precision -> worst error of each head, for a file."""
        assert self.meter is not None
        return {
            str(layer): {name: [round(x, 6) for x in found.tolist()] for name, found in by.items()}
            for layer, by in sorted(self.meter.errors.items())
        }

    def finished(self) -> ComponentPlan:
        """The plan, precisions included."""
        plan = self.plan
        if self.meter is not None:
            for layer in self.meter.errors:
                chosen = self.meter.choose(layer)
                plan.layers[layer] = replace(plan.layers[layer], precision=chosen)
        return plan

    @property
    def plan(self) -> ComponentPlan:
        """Orders and masks; made when it is first asked for, after the passes that measure them."""
        if self._plan is None:
            self._plan = self._make()
        return self._plan

    def _make(self) -> ComponentPlan:
        recorder = self.recorder
        assert recorder is not None
        lows = [self._sigma.get(group, 0.0) for group in range(recorder.groups)]
        # A transformer that serves part of the run (Wan 2.2) never saw the other groups.
        for group in range(recorder.groups - 2, -1, -1):
            lows[group] = max(lows[group], lows[group + 1])
        plan = ComponentPlan(self.model, tuple(lows))
        for layer in range(self.engine.layers):
            if recorder.observed(layer):
                plan.layers[layer] = recorder.layer_plan(layer)
        return plan
