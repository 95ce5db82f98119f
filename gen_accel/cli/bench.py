"""``gen-accel bench``: one attention call, every way of computing it side by side in one run.

*Whole call* is what a transformer pays: q, k and v into each head's order, the carrier, and the
result back. *Kernel* is the carrier alone, on tensors that are in order.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli import bench_e2e

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gen_accel.eval.harness import Timing
    from gen_accel.kernels.blocks import Blocks

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_DEFAULTS = {"densities": (0.25, 0.125), "suite": "hopper", "limit": 420, "piece_limit": 40}
_SDPA = "SDPA"
_FLEX = "FlexAttention"


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "bench",
        help="time an attention call against dense SDPA and FlexAttention",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "what",
        nargs="?",
        default="attention",
        choices=(
            "attention",
            "gna",
            "pooled",
            "tails",
            "mixtures",
            "precision",
            "kernel",
            "tune",
            "damage",
            "metrics",
            "e2e",
            "wipe",
            "ground",
        ),
        help="an attention call, GNA's windows, blocks chosen in the call, what tails mend, whole "
        "clips by mixture, what quantising costs, calls of real models on a GPU, tile sizes of the "
        "Triton kernel, which metric sees which damage, their cost, steps of whole transformers, "
        "removal of objects, what expressions mean",
    )
    parser.add_argument(
        "--tokens", type=_positive, default=8192, help="length of the sequence (attention)"
    )
    parser.add_argument(
        "--grid", type=_sizes, default="8x32x36", metavar="FxHxW", help="video tokens (gna)"
    )
    parser.add_argument("--heads", type=_positive, default=4, help="attention heads")
    parser.add_argument("--head-dims", type=_list(_positive), default=(64, 128), metavar="D,D")
    parser.add_argument("--dtypes", type=_list(_dtype), default=("fp32", "bf16"), metavar="T,T")
    parser.add_argument(
        "--densities",
        "--density",
        type=_list(_density),
        metavar="X,X",
        help="kept share (0.25,0.125; e2e: the suite's)",
    )
    parser.add_argument("--block", type=_positive, default=128, help="tokens per block")
    parser.add_argument("--repeats", type=_positive, default=15, help="rounds that are timed")
    parser.add_argument("--threads", type=_positive, help="CPU threads (torch decides)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="seed of tensors and masks")
    parser.add_argument("--out", help="append the results to this JSON-lines file")
    group = parser.add_argument_group("kernel, tune, e2e", "What is cut into pieces.")
    group.add_argument(
        "--suite", help="kernel, tune: hopper, or smoke: tiny, on the CPU; e2e: h200, cpu, smoke"
    )
    group.add_argument("--limit", type=float, help="seconds for all pieces (420; e2e: the suite's)")
    group.add_argument("--piece-limit", type=float, help="seconds for one piece (40; e2e: 240)")
    group.add_argument("--again", action="store_true", help="also what the file already holds")
    group.add_argument("--table", help="write the results as this Markdown page (tails too)")
    group.add_argument("--plot", help="write the rates (errors of tails) as this SVG")
    group = parser.add_argument_group("damage, metrics", "Clips of the procedural world.")
    group.add_argument("--clips", type=_positive, default=24, help="how many")
    group.add_argument("--frames", type=_positive, default=17, help="of each")
    group.add_argument("--size", type=_positive, default=64, help="of a frame's side, in pixels")
    group.add_argument(
        "--docs", help="put the table of damage, or of e2e, between the marks in this page"
    )
    group = parser.add_argument_group("tails, mixtures, precision", "Runs of a trained toy model.")
    group.add_argument("--model", default="hunyuan-video", help="which toy; e2e: which model")
    group.add_argument("--folder", help="where it is, when not in models/")
    group.add_argument("--prompts", type=_positive, default=4, help="captions on either side")
    group = parser.add_argument_group("wipe", "Object-WIPER, with --clips clips.")
    group.add_argument("--split", default="test", choices=("val", "test"), help="of the world")
    group.add_argument("--ablate", type=int, default=0, help="how many of them for ablations too")
    group.add_argument("--batch", type=_positive, default=10, help="clips at once")
    group = parser.add_argument_group("ground", "RefAM on expressions of the world's clips.")
    group.add_argument("--expressions", type=_positive, default=520, help="how many")
    group.add_argument(
        "--choose", action="store_true", help="choose layers and noise on validation scenes"
    )
    bench_e2e.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print a table for each head size and dtype; 1 when a result was wrong."""
    if args.what != "e2e":
        for name, value in _DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    if args.what in ("kernel", "tune"):  # these run where only torch and triton are installed
        return importlib.import_module(f"gen_accel.cli.bench_{args.what}").run(args)
    import torch

    from gen_accel.cli import bench_damage
    from gen_accel.cli.bench_gna import GnaBench
    from gen_accel.cli.bench_pooled import PooledBench
    from gen_accel.eval.files import check_writable
    from gen_accel.eval.harness import append_rows

    kind = {"gna": GnaBench, "pooled": PooledBench}.get(args.what, _Bench)
    if args.out:
        check_writable(Path(args.out).parent)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no GPU; use --device cpu")
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.what in ("damage", "metrics"):
            return getattr(bench_damage, args.what)(args)
        if args.what in ("tails", "mixtures", "precision", "e2e", "wipe", "ground"):
            return importlib.import_module(f"gen_accel.cli.bench_{args.what}").run(args)
        good = True
        for dim in args.head_dims:
            for dtype in args.dtypes:
                with torch.no_grad():
                    bench = kind(args, dim, dtype)
                    bench.time()
                print(bench.table(), flush=True)
                good &= not bench.wrong
                if args.out:
                    append_rows(args.out, bench.rows())
    finally:
        torch.set_num_threads(threads)
    return 0 if good else 1


