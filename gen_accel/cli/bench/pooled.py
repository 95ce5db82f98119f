"""``gen-accel bench pooled``: blocks chosen in the call, and what a tail adds to it."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.attention import (
    AttentionBench,
    Candidate,
    cubic_grid,
    random_qkv,
    run_calls,
)
from gen_accel.cli.bench.options import TENSORS, add

if TYPE_CHECKING:
    from torch import Tensor

_TAILS = ("drop", "rectified", "joint", "joint/4", "joint+variance")
_RULES = {"block means": 1, "4x4 sub-blocks": 4}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, "tokens", *TENSORS)


def run(args: argparse.Namespace) -> int:
    """Print a table for each head size and dtype; 1 when a result was wrong."""
    return run_calls(PooledBench, args)


class PooledBench(AttentionBench):
    """Whole calls: q, k and v onto the curve, scores, lists, the tail, the carrier, the way back.

    Random queries and keys: what is chosen does not matter to the time, how much does.
    """

    kind = "pooled"

    def __init__(self, args: argparse.Namespace, dim: int, dtype: str) -> None:
        import torch

        from gen_accel.kernels.api import available
        from gen_accel.layout import TokenLayout
        from gen_accel.order.curve import CurveOrder

        self.args, self.dim, self.dtype = args, dim, dtype
        generator = torch.Generator().manual_seed(args.seed)
        self.q, self.k, self.v = random_qkv(args, args.tokens, dim, dtype, generator)
        self.layout = TokenLayout(cubic_grid(args.tokens))
        self.order: Any = CurveOrder()
        self.ordered = [self.order.reorder(x, self.layout) for x in (self.q, self.k, self.v)]
        self.no_flex = available()["flex"]
        self.wrong, self.timings = {}, {}
        self.right: dict[str, Tensor] = {}
        self.candidates = self._candidates()

    def _candidates(self) -> list[Candidate]:
        from gen_accel.kernels.api import block_sparse_attention
        from gen_accel.kernels.reference import attention
        from gen_accel.planner.pooled import PooledPlanner
        from gen_accel.select.pooled import PooledSetting
        from gen_accel.tail import TailSetting

        found = self._dense()
        scale = self.dim**-0.5
        for density in self.args.densities:
            for rule, parts in _RULES.items():
                setting = PooledSetting(density=density, parts=parts)
                planner = PooledPlanner(setting, self.order, self.args.block)
                planned: Any = planner.lookup(0, self.layout, 0, self.q.device, None)
                blocks = planned.blocks(*self.ordered[:2])[0]
                for tail in _TAILS if parts == 1 else ("drop",):
                    mask, stands = f"{density:g}, {rule}, {tail}", TailSetting.parse(tail)

                    def whole(planned: Any = planned, stands: TailSetting = stands) -> Tensor:
                        q, k, v = (
                            self.order.reorder(x, self.layout) for x in (self.q, self.k, self.v)
                        )
                        blocks, scores = planned.blocks(q, k)
                        made = stands.make(q, k, v, blocks, pooled=planned.pooled, scores=scores)
                        out = block_sparse_attention(q, k, v, blocks, tail=made)
                        return self.order.restore(out, self.layout)

                    q, k, v = self.ordered
                    made = stands.make(q, k, v, blocks, pooled=planned.pooled)
                    exact = attention(*(x.float() for x in self.ordered), blocks, scale, made)[0]
                    self.right[mask] = self.order.restore(exact, self.layout)
                    found.append(Candidate("whole call", whole, mask, blocks))
                    if tail == "drop":
                        alone = partial(self._select, planned, mask)
                        found.append(Candidate("selection alone", alone, mask, blocks))
        return found

    def _select(self, planned: Any, mask: str) -> Tensor:
        planned.blocks(*self.ordered[:2])
        return self.right[mask]

    def _right(self, candidate: Candidate) -> Tensor:
        return self.right[candidate.mask]
