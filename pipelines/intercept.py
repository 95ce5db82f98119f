"""Stand between a transformer's attention modules and whatever computes their attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gen_accel.families import family_of
from gen_accel.families.base import Attend, FamilyProcessor
from gen_accel.hoist import hoist_order


class Around(Protocol):
    """Called in place of a layer's attention; ``attend(q, k, v)`` computes what was asked for.

    Shapes: q, k, v and the result ``[batch, tokens, heads, head_dim]``, tokens in the model's own
    order, norms and RoPE applied. ``mask`` is the model's own.
    """

    def __call__(  # noqa: D102
        self, attend: Any, q: Tensor, k: Tensor, v: Tensor, *, layer: int, mask: Tensor | None
    ) -> Tensor: ...


@contextlib.contextmanager
def intercept(transformer: nn.Module, around: Around) -> Iterator[int]:
    """Route the video self-attention of a transformer through a function.

    Works with any processor of gen_accel that is installed: ``attend`` is then the accelerated
    call. Without one it is diffusers' own dense attention.

    Args:
        transformer: Of a family that gen_accel serves.
        around: What to call.

    Yields:
        The number of layers; they count as in `gen_accel.apply`.

    Raises:
        ValueError: No attention module of the transformer can be served.
    """
    family = family_of(transformer)
    taken: list[tuple[Any, Any]] = []
    for name, module in transformer.named_modules():
        processor: Any = getattr(module, "processor", None)
        if isinstance(processor, FamilyProcessor):
            attend: Attend = processor.attend
            kind, stock = type(processor), processor.stock
        elif processor is not None and family.keep(name, module) is None:
            attend, kind, stock = _dense, family.processors[type(processor).__name__], processor
        else:
            continue
        taken.append((module, processor))
        module.processor = kind(_through(attend, around, len(taken) - 1), len(taken) - 1, stock)
        if isinstance(processor, FamilyProcessor):
            module.processor.layer = processor.layer  # the engine behind it counts by this one
    if not taken:
        raise ValueError(f"{type(transformer).__name__}: no attention module can be intercepted")
    unhoisted = _unhoist(transformer)
    try:
        yield len(taken)
    finally:
        if unhoisted is not None:
            unhoisted.hoist = unhoisted.planner.hoist = hoist_order(
                transformer, unhoisted.planner.order
            )
        for module, processor in taken:
            module.processor = processor


def _unhoist(transformer: nn.Module) -> Any:
    """Have an order applied per call instead of once per forward, or tokens would not be ours."""
    component: Any = getattr(transformer, "_gen_accel", None)
    if component is None or component.hoist is None:
        return None
    component.hoist.remove()
    component.hoist = component.planner.hoist = None
    return component


def _through(attend: Attend, around: Around, number: int) -> Attend:
    def through(
        q: Tensor, k: Tensor, v: Tensor, *, layer: int | Tensor, backend: Any,
        mask: Tensor | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        def inner(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            if bias is not None:  # block lists know no bias
                return _dense(q, k, v, layer=layer, backend=backend, mask=_biased(mask, bias))
            return attend(q, k, v, layer=layer, backend=backend, mask=mask, **options)

        return around(inner, q, k, v, layer=number, mask=mask)

    return through


def _dense(
    q: Tensor, k: Tensor, v: Tensor, *, layer: int | Tensor, backend: Any,
    mask: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)


def _biased(mask: Tensor | None, bias: Tensor) -> Tensor:
    """The model's mask over keys and a bias on keys ``[batch, keys]`` as one additive mask."""
    bias = bias[:, None, None, :]
    if mask is None:
        return bias
    if mask.dtype != torch.bool:
        return mask + bias
    return bias.masked_fill(~mask, float("-inf"))
