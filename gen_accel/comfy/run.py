"""One sampling run of a patched model: its steps, its engine, what it did."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gen_accel.comfy.call import AttentionCall, without_padding
from gen_accel.comfy.layout import block_number, layer_count, model_string, replaced_blocks
from gen_accel.engine import Engine, RunStats
from gen_accel.kernels.api import choose
from gen_accel.layout import ForwardContext, TokenGrid, TokenLayout, Unsupported
from gen_accel.plan import AttentionPlan, PlanError
from gen_accel.planner.calibrated import CalibratedPlanner

if TYPE_CHECKING:
    from gen_accel.processors import Policy

log = logging.getLogger("gen_accel")

COMPONENT = "transformer"  # what plan files call the model
PercentToSigma = Callable[[float], float]


@dataclass(frozen=True)
class Span:
    """Where in the run attention may be sparse, in ComfyUI's percent of the noise schedule.

    Args:
        start: Dense before this share, 0..1.
        end: Dense after it.
    """

    start: float = 0.2
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"start_percent={self.start}, end_percent={self.end}: give 0 <= start <= end <= 1"
            )

    def dense_steps(
        self, sigmas: Sequence[float], percent_to_sigma: PercentToSigma | None
    ) -> tuple[int, int]:
        """How many steps at the beginning and at the end of a run stay dense.

        Args:
            sigmas: Noise level of every step that is run, which may be a part of the schedule.
            percent_to_sigma: The model's, or None: then shares of the steps of this run.
        """
        steps = len(sigmas)
        if percent_to_sigma is None:
            return math.ceil(self.start * steps - 1e-9), math.ceil((1 - self.end) * steps - 1e-9)
        first, last = float(percent_to_sigma(self.start)), float(percent_to_sigma(self.end))
        return (
            sum(sigma > first * (1 + 1e-5) for sigma in sigmas),
            sum(sigma < last * (1 - 1e-5) for sigma in sigmas),
        )


@dataclass(eq=False)
class Forward:
    """One forward of the diffusion model, as its attention calls see it.

    Attributes:
        run: The run it belongs to.
        model: The diffusion model.
        layout: Token layout but for padding, or None.
        context: Where in the run it is.
        reason: Why it stays dense, or "".
        override: Another node's override that was put on after ours, or None.
        layers: Numbers of its self-attention calls.
    """

    run: Run
    model: Any
    layout: TokenLayout | None
    context: ForwardContext
    reason: str = ""
    override: Callable[..., Tensor] | None = None
    layers: itertools.count[int] = field(default_factory=itertools.count)


class Run:
    """One sampling run.

    Args:
        policy: What to run sparse, and how. Its ``dense_steps`` follow from ``span``.
        span: When.
        percent_to_sigma: The model's noise schedule, or None.
        said: Reasons that were logged already.
        profile: Synchronise the device around calls, so that times hold on GPUs.

    Attributes:
        stats: What the engine did; of a run that is over.
        declined: Reason -> calls that were not ours.
        grids: Token grids met.
        plan: The plan that was used or made; of a run that is over.
        seconds: From its first forward to its end.
    """

    def __init__(
        self,
        policy: Policy,
        span: Span,
        percent_to_sigma: PercentToSigma | None = None,
        said: set[str] | None = None,
        profile: bool = False,
    ) -> None:
        self.policy = policy
        self.span = span
        self.profile = profile
        self.stats = RunStats()
        self.declined: Counter[str] = Counter()
        self.grids: list[TokenGrid] = []
        self.plan: AttentionPlan | None = None
        self.seconds = 0.0
        self._percent_to_sigma = percent_to_sigma
        self._said = set() if said is None else said
        self._started = time.perf_counter()
        self._engine: Engine | None = None
        self._schedule: Any = None
        self._sigmas: tuple[float, ...] = ()
        self._step: int | None = None
        self._branches: dict[Any, int] = {}
        self._seen: Counter[Any] = Counter()

    def context(self, options: dict[str, Any]) -> ForwardContext:
        """Step, noise level and branch of a forward, from its ``transformer_options``."""
        schedule = options.get("sample_sigmas")
        if schedule is not None and schedule is not self._schedule:
            self._schedule, self._sigmas = schedule, tuple(schedule.tolist()[:-1])
        sigmas = options.get("sigmas")
        context = ForwardContext(
            sigma=float(sigmas.flatten()[0]) if isinstance(sigmas, Tensor) else None
        )
        if context.sigma is not None and self._sigmas:
            # Samplers of higher order also evaluate between two noise levels.
            passed = sum(level >= context.sigma * (1 - 1e-5) for level in self._sigmas)
            context.step, context.steps = max(passed - 1, 0), len(self._sigmas)
        if context.step != self._step:
            self._step = context.step
            self._seen.clear()
        # cond and uncond come in one batch or one by one, windows and areas one after the other.
        who = tuple(options.get("cond_or_uncond", ())), tuple(options.get("uuids", ()))
        branch = who, self._seen[who]
        self._seen[who] += 1
        context.branch = self._branches.setdefault(branch, len(self._branches))
        return context

    def attend(self, call: AttentionCall, forward: Forward) -> Tensor:
        """One attention call; whatever is not ours goes to the function it was meant for."""
        if forward.layout is None:
            return self._decline(call, forward.reason)
        reason = call.reason(forward.layout) or forward.reason
        if reason:
            return self._decline(call, reason)
        q, k, v = call.tensors()
        try:
            layout = without_padding(forward.layout, call.mask, q.shape[0])
            if self._engine is None:
                self._engine = self._make(forward.model, q, k, v)
            layer = self._layer(forward, call.rest.get("transformer_options") or {})
            self._enter(self._engine, forward, layout, layer)
        except Unsupported as unsupported:
            return self._decline(call, str(unsupported))
        return call.result(self._engine.attend(q, k, v, layer=layer, backend=call.stock))

    def finish(self) -> None:
        """The run is over: keep what it did, let go of what it holds."""
        self.seconds = time.perf_counter() - self._started
        if self._engine is not None:
            self.stats, self.plan = self._engine.stats, _plan_of(self._engine)
        self._engine = self._schedule = self._percent_to_sigma = None
        self._branches.clear()

    # -- inside --------------------------------------------------------------------------------

    def _make(self, model: Any, q: Tensor, k: Tensor, v: Tensor) -> Engine:
        impl = self.policy.impl
        if impl == "auto" and q.device.type == "cuda":
            impl = "triton"  # no other was shown to beat ComfyUI's own attention there
        try:
            choose(q, k, v, None, precision=self.policy.precision, impl=impl)
        except ValueError as error:
            raise Unsupported(str(error)) from error
        first, last = self.span.dense_steps(self._sigmas, self._percent_to_sigma)
        steps = max(len(self._sigmas), 1)
        policy = replace(self.policy, dense_steps=first / steps, dense_last_steps=last / steps)
        layers = layer_count(model)
        name = model_string(model, layers, q)
        plan = policy.load_plan()
        if plan is not None:
            plan.check({COMPONENT: name})
        return Engine(
            name="ComfyUI",
            layers=layers,
            planner=policy.planner(COMPONENT, name, layers, plan),
            **policy.engine_settings(),
            profile=self.profile,
        )

    def _layer(self, forward: Forward, options: dict[str, Any]) -> int:
        """Number of the block that calls: counted, for ComfyUI did not always say it."""
        counted = next(forward.layers)
        if not replaced_blocks(options):
            return counted
        number = block_number(forward.model, options)
        if number is None and self._by_layer:
            raise Unsupported("a node replaces blocks, and which of them calls is not known")
        return counted if number is None else number

    @property
    def _by_layer(self) -> bool:
        """Whether blocks differ in what they do."""
        policy, planner = self.policy, self._engine and self._engine.planner
        kept = getattr(policy, "refresh", 1) > 1 or isinstance(planner, CalibratedPlanner)
        return bool(policy.dense_layers) or kept

    def _enter(self, engine: Engine, forward: Forward, layout: TokenLayout, layer: int) -> None:
        while layer >= engine.layers:  # a block that is not in the model's own lists
            engine.layers += 1
            engine.planner.layers += 1
        context = forward.context
        if engine.context is context and context.layout == layout:
            return
        if layout.grid not in self.grids:
            self.grids.append(layout.grid)
        context.layout = layout
        try:
            engine.enter(context)
        except PlanError as error:  # an area or a window that the plan is not for
            forward.reason = str(error)
            raise Unsupported(str(error)) from error

    def _decline(self, call: AttentionCall, reason: str) -> Tensor:
        self.declined[reason] += 1
        if reason not in self._said:
            self._said.add(reason)
            log.info("gen_accel leaves attention calls as they are: %s", reason)
        return call.dense()


def _plan_of(engine: Engine) -> AttentionPlan | None:
    planner = engine.planner
    if not isinstance(planner, CalibratedPlanner):
        return None
    if planner.given is not None:
        return planner.given
    made, recorder = planner.made(), planner.recorder
    if made is None or recorder is None:
        return None
    from gen_accel.install import provenance

    setting = recorder.measurement
    info = provenance(setting, "in ComfyUI", recorder.seconds)
    return AttentionPlan(recorder.grid, recorder.block, setting.density, {COMPONENT: made}, info)
