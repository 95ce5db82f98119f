"""The registry: every metric by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from gen_accel.eval import clip, features, fidelity, fvd, grounding, guard, lpips, removal, temporal
from gen_accel.eval.dino import TOKENS, Dino
from gen_accel.eval.metric import Metric

# A module names its metrics beside their functions; one line here makes them known.
_MODULES = (fidelity, lpips, temporal, guard, removal, grounding, fvd, clip)
METRICS: dict[str, Metric] = {
    metric.name: metric for module in _MODULES for metric in module.METRICS
}


def get(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in METRICS:
        near = get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(METRICS)}"
        raise ValueError(f"no metric is called {name!r}; {hint}")
    return METRICS[name]


def load_network(
    metric: Metric, path: str | Path | None = None, device: torch.device | str = "cpu"
) -> Any:
    """The argument ``network`` of a metric: a number compares only with those of the same one.

    Args:
        metric: One that has a `Metric.network`.
        path: Weights, where they are not in the hub's cache; several files of LPIPS are joined by
            commas.
        device: Where it runs.

    Raises:
        ValueError: The metric needs none, or there are no weights; the message says how to get
            them.
    """
    if metric.network is None:
        raise ValueError(f"{metric.name} needs no network")
    return _NETWORKS[metric.network](path, device)


def _lpips(path: str | Path | None, device: torch.device | str) -> lpips.Lpips:
    return lpips.load_lpips(*str(path).split(",") if path else (), device=device)


def _dino_tokens(path: str | Path | None, device: torch.device | str) -> Callable[..., Any]:
    return Dino(path or TOKENS, device, antialias=True).tokens


_NETWORKS: dict[str, Callable[[str | Path | None, torch.device | str], Any]] = {
    "lpips": _lpips,
    "dino": Dino,
    "dino-tokens": _dino_tokens,
    "i3d": features.i3d,
    "videomae": features.videomae,
    "fvd-toy": features.fvd_toy,
    "clip": clip.ClipEncoder,
}
