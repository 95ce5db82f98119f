"""Put a policy on a pipeline, see what it did, take it off again."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gen_accel.engine import Engine, RunStats
from gen_accel.families import family_of
from gen_accel.families.base import Family, FamilyProcessor
from gen_accel.hoist import Hoist, hoist_order
from gen_accel.kernels.quant import EMULATED, PRECISIONS
from gen_accel.parallel import context_parallel
from gen_accel.plan import AttentionPlan, PlanError
from gen_accel.planner.base import Planner
from gen_accel.planner.calibrated import CalibratedPlanner
from gen_accel.planner.pooled import PooledPlanner
from gen_accel.processors import Policy
from gen_accel.recorder import Measurement

log = logging.getLogger("gen_accel")

# Where a transformer keeps its `Component`: on itself, so that both are collected together.
_COMPONENT = "_gen_accel"


@dataclass(eq=False)
class Component:
    """One accelerated transformer.

    Attributes:
        name: Component name in the pipeline.
        transformer: The model.
        family: Its family.
        model: Model string, see `gen_accel.plan.ComponentPlan`.
        planner: Where its orders and block lists come from.
        engine: What runs its attention.
        taken: Module name -> the stock processor that stood there.
        left: Module name -> why it was left alone.
        compile: Its blocks run compiled while the processors are on.
    """

    name: str
    transformer: nn.Module
    family: Family
    model: str
    planner: Planner
    engine: Engine
    taken: dict[str, Any]
    left: dict[str, str]
    hook: Any = None
    hoist: Hoist | None = None
    compile: bool = False

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        config: Any = self.transformer.config
        return config.num_attention_heads

    def install(self) -> None:
        """Put a processor on every module taken, and the hook on the transformer."""
        for layer, (name, stock) in enumerate(self.taken.items()):
            kind = self.family.processors[type(stock).__name__]
            # A tensor, for torch.compile would make a graph of its own for every integer.
            number = torch.tensor(layer, device="cpu")
            processor = kind(self.engine.attend, number, stock)
            parallel = getattr(self.transformer, "_parallel_config", None)
            if context_parallel(parallel) is not None:
                # Not every stock processor is told, and one that is not would stay on its shard.
                processor._parallel_config = parallel
            _set(self.transformer.get_submodule(name), processor)
        self.hook = self.transformer.register_forward_pre_hook(self.engine.begin, with_kwargs=True)
        if isinstance(self.planner, PooledPlanner):
            # All heads of all layers share its order, so it is applied once per forward.
            self.hoist = self.planner.hoist = hoist_order(self.transformer, self.planner.order)
        setattr(self.transformer, _COMPONENT, self)
        for block in self._blocks() if self.compile else ():
            block.compile(fullgraph=True)

    def remove(self) -> None:
        """Put the stock processors back and take the hook off."""
        if getattr(self.transformer, _COMPONENT, None) is not self:
            return
        for name, stock in self.taken.items():
            module = self.transformer.get_submodule(name)
            # Something installed after us (an IP-Adapter, fused projections) is not ours to undo.
            if isinstance(module.processor, FamilyProcessor):
                _set(module, stock)
        for block in self._blocks() if self.compile else ():
            block._compiled_call_impl = None
        self.hook.remove()
        if self.hoist is not None:
            self.hoist.remove()
        delattr(self.transformer, _COMPONENT)

    def _blocks(self) -> list[nn.Module]:
        """The repeated blocks that hold the modules taken, each with one graph for all alike."""
        names = dict.fromkeys(re.sub(r"(\.\d+)\..*", r"\1", name) for name in self.taken)
        return [self.transformer.get_submodule(name) for name in names]


class Handle:
    """What `apply` returns: a look at the run, and the way back.

    Use it as a context manager to remove the processors at the end of a block.
    """

    def __init__(self, processor: Policy, components: list[Component]) -> None:
        self.processor = processor
        self.components = components

    @property
    def plan(self) -> AttentionPlan | None:
        """The plan in use: the one that was given, or the one made while calibrating.

        None until calibration is complete, and for policies that need none. Save it with
        ``handle.plan.save(path)``.

        Raises:
            PlanError: Under context parallelism this process calibrated only its own heads.
        """
        first = self.components[0].planner
        if not isinstance(first, CalibratedPlanner):
            return None
        if first.given is not None:
            return first.given
        parts = {}
        for component in self.components:
            planner = component.planner
            part = planner.made() if isinstance(planner, CalibratedPlanner) else None
            if part is None:
                return None
            parts[component.name] = part
            heads = component.heads
            for layer in part.layers.values():
                if layer.masks.shape[1] != heads:
                    raise PlanError(
                        f"this rank calibrated {layer.masks.shape[1]} of {heads} heads: make "
                        "the plan in one process and give it to all ranks as plan=..."
                    )
        recorder = first.recorder
        assert recorder is not None
        return AttentionPlan(
            grid=recorder.grid,
            block=recorder.block,
            density=recorder.measurement.density,
            components=parts,
            info=provenance(recorder.measurement, "during a run", recorder.seconds),
        )

    def stats(self) -> dict[str, RunStats]:
        """What the last pipeline call did, per transformer."""
        return {component.name: component.engine.stats for component in self.components}

    def summary(self) -> str:
        """What was accelerated, what was left alone and why, and what runs dense."""
        lines = [repr(self.processor)]
        for component in self.components:
            lines.append(
                f"{component.name} ({component.model}, family {component.family.name}): "
                f"{len(component.taken)} attention modules accelerated"
            )
            for reason in sorted(set(component.left.values())):
                names = [n for n, why in component.left.items() if why == reason]
                lines.append(f"  left alone: {len(names)} x {reason} ({names[0]}, ...)")
            if component.hoist is not None and component.hoist.reason:
                lines.append(f"  order applied per call: {component.hoist.reason}")
            stats = component.engine.stats
            for reason, count in stats.dense.items():
                lines.append(f"  dense: {count} calls, {reason}")
            if stats.sparse:
                lines.append(
                    f"  sparse: {stats.sparse} calls, density {stats.mean_density:.3f}, "
                    f"carrier {stats.carrier}{_precisions(stats)}"
                )
        with contextlib.suppress(PlanError):
            if self.plan is not None:
                lines.append(
                    f"{self.plan!r} keeps {self.plan.mass_kept():.1%} of the softmax mass, "
                    f"calibrated {self.plan.info.get('calibrated', '?')} in "
                    f"{self.plan.info.get('seconds', 0):.1f} s"
                )
        return "\n".join(lines)

    def remove(self) -> None:
        """Put the stock processors back. Safe to call twice."""
        for component in self.components:
            component.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def apply(pipe: Any, processor: Policy, *, profile: bool = False, compile: bool = False) -> Handle:
    """Accelerate the attention of a pipeline.

    Args:
        pipe: A diffusers pipeline, all of whose transformers are taken (Wan 2.2 has two), or one
            transformer. Without the pipeline's scheduler a transformer's steps are told apart by
            their timestep, and shares of the run (``dense_steps``) cannot be known: only the
            calibrating step is dense.
        processor: The policy. Processors of an earlier `apply` are removed first.
        profile: Time the calls on a GPU too, at the price of synchronising around each.
        compile: Compile the blocks (`torch.nn.Module.compile`) until the processors are removed:
            norms, RoPE and gates become a few kernels. The first call of each resolution compiles.

    Returns:
        A `Handle`.

    Raises:
        TypeError: ``processor`` is not one of gen_accel's.
        ValueError: Nothing here can be accelerated; the message lists the supported models.
        PlanError: The processor's plan was made for another model.
    """
    if not isinstance(processor, Policy):
        raise TypeError(
            f"{type(processor).__name__}: apply() takes a gen_accel processor; set a diffusers "
            "processor with pipe.transformer.set_attn_processor(...)"
        )
    plan = processor.load_plan()
    found = _transformers(pipe)
    earlier = [c for t in found.values() if (c := getattr(t, _COMPONENT, None)) is not None]
    for component in earlier:
        component.remove()
    try:
        components = _components(pipe, found, processor, plan, profile, compile)
    except Exception:
        for component in earlier:  # what was refused shall leave the pipeline as it was
            component.install()
        raise
    for component in components:
        component.install()
    handle = Handle(processor, components)
    log.debug("%s", handle.summary())
    return handle


def _components(
    pipe: Any,
    found: dict[str, nn.Module],
    processor: Policy,
    plan: AttentionPlan | None,
    profile: bool,
    compile: bool,
) -> list[Component]:
    """One for each transformer, not installed yet."""
    scheduler = None if isinstance(pipe, nn.Module) else _scheduler_of(pipe)
    components = []
    for name, transformer in found.items():
        family = family_of(transformer)
        taken, left = _modules(transformer, family)
        if not taken:
            reasons = "; ".join(sorted(set(left.values()))) or "it has no attention modules"
            raise ValueError(f"{name}: no attention module can be accelerated ({reasons})")
        model = _model_string(transformer, len(taken))
        planner = processor.planner(name, model, len(taken), plan)
        engine = Engine(
            name=name,
            layers=len(taken),
            planner=planner,
            layout_of=family.layout,
            pure_noise=family.pure_noise,
            scheduler=scheduler,
            **processor.engine_settings(),
            profile=profile,
        )
        components.append(
            Component(
                name, transformer, family, model, planner, engine, taken, left, compile=compile
            )
        )
    if plan is not None:
        plan.check({component.name: component.model for component in components})
    return components


def _transformers(pipe: Any) -> dict[str, nn.Module]:
    """Component name -> transformer that a family serves."""
    if isinstance(pipe, nn.Module):
        family_of(pipe)  # its error names the supported models
        return {"transformer": getattr(pipe, "_orig_mod", pipe)}
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"{type(pipe).__name__}: apply() takes a diffusers pipeline or transformer")
    found = {}
    for name, part in components.items():
        if isinstance(part, nn.Module) and name.startswith("transformer"):
            family_of(part)
            found[name] = getattr(part, "_orig_mod", part)
    if not found:
        raise ValueError(
            f"{type(pipe).__name__} has no diffusion transformer; gen_accel accelerates DiT "
            "pipelines (Wan, HunyuanVideo, FLUX, Cosmos)"
        )
    return found


def _scheduler_of(pipe: Any) -> Callable[[], Any]:
    """Looked up at every forward: users swap schedulers. Weak, or the pipeline would never die.

    Its last scheduler outlives it, because another pipeline may go on with both
    (``pipe = OtherPipeline.from_pipe(pipe)``).
    """
    reference = weakref.ref(pipe)
    last = getattr(pipe, "scheduler", None)

    def scheduler() -> Any:
        nonlocal last
        alive = reference()
        if alive is not None:
            last = getattr(alive, "scheduler", None)
        return last

    return scheduler


def _modules(transformer: nn.Module, family: Family) -> tuple[dict[str, Any], dict[str, str]]:
    """Stock processors of the modules to take, and the reasons of those to leave."""
    taken: dict[str, Any] = {}
    left: dict[str, str] = {}
    for name, module in transformer.named_modules():
        if not hasattr(module, "processor"):
            continue
        reason = family.keep(name, module)
        if reason is None:
            taken[name] = module.processor
        else:
            left[name] = reason
    return taken, left


def _model_string(transformer: Any, layers: int) -> str:
    """Class, accelerated layers, heads and head_dim: what a plan must agree with."""
    config = transformer.config
    return (
        f"{type(transformer).__name__}/{layers}x{config.num_attention_heads}"
        f"x{config.attention_head_dim}"
    )


def _set(module: Any, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def _precisions(stats: RunStats) -> str:
    """What was quantised, for a line of a summary; "" when nothing was."""
    if not any(name in PRECISIONS for name in stats.precision):
        return ""
    named = ", ".join(f"{name} x {calls}" for name, calls in stats.precision.items())
    return f", precision {named}" + (f" ({EMULATED})" if stats.emulated else "")


def provenance(measurement: Measurement, how: str, seconds: float) -> dict[str, Any]:
    """The ``info`` of a plan: what it was measured with, how, and how long that took."""
    libraries = {name: sys.modules.get(name) for name in ("gen_accel", "torch", "diffusers")}
    return {
        "calibrated": how,
        "criterion": measurement.criterion,
        "order": measurement.order,
        "rows_per_block": measurement.rows_per_block,
        "seconds": round(seconds, 3),
        "versions": {name: lib.__version__ for name, lib in libraries.items() if lib is not None},
    }
