"""Tokens that everybody looks at, whatever they hold: global attention sinks (GAS)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gen_accel.pipelines.checks import check_number

SINKS = ("none", "drop", "redirect")


@dataclass(frozen=True)
class SinkRule:
    """When a token counts as a sink. The paper's rule was not found; this one is ours.

    Attributes:
        kappa: It receives at least this many times the attention of an average key.
        uniformity: Deviation over mean of what it receives, at most: sinks get the same from
            every query, objects get more from their own.
        run: Consecutive layers in which both hold.
    """

    kappa: float = 20.0
    uniformity: float = 1.0
    run: int = 3

    def __post_init__(self) -> None:
        check_number("kappa", self.kappa, above=1)  # 1 is an average key
        check_number("uniformity", self.uniformity, above=0)
        check_number("run", self.run, low=1, whole=True)


def sink_candidates(mass: Tensor, uniformity: Tensor, keys: Tensor, rule: SinkRule) -> Tensor:
    """Where a token looks like a sink, layer by layer.

    Args:
        mass: ``[layers, ..., tokens]``, mean attention received, see `gen_accel.pipelines.probe`.
        uniformity: Shape of mass.
        keys: Number of tokens that are attended to, ``[...]`` or 0-D.
        rule: The rule.

    Returns:
        bool, shape of mass.
    """
    return (mass * keys[..., None] >= rule.kappa) & (uniformity <= rule.uniformity)


def find_sinks(mass: Tensor, uniformity: Tensor, keys: Tensor, rule: SinkRule) -> Tensor:
    """Tokens that are candidates in `SinkRule.run` consecutive layers; arguments as above.

    Returns:
        bool ``[..., tokens]``. With fewer layers than ``run`` they must hold in all.
    """
    found = sink_candidates(mass, uniformity, keys, rule)
    run = min(rule.run, len(found))
    return found.unfold(0, run, 1).all(-1).any(0)


def merge_heads(mass: Tensor, uniformity: Tensor) -> tuple[Tensor, Tensor]:
    """Mean mass over heads, and uniformity weighted by mass: ``[batch, heads, keys]`` to
    ``[batch, keys]``. A sink of one head must not be blamed for the heads that ignore it.
    """
    total = mass.sum(1).clamp(min=torch.finfo(mass.dtype).tiny)
    return mass.mean(1), (mass * uniformity).sum(1) / total
