"""One file per DiT family; these two functions find the right one.

The families are imported on first use, so that importing this package does not import diffusers.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gen_accel.families.base import Family, Match

NAMES = ("wan", "hunyuan_video", "flux", "cosmos")


@cache
def families() -> tuple[Family, ...]:
    """All families."""
    return tuple(importlib.import_module(f"gen_accel.families.{name}").FAMILY for name in NAMES)


def family_of(transformer: nn.Module) -> Family:
    """The family of a diffusers transformer, by class name; subclasses belong to their parent's.

    Args:
        transformer: The model, compiled or not.

    Raises:
        ValueError: No family serves this class.
    """
    transformer = getattr(transformer, "_orig_mod", transformer)
    by_class = {cls: family for family in families() for cls in family.transformers}
    for cls in type(transformer).__mro__:
        if cls.__name__ in by_class:
            return by_class[cls.__name__]
    raise ValueError(
        f"{type(transformer).__name__}: no family serves this transformer; "
        f"use one of {', '.join(by_class)}"
    )


def processor_for(
    attn: nn.Module,
    encoder_hidden_states: Any = None,
    attention_mask: Tensor | None = None,
    rope: Any = None,
) -> Match:
    """What to do with one call of an attention module that is met without its transformer.

    For an object that the user set on every module by ``transformer.set_attn_processor``. It tells
    by the module and its arguments, the only things such an object sees.

    Args:
        attn: The attention module.
        encoder_hidden_states: As passed to the processor.
        attention_mask: As passed to the processor.
        rope: ``rotary_emb`` (Wan) or ``image_rotary_emb`` (the others), as passed.

    Raises:
        ValueError: The module belongs to no family we know for certain.
    """
    for family in families():
        match = family.match(attn, encoder_hidden_states, attention_mask, rope)
        if match is not None:
            return match
    raise ValueError(
        f"{type(attn).__name__}: cannot tell which model this attention module belongs to; "
        "use gen_accel.apply(pipe, processor), which looks at the transformer"
    )
