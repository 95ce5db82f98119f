"""Tables of ``bench ground``: conditions by tier, hypotheses with paired intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from gen_accel.eval.harness import result_row

TIERS = ("colour", "shape", "colour+shape", "relation", "motion")
# name, better, worse, question
HYPOTHESES = (
    ("P1", "append + filter", "filter", "magnets and filter beat the filter alone (text)"),
    ("P1 joint", "joint: append + filter", "joint: filter", "the same, not renormalised (joint)"),
    ("P2", "rows: append + filter", "rows: filter", "magnets change nothing in text-to-image"),
    ("P3", "+ sink drop", "drop random token", "dropping sinks beats dropping a random token"),
    ("P3 heaviest", "drop heaviest token", "drop random token", "the same for the heaviest token"),
    ("P5", "learned background + magnets", "learned background",
     "gain of magnets behind a background phrase the model was trained on"),
    ("controls", "append + filter", "content words", "magnets beat random content words"),
    ("controls", "append + filter", "pads", "magnets beat pads"),
    ("controls", "append + filter", "nonsense", "magnets beat nonsense"),
    ("controls", "append + filter", "absent object", "magnets beat words of an absent object"),
    ("controls", "append + filter", "magnets first", "magnets last beat magnets first"),
    ("controls", "append + filter", "colour of another object",
     "an absent colour beats that of another object"),
    ("controls", "full (drop, 2 draws)", "background list", "RefAM beats a background list"),
    ("directions", "rows: append + filter", "append + filter", "text-to-image beats the default"),
    ("directions", "joint: append + filter", "append + filter",
     "not renormalised beats the default"),
)  # fmt: skip


def conditions(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per condition and tier; the value is pointing accuracy."""
    rows = []
    for name in dict.fromkeys(r["name"] for r in records):
        for tier in ("all", *TIERS):
            some = [r for r in records if r["name"] == name and tier in ("all", r["tier"])]
            if not some:
                continue
            config: dict[str, Any] = {"tier": tier}
            for key in ("robust", "ap", "iou", "half", "flood", "jf"):
                values = [r[key] for r in some if key in r]
                if values:
                    config[key] = statistics.fmean(values)
            for key, out in (("areas", "oiou"), ("flood_areas", "flood_oiou")):
                values = [r[key] for r in some if key in r]
                if values:
                    inter, union = np.asarray(values).sum(0)
                    config[out] = float(inter / union)
            hits = [r["pointing"] for r in some]
            rows.append(
                result_row(
                    "ground", name, statistics.fmean(hits), "pointing", n=len(hits),
                    spread=_bootstrap(hits, [r["scene"] for r in some]), config=config,
                )
            )  # fmt: skip
    return rows


def hypotheses(
    records: list[dict[str, Any]], masses: Sequence[tuple[float, float]], sinks: int, count: int
) -> list[dict[str, Any]]:
    """Paired differences with 95 % intervals; scenes are resampled, not expressions."""
    rows = []
    for tier in ("all", *TIERS):
        for label, better, worse, question in HYPOTHESES:
            for metric in ("pointing", "ap"):
                found = [
                    {r["item"]: r for r in records if r["name"] == n and tier in ("all", r["tier"])}
                    for n in (better, worse)
                ]
                both = [i for i in found[0] if i in found[1]]
                if not both:
                    continue
                gains = [found[0][i][metric] - found[1][i][metric] for i in both]
                scenes = [found[0][i]["scene"] for i in both]
                config = {
                    "tier": tier, "metric": metric, "better": better, "worse": worse,
                    "question": question,
                }  # fmt: skip
                rows.append(
                    result_row(
                        "ground hypothesis", label, statistics.fmean(gains), metric, n=len(gains),
                        spread=_bootstrap(gains, scenes), config=config,
                    )
                )  # fmt: skip
    gains_ = _difference_of_gains(records)
    rows.append(
        result_row(
            "ground hypothesis", "P5 difference", statistics.fmean(g for g, _ in gains_), "ap",
            n=len(gains_), spread=_bootstrap([g for g, _ in gains_], [s for _, s in gains_]),
            config={"question": "gain without minus gain with a learned background", "tier": "all"},
        )
    )  # fmt: skip
    kept = [float(np.log(t) - np.log(b)) for t, b in masses if t > 0 and b > 0]
    scenes = [r["scene"] for r in records if r["name"] == "append + filter"]
    rows.append(
        result_row(
            "ground hypothesis", "P4", statistics.median(b for _, b in masses), "kept share",
            n=len(masses), spread=_bootstrap(kept, scenes[: len(kept)]),
            config={"question": "background keeps less of its attention than the target",
                    "target_keeps": statistics.median(t for t, _ in masses),
                    "spread_is": "mean log(target kept / background kept)"},
        )
    )  # fmt: skip
    rows.append(
        result_row("ground hypothesis", "sinks found", sinks / count, "per expression", n=count)
    )
    return rows


