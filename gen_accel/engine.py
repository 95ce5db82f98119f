"""Executes the attention calls of one transformer: dense, or what its planner says."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel import dense, natten
from gen_accel.families.base import argument
from gen_accel.kernels.api import block_sparse_attention, choose, emulates, orders, require_finite
from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.prepare import AxisPlaces
from gen_accel.kernels.tail import Tail
from gen_accel.layout import ForwardContext, TokenLayout, Unsupported
from gen_accel.order.axis import AxisOrder
from gen_accel.parallel import by_part, by_rank
from gen_accel.planner.base import Planned, Planner, Windowed
from gen_accel.precision import EXACT, HeadPrecisions, head_index, pays, split_heads
from gen_accel.schedule import Schedule
from gen_accel.tail import TailSetting

log = logging.getLogger("gen_accel")

LayoutOf = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], TokenLayout]
_engines: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_HALF = (torch.bfloat16, torch.float16)
# More passes than any guidance needs: a transformer that is asked for the same step again and again
# (in a benchmark, say) begins it anew.
_BRANCHES = 4


@dataclass
class RunStats:
    """What one pipeline call did in one transformer.

    Attributes:
        sparse: Number of sparse attention calls.
        dense: Reason -> number of calls that stayed dense for it.
        density: ``(step, layer)`` -> kept share of all blocks of that call, text included.
        seconds: Time in ``"dense"``, ``"sparse"`` and ``"calibrate"``; of the sparse, in
            ``"order"`` (with its inverse), ``"plan"``, ``"tail"`` and ``"kernel"``.
            Without ``profile=True`` only CPU calls are timed: a GPU would have to be synchronised.
        carrier: Implementation that ran the sparse calls, or "".
        precision: Precision -> number of sparse calls in it. A call whose heads have several counts
            in each.
        emulated: Whether quantised calls were computed in wider numbers: their accuracy, not their
            speed.
    """

    sparse: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    density: dict[tuple[int | None, int], float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    carrier: str = ""
    precision: dict[str, int] = field(default_factory=dict)
    emulated: bool = False

    @property
    def mean_density(self) -> float:
        """Mean density over the sparse calls; 1.0 when there were none."""
        return sum(self.density.values()) / len(self.density) if self.density else 1.0


class Engine:
    """Runs the attention of one transformer by a schedule and a planner.

    Args:
        name: Component name in the pipeline, e.g. ``"transformer"``.
        layers: Number of attention modules it serves.
        schedule: Which calls stay dense.
        planner: Orders and block lists of the others.
        layout_of: Family's layout function.
        pure_noise: Timestep of noise level 1; asked where no scheduler says the level.
        scheduler: Returns the pipeline's scheduler, or None for a bare transformer.
        tail: What stands in for hidden blocks.
        precision: Numbers the carrier computes in; ``"auto"``: what the plan says, else
            ``preferred``.
        preferred: Precision to take where a kernel for it runs, and the model's otherwise.
        impl: Carrier.
        dense: What computes the dense calls, see `gen_accel.dense`.
        check_finite: Raise when a call's q, k or v hold a NaN or an infinity.
        profile: Synchronise the device around calls so that `RunStats.seconds` holds on GPUs.
    """

    def __init__(
        self,
        *,
        name: str,
        layers: int,
        schedule: Schedule,
        planner: Planner,
        layout_of: LayoutOf | None = None,
        pure_noise: float = 1000.0,
        scheduler: Callable[[], Any] | None = None,
        tail: TailSetting | None = None,
        precision: str = "auto",
        preferred: str = "auto",
        impl: str = "auto",
        dense: str = "stock",
        check_finite: bool = False,
        profile: bool = False,
    ) -> None:
        self.name = name
        self.layers = layers
        self.schedule = schedule
        self.planner = planner
        self.tail = tail or TailSetting()
        self.precision = precision
        self.preferred = preferred
        self.impl = impl
        self.dense = dense
        self.check_finite = check_finite
        self.profile = profile
        self.context = ForwardContext()
        self._stats = RunStats()
        # Densities that are still on their way: asking a GPU for one would make every call wait.
        self._densities: dict[tuple[int | None, int], Tensor] = {}
        self._known: weakref.WeakKeyDictionary[Blocks, float] = weakref.WeakKeyDictionary()
        self._layout_of = layout_of
        self._pure_noise = pure_noise
        self._scheduler = scheduler
        self._timesteps: Any = None
        self._sigmas: tuple[Any, list[float]] = (None, [])
        self._reason: str | None = None
        self._said: set[str] = set()
        self._register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied transformer has an engine of its own, which its compiled blocks must find.
        self.__dict__.update(state)
        self._register()

    def _register(self) -> None:
        self._number = next(_numbers)
        _engines[self._number] = self

    @property
    def stats(self) -> RunStats:
        """What the current or last pipeline call did."""
        self._stats.density.update((at, float(kept)) for at, kept in self._densities.items())
        self._densities.clear()
        return self._stats

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
        if scheduler is not None and _is_running(scheduler):
            context.step = _step_index(scheduler)
            context.steps = len(scheduler.timesteps)
            sigmas = self._sigmas_of(scheduler)
            if context.step < len(sigmas):
                context.sigma = sigmas[context.step]
            # set_timesteps() makes a new tensor: the one sign of a new run all pipelines share.
            fresh = scheduler.timesteps is not self._timesteps
            self._timesteps = scheduler.timesteps
        else:
            if scheduler is not None:
                self._say_once(
                    "this forward is not of the pipeline that the processors were set on, whose "
                    "scheduler has no step to take: steps are told apart by their timesteps, and "
                    "dense_steps has no effect; set the processors on the pipeline that runs"
                )
            context.sigma = _timestep(module, args, kwargs) / self._pure_noise
            fresh = previous.sigma is None or context.sigma > previous.sigma
        if fresh:
            context.run += 1
            self._stats, self._densities = RunStats(), {}
        elif (context.step, context.sigma) == (previous.step, previous.sigma):
            context.branch = (previous.branch + 1) % _BRANCHES
        self.enter(context)

    def _sigmas_of(self, scheduler: Any) -> list[float]:
        """Noise levels as numbers; the scheduler may have them on a GPU, asked once a run."""
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not self._sigmas[0]:
            self._sigmas = sigmas, [] if sigmas is None else torch.as_tensor(sigmas).tolist()
        return self._sigmas[1]

    def enter(self, context: ForwardContext) -> None:
        """Set the context; by hand for a processor that was put on a module without the hook."""
        self.context = context
        self._reason = self.schedule.step_reason(context)
        if self._reason is not None and "of the steps" not in self._reason:
            self._say_once(f"attention stays dense: {self._reason}")
        self.planner.begin(context)

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
        ranks: int = 1,
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
            ranks: The sequence stands shard behind shard of so many ranks, see `by_part`.
        """
        if torch.compiler.is_compiling():
            # Opaque to the compiler: no graph break, and no recompilation when the step changes.
            start, stop = (heads.start, heads.stop) if heads is not None else (-1, -1)
            name = None if backend is None else str(getattr(backend, "value", backend))
            number = torch.as_tensor(layer, device="cpu")
            return _attend_op(q, k, v, mask, number, self._number, name, start, stop, ranks)
        layer = int(layer)
        if self.check_finite:
            require_finite(f"{self.name}, layer {layer}: ", q=q, k=k, v=v)
        layout, reason = self.context.layout, self._reason
        if layout is not None and layout.tokens != q.shape[1]:
            layout, reason = None, f"{q.shape[1]} tokens do not match the token grid"
            self._say_once(f"attention stays dense: {reason}")
        if ranks > 1 and layout is not None and layout.text:
            q, k, v = (by_part(x, layout, ranks) for x in (q, k, v))
            out = self.attend(q, k, v, layer=layer, backend=backend, heads=heads)
            return by_rank(out, layout, ranks)
        if layout is None:
            if ranks > 1 and mask is not None:
                raise ValueError(
                    f"context parallelism needs the token layout to apply the mask: {reason}"
                )
            self._count_dense(reason or self.context.reason)
            return dense.stock(q, k, v, backend, mask)
        valid = layout.text_valid or (layout.text_after,)
        if len(set(valid)) == 1:
            return self._attend(q, k, v, layer, backend, heads, layout, valid[0])
        # Prompts of different lengths in one batch: each sees its own text, and no mask is needed.
        samples = zip(q.split(1), k.split(1), v.split(1), valid, strict=True)
        return torch.cat(
            [self._attend(*qkv, layer, backend, heads, layout, n) for *qkv, n in samples]  # type: ignore[call-arg]
        )

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
        reason = self._reason
        if reason is None and self.schedule.is_dense_layer(layer, self.layers):
            reason = "dense layer"
        if reason is None:
            text = layout.text_before + text_after
            planned = self.planner.lookup(layer, layout, text, q.device, heads)
            if not isinstance(planned, str):
                return self._sparse(q, k, v, layer, planned, layout, text)
            reason = planned
        self._count_dense(reason)
        keys = layout.tokens - layout.text_after + text_after
        k, v = k[:, :keys], v[:, :keys]
        if self.planner.watches(layer):
            with self._clock("calibrate", q):
                self.planner.observe(layer, q, k, v, layout)
        with self._clock("dense", q):
            return dense.attend(q, k, v, self.dense, backend, self.impl)

    def _sparse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        planned: Planned | Windowed,
        layout: TokenLayout,
        text: int,
    ) -> Tensor:
        with self._clock("sparse", q):
            if isinstance(planned, Windowed):
                out = natten.run(q, k, v, planned.windows)
                self._stats.carrier = "natten"
                self._stats.density[self.context.step, layer] = planned.density
            else:
                out = self._block_sparse(q, k, v, layer, planned, layout, text)
        self._stats.sparse += 1
        return out

    def _block_sparse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        planned: Planned,
        layout: TokenLayout,
        text: int,
    ) -> Tensor:
        order, blocks, pooled, real, precision = planned
        if self._orders_in_kernel(planned, q, k, v):
            assert isinstance(order, AxisOrder) and isinstance(blocks, Blocks)
            self._note_density(layer, blocks)
            # Text that is not attended to stands at the end, in the model's order as in this.
            keys = k.shape[1] - layout.text + text
            places = order.places(layout, q.device)
            with self._clock("kernel", q):
                return self._kernel(q, k[:, :keys], v[:, :keys], blocks, None, precision, places)
        with self._clock("order", q):
            q, k, v = (order.reorder(x, layout) for x in (q, k, v))
        # Behind the video (and its padding places) stand the text tokens that are attended to.
        keys = k.shape[1] - layout.text + text
        k, v = k[:, :keys], v[:, :keys]
        scores = None
        if not isinstance(blocks, Blocks):
            with self._clock("plan", q):
                blocks, scores = blocks(q, k)
        self._note_density(layer, blocks)
        with self._clock("tail", q):
            tail = self.tail.make(q, k, v, blocks, pooled=pooled, real=real, scores=scores)
        with self._clock("kernel", q):
            out = self._kernel(q, k, v, blocks, tail, precision)
        with self._clock("order", q):
            return order.restore(out, layout)

    def _orders_in_kernel(self, planned: Planned, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether nothing but the kernel needs the tokens in order, and it puts them there."""
        order, blocks, _, _, precision = planned
        return (
            isinstance(order, AxisOrder)
            and isinstance(blocks, Blocks)
            and self.tail.kind == "drop"
            and (precision is None or len(precision.groups()) == 1)
            and orders(choose(q, k, v, blocks, precision=self.precision, impl=self.impl))
        )

    def _kernel(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Blocks,
        tail: Tail | None,
        planned: HeadPrecisions | None,
        places: AxisPlaces | None = None,
    ) -> Tensor:
        """The carrier, once for each precision that heads have."""
        precision, groups = self.precision, {}
        if precision == "auto" and planned is not None:
            groups = self._runnable(planned, q, k, v, blocks, tail)
        elif (
            precision == "auto" and self.preferred != EXACT and q.dtype in _HALF and pays(q.device)
        ):
            carrier = choose(q, k, v, blocks, tail, precision=self.preferred, impl=self.impl)
            precision = EXACT if emulates(carrier, self.preferred) else self.preferred
        if len(groups) < 2:
            return self._run(next(iter(groups), precision), q, k, v, blocks, tail, places)
        out = torch.empty_like(q)
        for name, heads in groups.items():
            index = head_index(tuple(heads), q.device)
            part = self._run(name, *split_heads(q, k, v, blocks, tail, heads))
            out.index_copy_(2, index, part)
        return out

    def _runnable(
        self,
        planned: HeadPrecisions,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Blocks,
        tail: Tail | None,
    ) -> dict[str, list[int]]:
        """Heads by precision; on a GPU without kernels for one, those heads are not quantised.

        A plan may come from another machine, and there is no sense in emulating rounding where
        nobody measures it.
        """
        groups: dict[str, list[int]] = {}
        for name, heads in planned.groups().items():
            runs = name
            if q.device.type == "cuda" and emulates(
                choose(q, k, v, blocks, tail, precision=name, impl=self.impl), name
            ):
                runs = EXACT
                self._say_once(f"the plan's precision {name!r} has no kernel here: not quantised")
            groups[runs] = sorted([*groups.get(runs, []), *heads])
        return groups

    def _run(
        self,
        precision: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Blocks,
        tail: Tail | None,
        places: AxisPlaces | None = None,
    ) -> Tensor:
        stats, options = self._stats, {"precision": precision, "impl": self.impl}
        if precision not in stats.precision:
            carrier = choose(q, k, v, blocks, tail, **options)
            stats.emulated |= emulates(carrier, precision)
            known = stats.carrier.split("+") if stats.carrier else []
            stats.carrier = "+".join(dict.fromkeys([*known, carrier]))
        stats.precision[precision] = stats.precision.get(precision, 0) + 1
        return block_sparse_attention(q, k, v, blocks, tail=tail, places=places, **options)

    # -- book-keeping --------------------------------------------------------------------------

    def _note_density(self, layer: int, blocks: Blocks) -> None:
        at = self.context.step, layer
        if blocks.device.type != "cpu" and blocks not in self._known:
            self._densities[at] = blocks.kept()
            return
        if blocks not in self._known:
            self._known[blocks] = blocks.density()
        self._stats.density[at] = self._known[blocks]

    def _count_dense(self, reason: str) -> None:
        self._stats.dense[reason] = self._stats.dense.get(reason, 0) + 1

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning("%s: %s", self.name, message)

    @contextlib.contextmanager
    def _clock(self, part: str, x: Tensor) -> Iterator[None]:
        """Add the time of a block of code to ``stats.seconds``."""
        on_cpu = x.device.type == "cpu"
        if not on_cpu and not self.profile:
            yield
            return
        if not on_cpu:
            torch.accelerator.synchronize()
        started = time.perf_counter()
        yield
        if not on_cpu:
            torch.accelerator.synchronize()
        seconds = self._stats.seconds
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started


def _step_index(scheduler: Any) -> int:
    """Index of the coming step: None before the first one, which image-to-image may start late."""
    for name in ("step_index", "begin_index"):
        index = getattr(scheduler, name, None)
        if index is not None:
            return int(index)
    return 0


def _is_running(scheduler: Any) -> bool:
    """Whether a pipeline has asked this scheduler for steps and not taken all of them yet."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or _step_index(scheduler) >= len(timesteps):
        return False
    # One that was never asked holds those of its training.
    begun = any(getattr(scheduler, n, None) is not None for n in ("step_index", "begin_index"))
    training = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    return begun or len(timesteps) != training


def _timestep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Timestep of a forward, for a transformer without a pipeline; one device sync per forward.

    Where every token has its own (image to video), those of the clean image are 0.
    """
    value = argument(module, args, kwargs, "timestep")
    return float(value.max()) if isinstance(value, Tensor) else float(value)


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
    ranks: int,
) -> Tensor:
    heads = None if start < 0 else slice(start, stop)
    out = _engines[engine].attend(
        q, k, v, layer=layer, backend=backend, heads=heads, mask=mask, ranks=ranks
    )
    return out.contiguous()


@_attend_op.register_fake
def _(q, k, v, mask, layer, engine, backend, start, stop, ranks):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format)
