"""Changes to attention by sets of video tokens: scaled pairs, replaced values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gen_accel.pipelines.value_store import Call, ValueStore

SCALINGS = ("key", "bias")
_ROWS = 64  # queries whose mass is measured, per clip


@dataclass(frozen=True)
class Scaling:
    """What some video tokens see of some others, weakened or strengthened.

    ``"key"`` multiplies the keys, so the logits of these pairs are multiplied by ``factor``: it
    sharpens or flattens, and lowers attention only where logits are positive. ``"bias"`` adds
    ``log(factor)`` to them, which multiplies these pairs' share before normalisation.

    Attributes:
        queries: bool ``[batch, tokens]``, video tokens whose view changes.
        keys: bool ``[batch, tokens]``, video tokens they see differently.
        factor: 1 changes nothing.
        kind: ``"key"`` or ``"bias"``.
    """

    queries: Tensor
    keys: Tensor
    factor: float
    kind: str = "key"


@dataclass
class Surgery:
    """What to do in the coming forwards; an `gen_accel.pipelines.intercept.Around`.

    Attributes:
        video: Where the video tokens stand.
        store: Values of the inversion.
        call: Which evaluation this is.
        save: Put values (and keys) of the video tokens into the store.
        load: bool ``[batch, tokens]``: video tokens that get the store's values back, or None.
        load_keys: Give them their keys back too.
        scaling: Scaled pairs, or None.
        measure: Layers where the mass that a scaling moves is measured.
        moved: ``(before, after)`` share of the scaled queries' attention that goes to the scaled
            keys, per measured call and clip.
    """

    video: slice
    store: ValueStore | None = None
    call: Call | None = None
    save: bool = False
    load: Tensor | None = None
    load_keys: bool = False
    scaling: Scaling | None = None
    measure: frozenset[int] = frozenset()
    moved: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(  # noqa: D102
        self, attend: Any, q: Tensor, k: Tensor, v: Tensor, *, layer: int, mask: Tensor | None
    ) -> Tensor:
        if self.load is not None:
            k, v = self._loaded(k, v, layer)
        if self.save and self.store is not None and self.call is not None:
            self.store.save(self.call, layer, v[:, self.video], k[:, self.video])
        out = attend(q, k, v)
        return out if self.scaling is None else self._scaled(attend, out, q, k, v, layer, mask)

    def _loaded(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        assert self.store is not None and self.call is not None and self.load is not None
        kept = self.store.load(self.call, layer, v)
        if kept is None:
            return k, v
        kept_v, kept_k = kept
        v = self._replace(v, kept_v)
        if self.load_keys:
            assert kept_k is not None, "the store was made without keys"
            k = self._replace(k, kept_k)
        return k, v

    def _replace(self, x: Tensor, kept: Tensor) -> Tensor:
        assert self.load is not None
        x = x.clone()
        x[:, self.video] = torch.where(self.load[:, :, None, None], kept, x[:, self.video])
        return x

    def _scaled(
        self, attend: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor, layer: int,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attention once more with the scaled keys, taken over by the chosen queries.

        Two calls instead of a mask over pairs: any kernel can do it, in O(tokens) memory.
        """
        scaling = self.scaling
        assert scaling is not None
        if scaling.factor == 1.0 or not bool(scaling.queries.any() & scaling.keys.any()):
            return out
        queries = _on_sequence(scaling.queries, k, self.video)
        keys = _on_sequence(scaling.keys, k, self.video)
        if layer in self.measure:
            self.moved.append(_moved(q, k, queries, keys, scaling, mask))
        if scaling.kind == "key":
            scaled = attend(q, scale_keys(k, keys, scaling.factor), v)
        else:
            bias = torch.zeros(keys.shape, dtype=q.dtype, device=q.device)
            scaled = attend(q, k, v, bias.masked_fill(keys, math.log(scaling.factor)))
        return torch.where(queries[:, :, None, None], scaled, out)


def scale_keys(k: Tensor, keys: Tensor, factor: float) -> Tensor:
    """``k`` with the chosen keys ``[batch, tokens]`` multiplied."""
    return torch.where(keys[:, :, None, None], k * factor, k)


def _on_sequence(tokens: Tensor, like: Tensor, video: slice) -> Tensor:
    out = torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device)
    out[:, video] = tokens
    return out


def _moved(
    q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, scaling: Scaling, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean share of the scaled queries' attention on the scaled keys, before and after: [batch]."""
    # The first of the chosen queries, spread out by a fixed stride; the same for every head.
    order = queries.float() * torch.linspace(2, 1, queries.shape[1], device=q.device)
    count = min(_ROWS, int(queries.sum(1).max()))
    places = order.argsort(dim=1, descending=True)[:, :: max(1, int(queries.sum(1).max()) // count)]
    places = places[:, :count]
    valid = queries.gather(1, places)
    rows = q.gather(1, places[:, :, None, None].expand(-1, -1, *q.shape[2:]))
    logits = torch.einsum("bqhd,bkhd->bhqk", rows.float(), k.float()) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else (
            logits + mask)  # fmt: skip
    on = keys[:, None, None, :]
    changed = logits * scaling.factor if scaling.kind == "key" else (
        logits + math.log(scaling.factor))  # fmt: skip

    def share(x: Tensor) -> Tensor:
        mass = (x.softmax(-1) * on).sum(-1).mean(1)  # heads
        return (mass * valid).sum(1) / valid.sum(1).clamp(min=1)

    return share(logits), share(torch.where(on, changed, logits))
