"""Pieces of ``gen-accel bench kernel``: candidates that are checked, then timed side by side.

A result has to be right before it is timed: some query blocks of some heads are compared with the
definition in fp64, on data nobody has seen before, with all memory that nobody wrote filled with
NaN, and all of it has to be finite. On random data nobody would miss a key: see `Piece.plant`.
"""

from __future__ import annotations

import gc
import math
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from gen_accel.cli.bench.kernel_sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.cli.bench.kernel import Case, Suite
    from gen_accel.eval.harness import Timing
    from gen_accel.kernels.blocks import Blocks
    from gen_accel.kernels.quant import Precision
    from gen_accel.kernels.tail import Tail

P = TypeVar("P", bound="Piece")

_TAILS = (None, "rectified", "joint")
_FEWEST = 5  # rounds, where 20 would not fit into a piece's time
_FACTOR = 4  # times the error of dense SDPA is right
_LOSSY_FACTOR = 2  # times the error of a quantised reference is
_BELOW = 9.0  # scores of keys stand so far below that of padding
LOSSY = 0.1  # error allowed to others' kernels that compute in 8 bits


@dataclass(frozen=True)
class Candidate:
    """One way of computing something.

    Attributes:
        name: What the table calls it.
        run: Does it.
        error: Relative L2 error of its result.
        config: What sets its row apart.
        allowed: Largest error; None takes a multiple of dense SDPA's own.
        ours: It has to work, and is checked with unwritten memory full of NaN.
    """

    name: str
    run: Callable[[], Any]
    error: Callable[[Any], float]
    config: dict[str, Any] = field(default_factory=dict)
    allowed: float | None = None
    ours: bool = True


def attempt(make: Callable[[], P], seconds: float, name: str) -> P | None:
    """Make and measure a piece; one that breaks is told, and the others go on without it."""
    import torch

    try:
        with torch.no_grad():
            piece = make()
            piece.measure(seconds)
    except Exception as reason:  # out of memory, a fault in a kernel, a bug
        print(f"{name}\n  FAILED: {told(reason)}", flush=True)
        return None
    print(piece.text(), flush=True)
    return piece


def told(reason: Exception) -> str:
    """One line."""
    return f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"