@dataclass(frozen=True)
class _Candidate:
    """One way of computing the call; ``blocks`` is None for the dense ones.

    The result of an ``ordered`` one still has its tokens in the head's order.
    """

    name: str
    run: Callable[[], Tensor]
    mask: str = ""
    blocks: Blocks | None = None
    ordered: bool = False

    @property
    def key(self) -> str:
        return f"{self.mask} {self.name}"


def random_qkv(
    args: argparse.Namespace, tokens: int, dim: int, dtype: str, generator: torch.Generator
) -> list[Tensor]:
    """``[1, tokens, heads, dim]`` each, the same on every device."""
    import torch

    shape, kind = (1, tokens, args.heads, dim), getattr(torch, _DTYPES[dtype])
    return [torch.randn(shape, generator=generator).to(args.device, kind) for _ in range(3)]


class _Bench:
    """All candidates for one head size and dtype."""

    kind = "attention"

    def __init__(self, args: argparse.Namespace, dim: int, dtype: str) -> None:
        import torch

        from gen_accel.kernels.api import available
        from gen_accel.kernels.blocks import Blocks
        from gen_accel.layout import TokenLayout
        from gen_accel.order.axis import AXIS_ORDERS, axis_order

        self.args, self.dim, self.dtype = args, dim, dtype
        generator = torch.Generator().manual_seed(args.seed)
        self.q, self.k, self.v = random_qkv(args, args.tokens, dim, dtype, generator)
        self.layout = TokenLayout(_grid(args.tokens))
        self.order = axis_order([1 + i % (len(AXIS_ORDERS) - 1) for i in range(args.heads)])
        self.ordered = [self.order.reorder(x, self.layout) for x in (self.q, self.k, self.v)]

        def lists(mask: Tensor) -> Blocks:
            size = {"q_len": args.tokens, "kv_len": args.tokens, "block_size": args.block}
            return Blocks.from_mask(mask.to(args.device), **size)

        columns = math.ceil(args.tokens / args.block)
        self.masks = {
            f"{name} {density:g}": lists(make(args.heads, columns, density, generator))
            for density in args.densities
            for name, make in (("uniform", uniform_mask), ("calibrated", calibrated_mask))
        }
        self.no_flex = available()["flex"]
        self.wrong: dict[str, str] = {}
        self.timings: dict[str, Timing] = {}
        self.candidates = self._candidates()

    def time(self) -> None:
        """Check every candidate, then time those that are right."""
        from gen_accel.eval.harness import measure

        self._check()
        right = {c.key: c.run for c in self.candidates if c.key not in self.wrong}
        self.timings = measure(right, self.args.repeats, warmup=1, device=self.args.device)

    def _dense(self) -> list[_Candidate]:
        import torch.nn.functional as F

        from gen_accel.kernels.api import block_sparse_attention

        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))

        # A model's tensors have the heads behind the tokens; SDPA sees them through a view.
        q1, k1, v1 = (x.contiguous() for x in (q, k, v))
        plain = (self.q, self.k, self.v)
        return [
            _Candidate(_SDPA, lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2)),
            _Candidate(
                "SDPA, heads first in memory",
                lambda: F.scaled_dot_product_attention(q1, k1, v1).transpose(1, 2),
            ),
            _Candidate("no blocks", partial(block_sparse_attention, *plain)),
            # The log-sum-exp, which SDPA does not give, asks for the form of the sparse carrier.
            _Candidate(
                "as the sparse carrier computes",
                lambda: block_sparse_attention(*plain, return_lse=True)[0],
            ),
        ]

    def _candidates(self) -> list[_Candidate]:
        from gen_accel.kernels.api import block_sparse_attention

        def whole(blocks: Blocks) -> Tensor:
            q, k, v = (self.order.reorder(x, self.layout) for x in (self.q, self.k, self.v))
            return self.order.restore(block_sparse_attention(q, k, v, blocks), self.layout)

        found = self._dense()
        for mask, blocks in self.masks.items():
            kernel = partial(block_sparse_attention, *self.ordered, blocks)
            if self.no_flex is None:
                found.append(_Candidate(_FLEX, partial(kernel, impl="flex"), mask, blocks, True))
            found.append(_Candidate("kernel", kernel, mask, blocks, True))
            found.append(_Candidate("whole call", partial(whole, blocks), mask, blocks))
        return found

    def _check(self) -> None:
        """Against the definition; SDPA's own error in this dtype says how near is right."""
        import torch

        def error(out: Tensor, right: Tensor) -> float:
            # Relative to the largest value: a sparse result averages fewer values, so is larger.
            return float((out.float() - right).abs().max() / right.abs().max())

        answers = {"": _exact((self.q, self.k, self.v))}
        yardstick = error(self.candidates[0].run(), answers[""])
        allowed = 4 * yardstick + torch.finfo(self.q.dtype).eps
        for candidate in self.candidates:
            if candidate.mask not in answers:
                answers = {"": answers[""]}
                answers[candidate.mask] = self._right(candidate)
            out = candidate.run()
            if candidate.ordered:
                out = self.order.restore(out, self.layout)
            found = error(out, answers[candidate.mask])
            if not found <= allowed:  # NaN is wrong too
                self.wrong[candidate.key] = f"error {found:.1e}, allowed {allowed:.1e}"

    def _right(self, candidate: _Candidate) -> Tensor:
        """What all candidates of this mask have to give, in the model's order."""
        return self.order.restore(_exact(self.ordered, candidate.blocks), self.layout)

    # ---- results ---------------------------------------------------------------------------------

    def table(self) -> str:
        """The times of this head size and dtype, as text."""
        args = self.args
        lines = [
            f"\n{args.tokens} tokens, {args.heads} heads, head_dim {self.dim}, {self.dtype}, "
            f"blocks of {args.block}, median of {args.repeats}",
            f"{'':42}{'ms':>9}{'quartiles':>18}{'x SDPA':>9}{'x dense':>9}{'x Flex':>9}",
        ]
        heading = None
        for c in self.candidates:
            if c.mask != heading:
                heading = c.mask
                kept = "dense" if c.blocks is None else f"{c.mask} (kept {c.blocks.density():.3f})"
                lines.append(f"  {kept}")
            if c.key in self.wrong:
                lines.append(f"    {c.name:38} WRONG: {self.wrong[c.key]}")
                continue
            timing = self.timings[c.key]
            low, high = timing.spread
            span = f"{1e3 * low:.1f}..{1e3 * high:.1f}"
            speed = "".join(
                f"{'':>9}" if b is None else f"{timing.speedup_over(b):8.2f}x"
                for b in self._baselines(c).values()
            )
            lines.append(f"    {c.name:38}{1e3 * timing.median:9.1f}{span:>18}{speed}")
        if self.no_flex:
            lines.append(f"  {_FLEX} was not measured: {self.no_flex}")
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each time and each speed-up; none for what was wrong."""
        from gen_accel.eval.harness import result_row

        rows = []
        for c in self.candidates:
            if c.key in self.wrong:
                continue
            timing = self.timings[c.key]
            config = {
                "mask": c.mask or "dense",
                "density": 1.0 if c.blocks is None else c.blocks.density(),
                "dtype": self.dtype,
                "block": self.args.block,
            }
            common = {
                "n": self.args.repeats,
                "shape": self.q.shape,
                "seed": self.args.seed,
                "device": self.args.device,
            }
            spread = [1e3 * x for x in timing.spread]
            rows.append(
                result_row(
                    self.kind,
                    c.name,
                    1e3 * timing.median,
                    "ms",
                    spread=spread,
                    config=config,
                    **common,
                )
            )
            for baseline, other in self._baselines(c).items():
                if other is not None and other is not timing:
                    rows.append(
                        result_row(
                            f"{self.kind} speed-up",
                            c.name,
                            timing.speedup_over(other),
                            "x",
                            config={**config, "over": baseline},
                            **common,
                        )
                    )
        return rows

    def _baselines(self, candidate: _Candidate) -> dict[str, Timing | None]:
        dense = [
            self.timings[c.key] for c in self.candidates if not c.mask and c.key in self.timings
        ]
        flex = candidate.mask and self.timings.get(f"{candidate.mask} {_FLEX}")
        return {
            _SDPA: self.timings.get(f" {_SDPA}"),
            "fastest dense": min(dense, key=lambda t: t.median, default=None),
            _FLEX: flex or None,
        }


def _exact(tensors: Sequence[Tensor], blocks: Blocks | None = None) -> Tensor:
    """By the definition, in fp32."""
    from gen_accel.kernels.api import block_sparse_attention

    return block_sparse_attention(*(x.float() for x in tensors), blocks, impl="reference")


# ---- masks ---------------------------------------------------------------------------------------


def uniform_mask(heads: int, columns: int, density: float, generator: torch.Generator) -> Tensor:
    """Random lists, equally many blocks in every row."""
    import torch

    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    scores = torch.rand(1, heads, columns, columns, **options)
    kept = scores.topk(max(1, round(density * columns)), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def calibrated_mask(heads: int, columns: int, density: float, generator: torch.Generator) -> Tensor:
    """As a calibration makes them: one threshold for all heads, so that heads and rows differ.

    Each head has a diagonal of its own width, stray mass, and rows of different sharpness.
    """
    import torch

    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    place = torch.arange(columns, device=generator.device)
    distance = (place[:, None] - place).abs() / columns
    width = torch.logspace(-1.5, -0.2, heads, device=generator.device)[:, None, None]
    scores = torch.exp(-distance / width) / width
    scores = scores + 0.3 * torch.rand(heads, columns, columns, **options) ** 4
    scores = scores * torch.exp(0.5 * torch.randn(heads, columns, 1, **options))
    kept = max(heads * columns, round(density * scores.numel()))
    scores.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return (scores >= scores.flatten().topk(kept).values[-1])[None]


def _grid(tokens: int) -> Any:
    """The most cubic grid of that many tokens."""
    from gen_accel.layout import TokenGrid

    def largest(number: int, limit: int) -> int:
        return max(d for d in range(1, max(1, limit) + 1) if number % d == 0)

    frames = largest(tokens, round(tokens ** (1 / 3)))
    height = largest(tokens // frames, math.isqrt(tokens // frames))
    return TokenGrid(frames, height, tokens // frames // height)


# ---- options -------------------------------------------------------------------------------------


def _list(item: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(item(part.strip()) for part in text.split(","))

    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(map(_positive, text.split("x")))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be frames x height x width, as 8x32x36")
    return sizes


def _dtype(text: str) -> str:
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(_DTYPES)}")
    return text


def _density(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a share in (0, 1]")
    return value
