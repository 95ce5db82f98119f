"""The registry: every metric by name."""

from __future__ import annotations

from difflib import get_close_matches

from gen_accel.eval import clip, fidelity, fvd
from gen_accel.eval.metric import Metric

# A module names its metrics beside their functions; one line here makes them known.
METRICS: dict[str, Metric] = {
    metric.name: metric for module in (fidelity, fvd, clip) for metric in module.METRICS
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
