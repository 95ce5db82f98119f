"""What a carrier is: a module that can execute one attention call."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.prepare import AxisPlaces
from gen_accel.kernels.quant import Precision
from gen_accel.kernels.tail import Tail


class Call(NamedTuple):
    """One checked attention call.

    Attributes:
        q: ``[B, Sq, H, D]``, any strides.
        k: ``[B, Skv, H, D]``, same dtype and device.
        v: ``[B, Skv, H, D]``.
        blocks: Visible blocks, or None for all.
        scale: Factor of the scores.
        compute: dtype to compute in, or None: as exact as the inputs' dtype, whatever is fastest.
        return_lse: Whether the log-sum-exp is wanted.
        tail: What stands in for hidden blocks, or None. There is none without blocks.
        precision: How to quantise, or None. Then ``compute`` is None.
        places: The order that blocks and tail are in, where q, k, v and out are in the model's; or
            None where all are in one. Only carriers that are named in `api` get any.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Blocks | None
    scale: float
    compute: torch.dtype | None = None
    return_lse: bool = False
    tail: Tail | None = None
    precision: Precision | None = None
    places: AxisPlaces | None = None


class Carrier(Protocol):
    """The functions a carrier module has."""

    def missing(self) -> str | None:
        """Why nothing runs on this machine and how to change that, or None."""

    def limits(self, call: Call) -> str | None:
        """Why this call cannot run and the way out, in one line, or None."""

    def run(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Return out ``[B, Sq, H, D]`` in q's dtype, any strides, and lse fp32 ``[B, H, Sq]``.

        lse is the natural log-sum-exp of the scaled scores, or None when ``return_lse`` is not
        set. A query without a visible key has out = 0 and lse = -inf.
        """