def free_gpu() -> bool:
    """Give back what dead tensors held; False where a kernel broke the GPU for this process."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError as reason:
        print(f"the GPU is lost to this process ({told(reason)}); run the command again")
        return False
    return True


class Piece:
    """Some candidates that are timed against each other.

    Attributes:
        absences: What a candidate raises that cannot run here; whatever else is a fault of ours.
    """

    absences: tuple[type[Exception], ...] = (ValueError, ImportError)

    def __init__(self, suite: Suite, case: Case, part: str, seed: int) -> None:
        import torch

        self.suite, self.case, self.part, self.seed = suite, case, part, seed
        self.generator = torch.Generator(suite.device).manual_seed(seed)
        self.q, self.k, self.v = (self._random(case.tokens) for _ in range(3))
        self.scale = case.dim**-0.5
        heavy = int(torch.randint(case.tokens, (), generator=torch.Generator().manual_seed(seed)))
        self.heavy = (heavy, case.tokens - 1)
        self.sample = Sample(case.tokens, case.block, case.heads, seed, [heavy // case.block])
        self.plant()
        self._rights: dict[tuple[int, int], Tensor] = {}
        self.errors: dict[str, float] = {}
        self.wrong: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        self.timings: dict[str, Timing] = {}
        self.candidates = self.build()

    def build(self) -> list[Candidate]:
        """The candidates of this part."""
        kind, _, density = self.part.partition(" ")
        if kind in ("dense", "around"):
            from gen_accel.cli.bench.kernel_around import around

            return self._dense() if kind == "dense" else around(self)
        if kind == "quantised":
            from gen_accel.cli.bench.kernel_codes import quantised

            return quantised(self, None if density == "dense" else float(density))
        lists = "realistic" if kind == "flex" else kind
        return self._sparse(lists, float(density), kind == "flex")

    def _random(self, tokens: int) -> Tensor:
        import torch

        shape = (1, tokens, self.case.heads, self.case.dim)
        options: dict[str, Any] = {"device": self.suite.device, "dtype": torch.bfloat16}
        return torch.randn(shape, generator=self.generator, **options)

    def plant(self) -> None:
        """Make faults with keys visible that random ones would average away.

        All keys score far below 0, so that a zero which counts as a key outweighs them (not where
        they are quantised, as their mean is subtracted then); the last key and one inside weigh
        about as much as all the others together.
        """
        import torch

        root = self.case.dim**0.5
        way = self._random(1)[0, 0, 0].sign()
        up = 0.5 * root  # how a key's score rises with a step on that way
        self.q += 0.5 * way
        self.k -= _BELOW / up * way
        weight = 0.5 * (1 + torch.tensor(float(self.case.tokens)).log()) - 0.7
        self.k[:, self.heavy] += weight / up * way

    # ---- candidates ------------------------------------------------------------------------------

    def _dense(self) -> list[Candidate]:
        import torch.nn.functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from gen_accel.kernels.blocks import Blocks

        tensors = (self.q, self.k, self.v)

        def sdpa(*backends: SDPBackend) -> Tensor:
            with sdpa_kernel(list(backends)):
                q, k, v = (x.transpose(1, 2) for x in tensors)
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        def candidate(name: str, run: Callable[[], Any], **options: Any) -> Candidate:
            config = {"lists": "dense", "density": 1.0, "tflop": self.tflop(None)}
            return Candidate(name, run, partial(self.error, None, None), config, **options)

        found = []
        if self.suite.device == "cuda":
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                name = f"SDPA, {backend.name.split('_')[0].lower()}"
                found.append(candidate(name, partial(sdpa, backend), ours=False))
            found.append(candidate("FA3", partial(fa3, *tensors), ours=False))
            found.append(
                candidate("sageattention", partial(sage, *tensors), allowed=LOSSY, ours=False)
            )
        else:
            either = partial(sdpa, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
            found.append(candidate("SDPA", either, ours=False))
        rows = -(-self.case.tokens // self.case.block)
        mask = self.q.new_ones(1, 1, rows, rows).bool()
        size = {"q_len": self.case.tokens, "kv_len": self.case.tokens}
        everything = Blocks.from_mask(mask, block_size=self.case.block, **size)
        for impl in self.suite.impls:
            found.append(candidate(impl, partial(self._attend, impl, None, None)))
            every = partial(self._attend, impl, everything, None)
            found.append(candidate(f"{impl}, all blocks listed", every))
        return found

    def _sparse(self, lists: str, density: float, flex: bool) -> list[Candidate]:
        blocks = self.blocks(lists, density)
        kept = blocks.full_kv_num_blocks.float() / blocks.num_kv_blocks
        config = {
            "lists": lists,
            "target": density,
            "density": blocks.density(),
            "densest_row": float(kept.max()),
            "tflop": self.tflop(blocks),
        }
        found = []
        for impl in ("flex",) if flex else self.suite.impls:
            for tail in _TAILS if lists == "realistic" and not flex else (None,):
                stand_in = self.tail(tail, blocks)
                found.append(
                    Candidate(
                        impl if tail is None else f"{impl}, {tail} tail",
                        partial(self._attend, impl, blocks, stand_in),
                        partial(self.error, blocks, stand_in),
                        {**config, "tail": tail or "drop"},
                        ours=not flex,
                    )
                )
        return found

    def _attend(self, impl: str, blocks: Blocks | None, tail: Tail | None) -> Tensor:
        from gen_accel.kernels.api import block_sparse_attention

        return block_sparse_attention(self.q, self.k, self.v, blocks, tail=tail, impl=impl)

    def tail(self, name: str | None, blocks: Blocks) -> Tail | None:
        """What stands in for hidden blocks of the video."""
        from gen_accel.kernels.tail import block_scores, pool_keys, rectify

        case, pooled = self.case, self.case.pooled
        if name == "joint":
            return pool_keys(self.k[:, :pooled], self.v[:, :pooled], case.block)
        if name == "rectified":
            size = (case.block, case.block)
            scores = block_scores(self.q, self.k, *size, pooled=pooled, scale=self.scale)
            return rectify(self.v, blocks, scores, pooled=pooled)
        return None

    def blocks(self, lists: str, density: float) -> Blocks:
        """Lists over the video's blocks; what holds text is seen by all and sees all."""
        import torch

        from gen_accel.cli.bench.masks import calibrated_mask, uniform_mask
        from gen_accel.kernels.blocks import Blocks

        case = self.case
        make = uniform_mask if lists == "uniform" else calibrated_mask
        rows = -(-case.tokens // case.block)
        video = -(-case.pooled // case.block)
        mask = torch.ones(1, case.heads, rows, rows, dtype=torch.bool, device=self.suite.device)
        mask[..., :video, :video] = make(case.heads, video, density, self.generator)
        size = {"q_len": case.tokens, "kv_len": case.tokens, "block_size": case.block}
        return Blocks.from_mask(mask, **size)

    def tflop(self, blocks: Blocks | None) -> float:
        """Operations on pairs of tokens that are kept."""
        import torch

        case = self.case
        pairs = float(case.heads * case.tokens**2)
        if blocks is not None:
            mask = blocks.mask()
            sizes = torch.full(mask.shape[-1:], case.block, dtype=torch.float64, device=mask.device)
            sizes[-1] = case.tokens - case.block * (len(sizes) - 1)
            pairs = float(sum(sizes @ head.double() @ sizes for head in mask[0]))
        return 4e-12 * case.dim * pairs

    # ---- right, then timed -----------------------------------------------------------------------

    def measure(self, seconds: float) -> None:
        """Check every candidate, then time those that are right, for about that long."""
        from gen_accel.eval.harness import measure

        allowed = self.allowed()
        for candidate in self.candidates:
            try:
                # Poison would make torch compile FlexAttention twice.
                with _poisoned() if candidate.ours else nullcontext():
                    result = candidate.run()
            except Exception as reason:
                # What is not installed or not made for this device may be absent; a fault may not.
                absent = isinstance(reason, self.absences) or not candidate.ours
                (self.absent if absent else self.wrong)[candidate.name] = told(reason)
                continue
            error = candidate.error(result) if _finite(result) else math.nan
            del result
            self.errors[candidate.name] = error
            limit = allowed if candidate.allowed is None else candidate.allowed
            if not error <= limit:  # NaN is wrong too
                self.wrong[candidate.name] = f"error {error:.1e}, allowed {limit:.1e}"
        right = {c.name: c.run for c in self.candidates if c.name in self.errors}
        right = {name: fn for name, fn in right.items() if name not in self.wrong}
        if not right:
            return
        rounds = self.suite.repeats
        if rounds > _FEWEST:
            start = time.monotonic()
            measure(right, 1, warmup=0, device=self.suite.device)
            fit = int(seconds / max(time.monotonic() - start, 1e-9))
            rounds = min(rounds, max(_FEWEST, fit))
        self.timings = measure(right, rounds, warmup=1, device=self.suite.device)

    def allowed(self) -> float:
        """Error allowed to what computes in the inputs' precision: a multiple of dense SDPA's."""
        return _FACTOR * self._off(self.sample.plain(self.q, self.k, self.v, self.scale))

    def lossy(self, precision: str, blocks: Blocks | None, tail: Tail | None) -> float:
        """Error allowed to a quantised call: a multiple of what its definition loses."""
        from gen_accel.kernels.quant import PRECISIONS

        quantised = self._right(blocks, tail, PRECISIONS[precision])
        return _LOSSY_FACTOR * self._off(quantised, blocks, tail)

    def error(self, blocks: Blocks | None, tail: Tail | None, out: Tensor) -> float:
        """Relative L2 error of a result, that of the sample's worst head and block."""
        return self._off(self.sample.pick(out), blocks, tail)

    def _off(self, some: Tensor, blocks: Blocks | None = None, tail: Tail | None = None) -> float:
        known = (id(blocks), id(tail))  # both live as long as the candidates that have them
        if known not in self._rights:
            self._rights[known] = self._right(blocks, tail)
        return self.sample.error(some, self._rights[known])

    def _right(
        self, blocks: Blocks | None, tail: Tail | None, precision: Precision | None = None
    ) -> Tensor:
        return self.sample.right(self.q, self.k, self.v, blocks, tail, self.scale, precision)

    # ---- results ---------------------------------------------------------------------------------

    def text(self) -> str:
        """A line per candidate."""
        lines = [f"{self.case.name}, {self.part}"]
        for c in self.candidates:
            if c.name in self.absent:
                lines.append(f"  {c.name:32} not measured: {self.absent[c.name]}")
            elif c.name in self.wrong:
                lines.append(f"  {c.name:32} WRONG: {self.wrong[c.name]}")
            else:
                timing = self.timings[c.name]
                low, high = (1e3 * x for x in timing.spread)
                rate = ""
                if "tflop" in c.config:
                    rate = f"{c.config['tflop'] / timing.median:9.1f} TFLOP/s"
                lines.append(
                    f"  {c.name:32}{1e3 * timing.median:10.3f} ms  {low:.3f}..{high:.3f}{rate}"
                    f"  density {c.config['density']:.3f}  error {self.errors[c.name]:.1e}"
                )
        return "\n".join(lines)

    def rows(self, suite: str) -> list[dict[str, Any]]:
        """A row for each candidate that ran; what was wrong has a reason instead of a time."""
        from gen_accel.eval.harness import result_row

        clock = _sm_clock() if self.suite.device == "cuda" else None
        common: dict[str, Any] = {"suite": suite, "case": self.case.name, "part": self.part}
        common |= {"dtype": "bf16", "block": self.case.block, "sm_clock_mhz": clock}
        where: dict[str, Any] = {"shape": self.q.shape, "seed": self.seed}
        where["device"] = self.suite.device
        rows = []
        for c in self.candidates:
            config = {**common, **c.config}
            if c.name in self.wrong:
                config["wrong"] = self.wrong[c.name]
                config.pop("tflop", None)  # no rate follows from it
                rows.append(wrong_row("kernel", c.name, config, **where))
            elif c.name in self.timings:
                timing = self.timings[c.name]
                numbers = {"n": len(timing.seconds), "spread": [1e3 * x for x in timing.spread]}
                config["error"] = self.errors[c.name]
                ms = 1e3 * timing.median
                rows.append(
                    result_row("kernel", c.name, ms, "ms", config=config, **numbers, **where)
                )
        return rows


def wrong_row(kind: str, name: str, config: dict[str, Any], **where: Any) -> dict[str, Any]:
    """A row without a time, so that no earlier one stands in for it."""
    from gen_accel.eval.harness import result_row

    return {**result_row(kind, name, 0.0, "ms", n=0, config=config, **where), "value": None}


def relative(found: Tensor, right: Tensor) -> float:
    """L2 norm of the difference over that of what is right."""
    right = right.double()
    return float((found.double() - right).norm() / right.norm())


def _finite(result: Any) -> bool:
    """Whether all of it is: what nobody wrote is NaN."""
    parts = result if isinstance(result, (list, tuple)) else [result]
    return all(bool(part.isfinite().all()) for part in parts)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds NaN."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SageAttention, guarded: the copy of k that it would spoil is part of the call."""
    from gen_accel.sage import dense

    return dense(q, k, v)


def fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 3, as its repository's ``hopper`` folder installs it."""
    from flash_attn_interface import flash_attn_func

    found = flash_attn_func(q, k, v)
    return found[0] if isinstance(found, tuple) else found  # early ones return the LSE, too


def _sm_clock() -> int | None:
    """MHz right after the piece, or None."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        return int(said.split()[0])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None
