"""Checks of settings: the value, the rule, and what is meant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """Refuse what is no number, or none of a range.

    Args:
        name: Of the setting.
        value: Of the setting.
        low: Least.
        high: Largest.
        above: It is larger than this.
        below: It is less than this.
        whole: No fractions.
        optional: None is fine.

    Raises:
        TypeError: No number.
        ValueError: Out of range.
    """
    if value is None and optional:
        return
    kind = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind):
        what = f"a {'whole ' * whole}number{' or None' * optional}"
        raise TypeError(f"{name}={value!r}: give {what}")
    if not (low <= value <= high and above < value < below):
        limits = {"at least": low, "at most": high, "above": above, "below": below}
        rules = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
        rule = " and ".join(rules) or "that is finite"
        raise ValueError(f"{name}={value!r}: give a number {rule}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        TypeError: It is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: give True or False")


def check_layers(name: str, value: Any, *, optional: bool = True) -> None:
    """Refuse what is no list of layers; whether a model has them is seen with the model.

    Raises:
        TypeError: No list of whole numbers.
    """
    if value is None and optional:
        return
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    if not listed or not all(isinstance(x, Integral) for x in value):
        raise TypeError(f"{name}={value!r}: give a list of layers, such as (3, 4)")
