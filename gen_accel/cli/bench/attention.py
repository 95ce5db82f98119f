"""``gen-accel bench attention``: one call, every way of computing it side by side in one run.

*Whole call* is what a transformer pays: q, k and v into each head's order, the carrier, and the
result back. *Kernel* is the carrier alone, on tensors that are in order.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.masks import calibrated_mask, uniform_mask
from gen_accel.cli.bench.options import DTYPES, TENSORS, add

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gen_accel.eval.harness import Timing
    from gen_accel.kernels.blocks import Blocks

SDPA = "SDPA"
FLEX = "FlexAttention"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, "tokens", *TENSORS)


def run(args: argparse.Namespace) -> int:
    """Print a table for each head size and dtype; 1 when a result was wrong."""
    return run_calls(AttentionBench, args)


def run_calls(kind: type[AttentionBench], args: argparse.Namespace) -> int:
    """`run` of any benchmark of calls."""
    import torch

    from gen_accel.eval.harness import append_rows

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
    return 0 if good else 1


@dataclass(frozen=True)
class Candidate:
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
        """Mask and name."""
        return f"{self.mask} {self.name}"


def random_qkv(
    args: argparse.Namespace, tokens: int, dim: int, dtype: str, generator: torch.Generator
) -> list[Tensor]:
    """``[1, tokens, heads, dim]`` each, the same on every device."""
    import torch

    shape, kind = (1, tokens, args.heads, dim), getattr(torch, DTYPES[dtype])
    return [torch.randn(shape, generator=generator).to(args.device, kind) for _ in range(3)]


class AttentionBench:
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
        self.layout = TokenLayout(cubic_grid(args.tokens))
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

    def _dense(self) -> list[Candidate]:
        import torch.nn.functional as F

        from gen_accel.kernels.api import block_sparse_attention

        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))

        # A model's tensors have the heads behind the tokens; SDPA sees them through a view.
        q1, k1, v1 = (x.contiguous() for x in (q, k, v))
        plain = (self.q, self.k, self.v)
        return [
            Candidate(SDPA, lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2)),
            Candidate(
                "SDPA, heads first in memory",
                lambda: F.scaled_dot_product_attention(q1, k1, v1).transpose(1, 2),
            ),
            Candidate("no blocks", partial(block_sparse_attention, *plain)),
            # The log-sum-exp, which SDPA does not give, asks for the form of the sparse carrier.
            Candidate(
                "as the sparse carrier computes",
                lambda: block_sparse_attention(*plain, return_lse=True)[0],
            ),
        ]

    def _candidates(self) -> list[Candidate]:
        from gen_accel.kernels.api import block_sparse_attention

        def whole(blocks: Blocks) -> Tensor:
            q, k, v = (self.order.reorder(x, self.layout) for x in (self.q, self.k, self.v))
            return self.order.restore(block_sparse_attention(q, k, v, blocks), self.layout)

        found = self._dense()
        for mask, blocks in self.masks.items():
            kernel = partial(block_sparse_attention, *self.ordered, blocks)
            if self.no_flex is None:
                found.append(Candidate(FLEX, partial(kernel, impl="flex"), mask, blocks, True))
            found.append(Candidate("kernel", kernel, mask, blocks, True))
            found.append(Candidate("whole call", partial(whole, blocks), mask, blocks))
        return found

    def _check(self) -> None:
        """Against the definition; SDPA's own error in this dtype says how near is right."""
        import torch

        def error(out: Tensor, right: Tensor) -> float:
            # Relative to the largest value: a sparse result averages fewer values, so is larger.
            return float((out.float() - right).abs().max() / right.abs().max())

        answers = {"": exact((self.q, self.k, self.v))}
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

    def _right(self, candidate: Candidate) -> Tensor:
        """What all candidates of this mask have to give, in the model's order."""
        return self.order.restore(exact(self.ordered, candidate.blocks), self.layout)

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
            lines.append(f"  {FLEX} was not measured: {self.no_flex}")
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

    def _baselines(self, candidate: Candidate) -> dict[str, Timing | None]:
        dense = [
            self.timings[c.key] for c in self.candidates if not c.mask and c.key in self.timings
        ]
        flex = candidate.mask and self.timings.get(f"{candidate.mask} {FLEX}")
        return {
            SDPA: self.timings.get(f" {SDPA}"),
            "fastest dense": min(dense, key=lambda t: t.median, default=None),
            FLEX: flex or None,
        }


def exact(tensors: Sequence[Tensor], blocks: Blocks | None = None) -> Tensor:
    """By the definition, in fp32."""
    from gen_accel.kernels.api import block_sparse_attention

    return block_sparse_attention(*(x.float() for x in tensors), blocks, impl="reference")


def cubic_grid(tokens: int) -> Any:
    """The most cubic grid of that many tokens."""
    from gen_accel.layout import TokenGrid

    def largest(number: int, limit: int) -> int:
        return max(d for d in range(1, max(1, limit) + 1) if number % d == 0)

    frames = largest(tokens, round(tokens ** (1 / 3)))
    height = largest(tokens // frames, math.isqrt(tokens // frames))
    return TokenGrid(frames, height, tokens // frames // height)
