"""Queries, keys and values of real runs, to try settings on without running the model again."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_accel.install import apply
from gen_accel.layout import ForwardContext, TokenLayout
from gen_accel.planner.base import Planned
from gen_accel.processors import ParoProcessor


class Captured(NamedTuple):
    """One attention call.

    Attributes:
        layer: Layer index.
        context: When it happened.
        layout: Where video and text stand; padding is cut off.
        q: ``[batch, tokens, heads, head_dim]``, RoPE applied, in the model's order.
        k: Shape of q.
        v: Shape of q.
    """

    layer: int
    context: ForwardContext
    layout: TokenLayout
    q: Tensor
    k: Tensor
    v: Tensor


class _Watcher:
    """A planner whose calls all stay dense and are kept."""

    def __init__(self, steps: Container[int] | None, branches: int) -> None:
        self.layers = 0
        self.steps = steps
        self.branches = branches
        self.context = ForwardContext()
        self.seen: list[Captured] = []

    def begin(self, context: ForwardContext) -> None:
        self.context = context

    def lookup(
        self, layer: int, layout: TokenLayout, text: int, device: torch.device, heads: slice | None
    ) -> Planned | str:
        return "watched"

    def watches(self, layer: int) -> bool:
        wanted = self.steps is None or self.context.step in self.steps
        return wanted and self.context.branch < self.branches

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
        # Padding behind the text is neither a key nor a query of interest.
        padding = q.shape[1] - k.shape[1]
        layout = TokenLayout(layout.grid, layout.text_before, layout.text_after - padding)
        context = replace(self.context, layout=layout)
        q, k, v = (x.to("cpu", copy=True) for x in (q[:, : k.shape[1]], k, v))
        self.seen.append(Captured(layer, context, layout, q, k, v))


def capture(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: Container[int] | None = None,
    branches: int = 1,
    seed: int = 0,
    **call: Any,
) -> list[Captured]:
    """Run a pipeline dense and keep the attention calls of its first transformer.

    Args:
        pipe: The pipeline; a gen_accel processor on it is removed.
        prompts: One run each, with seeds ``seed``, ``seed + 1``, ...
        steps: Denoising steps to keep; None keeps all.
        branches: Forwards of a step to keep: 1 is the conditional one alone.
        seed: Seed of the first run's noise.
        **call: Arguments of the pipeline.

    Returns:
        The calls in the order they were made, on the CPU.
    """
    seen: list[Captured] = []
    with apply(pipe, ParoProcessor(dense_steps=1.0, min_tokens=0)) as handle:
        engine = handle.components[0].engine
        for number, prompt in enumerate(prompts):
            watcher = _Watcher(steps, branches)
            engine.planner = watcher
            generator = torch.Generator().manual_seed(seed + number)
            # Pixels are not looked at, so they are not decoded.
            pipe(**{"output_type": "latent", **call, "prompt": prompt, "generator": generator})
            seen += watcher.seen
    return seen