def _difference_of_gains(records: list[dict[str, Any]]) -> list[tuple[float, int]]:
    names = ("append + filter", "filter", "learned background + magnets", "learned background")
    found = [{r["item"]: r for r in records if r["name"] == name} for name in names]
    return [
        (f["ap"] - found[1][i]["ap"] - found[2][i]["ap"] + found[3][i]["ap"], f["scene"])
        for i, f in found[0].items()
    ]


def _bootstrap(values: Sequence[float], groups: Sequence[int], rounds: int = 2000) -> list[float]:
    """95 % interval of the mean; whole groups are drawn, for their members are alike."""
    if len(values) != len(groups):
        groups = list(range(len(values)))
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(index, weights=np.asarray(values, float))
    sizes = np.bincount(index)
    rng = np.random.default_rng(0)
    picks = rng.integers(len(sums), size=(rounds, len(sums)))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


_TABLES = (
    ("pointing", "Pointing accuracy, %: the peak lies on what is meant"),
    ("ap", "Average precision of the heatmap"),
    ("flood", "mIoU with a perfect segmenter that is asked at the point"),
    ("iou", "mIoU without a segmenter (Otsu, component of the point)"),
    ("half", "mIoU without a segmenter (half of the peak)"),
    ("oiou", "oIoU without a segmenter (Otsu)"),
    ("jf", "J&F without a segmenter (Otsu)"),
)


def page(rows: list[dict[str, Any]]) -> str:
    """Everything as Markdown; hypotheses for all tiers together and for colours."""
    table = [r for r in rows if r["kind"] == "ground"]
    counts = {r["config"]["tier"]: r["n"] for r in table}
    cells = {(r["name"], r["config"]["tier"]): {**r["config"], "pointing": r["value"]}
             for r in table}  # fmt: skip
    out: list[str] = []
    for key, title in _TABLES:
        out += [f"**{title}**", "", "| | " + " | ".join(f"{t} ({n})" for t, n in counts.items()) +
                " |", "|---" * (1 + len(counts)) + "|"]  # fmt: skip
        for name in dict.fromkeys(r["name"] for r in table):
            if key in cells[name, "all"]:
                values = [cells[name, tier][key] for tier in counts]
                line = (f"{100 * v:.0f}" if key == "pointing" else f"{v:.2f}" for v in values)
                out.append(f"| {name} | " + " | ".join(line) + " |")
        out.append("")
    out += ["| | difference of | all: points | all: AP | colour: points | colour: AP |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    found = [r for r in rows if r["kind"] == "ground hypothesis"]
    paired = {}
    for row in found:
        if "better" in row["config"]:
            which = (row["config"][k] for k in ("better", "worse", "tier"))
            paired[(row["name"], *which, row["unit"])] = row
    for label, better, worse, _ in HYPOTHESES:
        shown = []
        for tier in ("all", "colour"):
            for unit, scale in (("pointing", 100), ("ap", 1)):
                pair = paired.get((label, better, worse, tier, unit))
                shown.append("" if pair is None else _interval(pair, scale))
        out.append(f"| {label} | {better} - {worse} | " + " | ".join(shown) + " |")
    out.append("")
    for row in rows:
        if row["kind"] != "ground" and "better" not in row["config"]:
            facts = ", ".join(f"{k} {_short(v)}" for k, v in row["config"].items())
            spread = "" if row["spread"] is None else f" ({_bounds(row, 1)})"
            name = f"{row['kind'].removeprefix('ground ')}, {row['name']}"
            out.append(f"- {name}: {row['value']:.3f} {row['unit']}{spread}, n {row['n']}; {facts}")
    return "\n".join(out)


def _interval(row: dict[str, Any], scale: float) -> str:
    digits = 1 if scale == 100 else 3
    return f"{scale * row['value']:+.{digits}f} ({_bounds(row, scale)})"


def _bounds(row: dict[str, Any], scale: float) -> str:
    digits = 1 if scale == 100 else 3
    return " .. ".join(f"{scale * x:+.{digits}f}" for x in row["spread"])


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
