"""``gen-accel bench gna``: a window on block edges beside the same window at stride 1."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.attention import (
    FLEX,
    AttentionBench,
    Candidate,
    exact,
    random_qkv,
    run_calls,
)
from gen_accel.cli.bench.options import TENSORS, add

if TYPE_CHECKING:
    from torch import Tensor


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, "grid", *TENSORS)


def run(args: argparse.Namespace) -> int:
    """Print a table for each head size and dtype; 1 when a result was wrong."""
    return run_calls(GnaBench, args)


class GnaBench(AttentionBench):
    """Whole calls: q, k and v into tiles, the carrier, the result back.

    For each density the best window of `suggest`, which no block sees in part, then its keys with a
    window of its own for each query: partial blocks, which are masked; in the same tiles, and in
    those a plan picks for them.
    """

    kind = "gna"

    def __init__(self, args: argparse.Namespace, dim: int, dtype: str) -> None:
        import torch

        from gen_accel.kernels.api import available
        from gen_accel.layout import TokenGrid, TokenLayout
        from gen_accel.select.gna import gna_plan
        from gen_accel.select.suggest import fitting_tile, suggest
        from gen_accel.select.window import Window

        self.layout = TokenLayout(TokenGrid(*args.grid))
        tile = fitting_tile(args.grid, args.block)
        sizes = {"tokens": self.layout.tokens, "block": math.prod(tile)}
        self.args = argparse.Namespace(**{**vars(args), **sizes})
        self.dim, self.dtype = dim, dtype
        generator = torch.Generator().manual_seed(args.seed)
        self.q, self.k, self.v = random_qkv(args, self.layout.tokens, dim, dtype, generator)
        self.plans = {}
        for density in args.densities:
            sparse = suggest(args.grid, density, tile)[0]
            single = Window(sparse.grid, sparse.size)
            for window, tiles in ((sparse, tile), (single, tile), (single, "auto")):
                plan = gna_plan(args.grid, window, tile=tiles, device=args.device)
                settings = (window.size, window.stride, plan[0].tile)
                name = "window {}, stride {}, tile {}".format(*map(_times, settings))
                self.plans[name] = plan
        self.no_flex = available()["flex"]
        self.wrong, self.timings = {}, {}
        self.candidates = self._candidates()

    def _whole(self, mask: str, attend: Callable[..., Tensor]) -> Tensor:
        order, blocks = self.plans[mask]
        q, k, v = (order.reorder(x, self.layout) for x in (self.q, self.k, self.v))
        return order.restore(attend((q, k, v), blocks), self.layout)

    def _candidates(self) -> list[Candidate]:
        from gen_accel.kernels.api import block_sparse_attention

        def carrier(impl: str) -> Callable[..., Tensor]:
            return lambda tensors, blocks: block_sparse_attention(*tensors, blocks, impl=impl)

        ways = {FLEX: carrier("flex")} if self.no_flex is None else {}
        ways["whole call"] = carrier("auto")
        return self._dense() + [
            Candidate(name, partial(self._whole, mask, attend), mask, blocks)
            for mask, (_, blocks) in self.plans.items()
            for name, attend in ways.items()
        ]

    def _right(self, candidate: Candidate) -> Tensor:
        return self._whole(candidate.mask, exact)


def _times(sizes: Any) -> str:
    return "x".join(map(str, sizes))
