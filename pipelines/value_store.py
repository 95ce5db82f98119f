"""Keys and values of an inversion, kept for the way back."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

_GIB = 2**30


class Call(NamedTuple):
    """One evaluation of the network.

    A step back over an interval uses what the step forth over the same interval saw, although the
    two begin at different ends: the interval is the key, not the noise level.

    Attributes:
        interval: Number of the step, counted from the data.
        stage: 0 at the beginning of the step, 1 in its middle.
    """

    interval: int
    stage: int


class ValueStore:
    """What attention saw, by call and layer.

    Args:
        calls: Calls worth keeping; None keeps all.
        layers: Layers worth keeping; None keeps all.
        keys: Keep keys too.
        offload: Keep them in CPU memory.
    """

    def __init__(
        self,
        *,
        calls: frozenset[Call] | None = None,
        layers: frozenset[int] | None = None,
        keys: bool = False,
        offload: bool = True,
    ) -> None:
        self.calls = calls
        self.layers = layers
        self.keys = keys
        self.offload = offload
        self._kept: dict[tuple[Call, int], tuple[Tensor, Tensor | None]] = {}

    def wants(self, call: Call, layer: int) -> bool:
        """Whether this layer of this call is worth keeping."""
        return (self.calls is None or call in self.calls) and (
            self.layers is None or layer in self.layers
        )

    def save(self, call: Call, layer: int, v: Tensor, k: Tensor) -> None:
        """Keep the values (and keys) of the video tokens, ``[batch, tokens, heads, head_dim]``."""
        if self.wants(call, layer):
            self._kept[call, layer] = self._put(v), self._put(k) if self.keys else None

    def load(self, call: Call, layer: int, like: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Values and keys on the device of ``like``, or None where nothing was to be kept.

        Raises:
            KeyError: It was to be kept and is not there: these are other steps, or another solver.
        """
        if not self.wants(call, layer):
            return None
        if (call, layer) not in self._kept:
            raise KeyError(f"{call}, layer {layer}: not in the store; invert with the same steps")
        v, k = self._kept[call, layer]
        return v.to(like), None if k is None else k.to(like)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for pair in self._kept.values() for t in pair if t is not None)

    def _put(self, x: Tensor) -> Tensor:
        return x.to("cpu", copy=True) if self.offload else x.clone()


def estimate(calls: int, layers: int, tokens: int, width: int, itemsize: int, keys: bool) -> int:
    """Bytes a store will hold: ``calls x layers x tokens x width x itemsize``, twice with keys."""
    return calls * layers * tokens * width * itemsize * (2 if keys else 1)


def check_fits(
    needed: int, device: torch.device, limit: float | None = None, *, steps: int, layers: int
) -> None:
    """Refuse before memory runs out instead of after.

    Args:
        needed: Bytes.
        device: Where they would be.
        limit: GiB allowed; None: four fifths of what is free.
        steps: They are of so many steps.
        layers: They are of so many layers.

    Raises:
        ValueError: They do not fit; the message names what would.
    """
    free = _free(device)
    allowed = limit * _GIB if limit is not None else None if free is None else 0.8 * free
    if allowed is not None and needed > allowed:
        ways = _ways(allowed / needed, steps, layers)
        raise ValueError(
            f"the inversion would keep {needed / _GIB:.1f} GiB on {device} and "
            f"{allowed / _GIB:.1f} GiB are allowed: {ways}preserve='latent' keeps none, or raise "
            "cache_limit"
        )


def _ways(share: float, steps: int, layers: int) -> str:
    """Settings that take at most this share of the memory of all steps and layers."""
    of_steps, of_layers = int(share * steps), int(share * layers)
    ways = []
    if of_steps:
        ways.append(f"value_steps={of_steps} (of {steps}) fits")
    if of_layers:
        ways.append(f"value_layers of {of_layers} layers (of {layers}) fit")
    if not ways and (single := int(share * steps * layers)):
        ways.append(f"value_steps=1 with {single} value_layers (of {layers}) fits")
    return "".join(f"{way}, " for way in ways)


def _free(device: torch.device) -> int | None:
    """Free bytes, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
