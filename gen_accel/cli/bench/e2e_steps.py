"""Forwards of a whole transformer, dense and sparse in turn: a piece of ``bench e2e``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.e2e_check import first_call

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.cli.bench.e2e import Case
    from gen_accel.eval.harness import Timing
    from gen_accel.install import Handle
    from gen_accel.processors import Policy

STOCK = "stock"
# Device -> dense attention: name -> diffusers' backend.
BACKENDS = {
    "cuda": {
        "cuDNN": "_native_cudnn",
        "flash": "_native_flash",
        "FA3": "_flash_3",
        "sage": "sage",
    }
}
_LOSSY = ("sage",)  # computes in 8 bits, so it is no baseline of the same precision
_PARTS = ("order", "plan", "tail", "kernel", "dense", "calibrate")
_FEWEST = 3
_LATENTS = "hidden_states"
_LEAST = 1e-5  # of what differs in nothing but the rounding of fp32
_ROUNDING = 3  # times what rounding moves the stock result, a dense one may differ from it


class Run:
    """A transformer in a denoising run, as far as `gen_accel.apply` looks at a pipeline."""

    def __init__(self, case: Case) -> None:
        import torch

        model = case.model
        self.case = case
        self.dtype = getattr(torch, case.dtype)
        self.transformer: Any = model.build(case.device, self.dtype)
        self.inputs = model.inputs(case.grid, case.device, self.dtype, case.seed)
        self.components = {"transformer": self.transformer}
        self.scheduler = _Scheduler(model.steps)

    def forward(self, step: int) -> Tensor:
        """One forward of a step."""
        self.scheduler.step_index = step
        sigma = float(self.scheduler.sigmas[step])
        timestep = self.case.model.timestep(sigma, self.case.device, self.dtype)
        return self.transformer(**self.inputs, timestep=timestep, return_dict=False)[0]


class _Scheduler:
    def __init__(self, steps: int) -> None:
        import torch

        self.sigmas = torch.linspace(1, 0, steps + 1)
        self.timesteps = 1000 * self.sigmas[:-1]
        self.step_index = 0


@dataclass
class Candidate:
    """One way of running the transformer.

    Attributes:
        name: What the table calls it.
        dense: It computes full attention.
        target: Density asked for.
        handle: Its processors; None leaves diffusers' own.
        error: Relative distance of a dense result to the stock one's; of a sparse candidate, that
            of one of its calls to the definition, None where none was compared.
        precision: How its calls are quantised, or the model's dtype.
        density: Kept share of a sparse call.
        parts: Seconds of one forward by part.
        extra: Seconds it took to calibrate, for one forward of a step.
        peak: MiB of memory that its forward takes beside what all candidates hold at once.
        joules: Of one forward.
        turn: Forwards timed so far.
        backend: diffusers' backend of its dense calls.
        windows: What it keeps is a window's.
        own: A transformer of its own, on which the processors stay; None shares one.
    """

    name: str
    dense: bool
    target: float = 1.0
    handle: Handle | None = None
    error: float | None = 0.0
    precision: str = ""
    density: float = 1.0
    parts: dict[str, float] = field(default_factory=dict)
    extra: float = 0.0
    turn: int = 0
    backend: str = "native"
    windows: bool = False
    own: Run | None = None
    peak: float | None = None
    joules: float | None = None


class Steps:
    """Measures the candidates of a case against each other.

    Args:
        case: What to run.
        say: Takes a line of progress.
    """

    def __init__(self, case: Case, say: Callable[[str], None] = lambda line: None) -> None:
        from gen_accel.schedule import Schedule

        self.case = case
        self.say = say
        self.run = Run(case)
        self.backends = BACKENDS.get(case.device, {})
        self.candidates: list[Candidate] = []
        self.absent: dict[str, str] = {}
        self.wrong: dict[str, str] = {}
        self.timings: dict[str, Timing] = {}
        self.dense_steps = Schedule(case.dense_steps).dense_step_count(case.model.steps)
        self.last_dense = max(0, self.dense_steps - 1)

    def measure(self, seconds: float) -> None:
        """Prepare all, check them, then time rounds in which each runs once.

        Args:
            seconds: About how long the rounds may take.
        """
        from gen_accel.cli.bench.kernel_pieces import free_gpu, told
        from gen_accel.eval.harness import measure

        self._baselines()
        for name, density in itertools.product(self.case.methods, self.case.densities):
            label = name if len(self.case.densities) == 1 else f"{name} {density:g}"
            try:
                self._prime(label, name, density)
            except Exception as error:  # out of memory, a fault in a kernel: the others go on
                self.wrong[label] = told(error)
            free_gpu()
        if self.case.compiled:
            self._compiled()
        usable = [c for c in self.candidates if c.name not in self.wrong]
        start = time.monotonic()
        for candidate in usable:
            self._profile(candidate)
        fit = int(seconds / max(time.monotonic() - start, 1e-9))
        rounds = max(min(_FEWEST, self.case.rounds), min(self.case.rounds, fit))
        self.say(f"{rounds} rounds of {len(usable)} candidates")
        fns = {c.name: partial(self._one, c) for c in usable}
        self.timings = measure(fns, rounds, warmup=0, device=self.case.device)

    @property
    def baseline(self) -> str:
        """The fastest candidate that computes full attention in the model's precision."""
        dense = [c.name for c in self.candidates if c.dense and c.name in self.timings]
        exact = [name for name in dense if name not in _LOSSY]
        return min(exact, key=lambda name: self.timings[name].median)

    # ---- candidates ------------------------------------------------------------------------------

    def _baselines(self) -> None:
        from gen_accel import SparseProcessor

        stock = Candidate(STOCK, dense=True, precision=self.case.dtype)
        self._right = self._forward(stock, self.last_dense)
        self._allowed = self._tolerance(stock)
        self.candidates.append(stock)
        seconds = {}
        for name, backend in self.backends.items():
            candidate = self._dense(name, backend)
            if candidate is not None and name not in _LOSSY:
                seconds[backend] = self._seconds(candidate)
        # The others' dense steps run on the baseline's kernel, or quality would differ by it.
        self._fastest = min(seconds, key=lambda name: seconds[name], default="native")
        every = SparseProcessor(select="all", tail="drop", dense_steps=0.0, min_tokens=0)
        self._dense("ours", self._fastest, every)

    def _dense(self, name: str, backend: str, policy: Policy | None = None) -> Candidate | None:
        """A baseline, if it runs here and computes what the stock transformer does."""
        from gen_accel import ParoProcessor, apply

        policy = policy or ParoProcessor(dense_steps=1.0, min_tokens=0)
        try:
            handle = apply(self.run, policy)
            handle.remove()
            candidate = Candidate(name, dense=True, handle=handle, backend=backend)
            candidate.precision = "int8" if name in _LOSSY else self.case.dtype
            self._compare(candidate, self._forward(candidate, self.last_dense))
        except Exception as error:  # not installed, or not made for this device
            self.absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            return None
        self.candidates.append(candidate)
        return None if name in self.wrong else candidate

    def _compiled(self) -> None:
        """Compiled blocks: diffusers' own, and with each method."""
        own = Run(self.case)
        own.transformer.compile_repeated_blocks(fullgraph=True)
        stock = Candidate(f"{STOCK}, compiled", dense=True, own=own, precision=self.case.dtype)
        self._compare(stock, self._forward(stock, self.last_dense))
        self.candidates.append(stock)
        for name, density in itertools.product(self.case.methods, self.case.densities):
            label = name if len(self.case.densities) == 1 else f"{name} {density:g}"
            # Processors that come and go would be compiled anew each time.
            self._prime(f"{label}, compiled", name, density, Run(self.case))

    def _prime(self, label: str, name: str, density: float, own: Run | None = None) -> None:
        """Run the dense steps that a method learns from, and its first sparse ones."""
        from gen_accel import apply
        from gen_accel.planner.calibrated import CalibratedPlanner
        from gen_accel.planner.window import WindowPlanner

        policy = self.case.policy(name, density)
        handle = apply(own or self.run, policy, profile=True, compile=own is not None)
        if own is None:
            handle.remove()
        candidate = Candidate(label, False, density, handle, backend=self._fastest, own=own)
        engine = handle.components[0].engine
        candidate.windows = isinstance(engine.planner, WindowPlanner)
        if isinstance(engine.planner, CalibratedPlanner):
            for step in range(max(0, self.last_dense - 1), self.last_dense + 1):
                out = self._forward(candidate, step)
            self._compare(candidate, out)
            candidate.extra = engine.stats.seconds.get("calibrate", 0.0)
        with first_call(self.case.seed) as seen:
            out = self._forward(candidate, self.last_dense + 1)
        candidate.error = seen[0].error if seen else None
        if seen and not seen[0].error <= seen[0].allowed:  # NaN is wrong too
            why = f"a call's error {seen[0].error:.1e}, allowed {seen[0].allowed:.1e}"
            self.wrong[label] = why
        elif not bool(out.isfinite().all()):
            self.wrong[label] = "its result is not finite"
        engine.profile = False
        stats = engine.stats
        numbers = [self.case.dtype if name == "auto" else name for name in stats.precision]
        candidate.precision = "+".join(numbers) or self.case.dtype
        if not stats.sparse:
            self.wrong[label] = f"no call ran sparse: {', '.join(stats.dense)}"
        self.candidates.append(candidate)

    def _tolerance(self, stock: Candidate) -> float:
        """How far rounding moves the stock result, a few times: what a right one may differ by.

        Its input is changed in the last place, after which every rounding behind falls otherwise.
        """
        import torch

        given = self.run.inputs[_LATENTS]
        generator = torch.Generator(given.device).manual_seed(self.case.seed)
        noise = torch.randn(
            given.shape, generator=generator, device=given.device, dtype=torch.float32
        )
        moved = given.float() * (1 + torch.finfo(self.run.dtype).eps * noise)
        self.run.inputs[_LATENTS] = moved.to(given.dtype)
        try:
            moves = self._distance(self._forward(stock, self.last_dense))
            return max(_ROUNDING * moves, _LEAST)
        finally:
            self.run.inputs[_LATENTS] = given

    def _distance(self, out: Tensor) -> float:
        """Relative distance to the stock result."""
        right = self._right.float()
        return float((out.float() - right).norm() / right.norm())

    def _compare(self, candidate: Candidate, out: Tensor) -> None:
        """A dense forward has to be the stock one, up to rounding."""
        candidate.error = self._distance(out)
        allowed = 0.2 if candidate.name in _LOSSY else self._allowed
        if not candidate.error <= allowed:  # NaN is wrong too
            self.wrong[candidate.name] = f"error {candidate.error:.1e}, allowed {allowed:.1e}"

    def _set_backend(self, transformer: Any, name: str) -> None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
        from diffusers.utils import logging

        logging.set_verbosity_error()  # each time: that backends are an experimental feature
        before = registry._active_backend
        transformer.set_attention_backend(name)
        registry._active_backend = before  # diffusers would switch every model's

    # ---- forwards --------------------------------------------------------------------------------

    def _forward(self, candidate: Candidate, step: int | None = None) -> Tensor:
        """One forward with the candidate's processors; a sparse step if it has any."""
        import torch

        handle = candidate.handle
        components = handle.components if handle is not None and candidate.own is None else []
        run = candidate.own or self.run
        if self.backends and candidate.own is None:
            self._set_backend(run.transformer, candidate.backend)
        for component in components:
            component.install()
        try:
            out = run.forward(self._next(candidate) if step is None else step)
            if self.case.device == "cuda":
                torch.cuda.synchronize()
            return out
        finally:
            for component in components:
                component.remove()

    def _next(self, candidate: Candidate) -> int:
        """The steps behind the dense ones, one after the other."""
        first, steps = self.last_dense + 1, self.case.model.steps
        candidate.turn += 1
        return first + candidate.turn % max(1, steps - first)

    def _one(self, candidate: Candidate) -> None:
        self._forward(candidate)

    def _seconds(self, candidate: Candidate) -> float:
        started = time.perf_counter()
        self._forward(candidate)
        return time.perf_counter() - started

    def _profile(self, candidate: Candidate) -> None:
        """Parts, memory and energy: measured apart, for looking costs time."""
        import torch

        from gen_accel.eval.energy import Energy

        cuda = self.case.device == "cuda"
        engines = [c.engine for c in candidate.handle.components] if candidate.handle else []
        for engine in engines:
            engine.profile = True
            engine.stats.seconds.clear()
        before = 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        # What is compiled must not meet a clock.
        looked = not engines and candidate.own is None
        sdpa: list[float] = []
        with (
            Energy(self.case.device) as energy,
            _timed_sdpa(sdpa, cuda) if looked else nullcontext(),
        ):
            started = time.perf_counter()
            self._forward(candidate)
            total = time.perf_counter() - started  # ending the meter takes time, too
        candidate.joules = energy.joules
        if cuda:
            candidate.peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        if looked:
            candidate.parts = {"dense": sum(sdpa), "rest": total - sum(sdpa)}
        for engine in engines:
            engine.profile = False
            seconds = engine.stats.seconds
            parts = {part: seconds[part] for part in _PARTS if part in seconds}
            candidate.parts = {**parts, "rest": total - sum(parts.values())}
            if not candidate.dense:
                candidate.density = engine.stats.mean_density
        self.say(f"{candidate.name}: {total:.2f} s")


@contextmanager
def _timed_sdpa(seconds: list[float], synchronize: bool) -> Iterator[None]:
    """Append the seconds of every self-attention that diffusers' own processors compute."""
    import torch
    import torch.nn.functional as F

    original = F.scaled_dot_product_attention

    def timed(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape != key.shape:
            return original(query, key, *args, **kwargs)
        if synchronize:
            torch.cuda.synchronize()
        started = time.perf_counter()
        out = original(query, key, *args, **kwargs)
        if synchronize:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        return out

    F.scaled_dot_product_attention = timed
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
