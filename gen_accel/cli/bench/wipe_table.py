"""The tables of ``gen-accel bench wipe``, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gen_accel.eval.world.gate import bootstrap

GONE = 0.1  # residue below which nothing of an object is left
FULL = "full"
BASELINES = (
    "identity", "mean fill", "temporal median", "object mask only", "object mask dilated",
    "random mask", "latent blending", "KV freeze",
)  # fmt: skip
Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """Everything there is rows for, as Markdown."""
    parts = {part: [r for r in rows if r["part"] == part] for part in _TABLES}
    return "\n\n".join(make(parts[part]) for part, make in _TABLES.items() if parts[part])


def _interval(values: Sequence[float | None], digits: int = 2, scale: float = 1.0) -> str:
    found = [scale * v for v in values if v is not None]
    if not found:
        return "-"
    low, high = bootstrap(found)
    return f"{np.mean(found):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(out + ["| " + " | ".join(line) + " |" for line in lines])


def _reconstruction(rows: Sequence[Row]) -> str:
    lines = [
        (name, _interval([r[name] for r in rows], 1), f"{min(r[name] for r in rows):.1f}",
         f"{100 * np.mean([r[f'{name}_exact'] for r in rows]):.0f} %")
        for name in ("none", "attn_v", "attn_kv", "freeze")
    ]  # fmt: skip
    head = (f"reconstruction, {len(rows)} clips", "PSNR, dB", "worst", "bit-exact")
    return _table(head, lines)


def _masks(rows: Sequence[Row]) -> str:
    lines = []
    for what in dict.fromkeys(r["set"] for r in rows):
        of = [r for r in rows if r["set"] == what]
        extra = "-"
        if what == "decoy":
            extra = "decoy taken " + _interval([r["decoy_taken"] for r in of], 1, 100) + " %"
        if what == "neighbour":
            extra = "its shadow kept " + _interval([r["neighbour_kept"] for r in of], 1, 100) + " %"
        if what in ("absent", "none"):
            empty = [float(r["area"] <= 0.01) for r in of]
            extra = "at most 1 % of tokens in " + _interval(empty, 1, 100) + " %"
        effect = what not in ("absent", "none")
        lines.append((
            what, str(len(of)),
            _interval([r["iou"] for r in of]) if effect else "-",
            _interval([r["precision"] for r in of]) if effect else "-",
            _interval([r["recall"] for r in of]),
            _interval([r["pixel_iou"] for r in of]) if effect else "-",
            f"{np.mean([r['pixel_ceiling'] for r in of]):.2f}" if effect else "-",
            f"{np.mean([r['area'] for r in of]):.3f}", extra,
        ))  # fmt: skip
    head = ("effect mask", "clips", "IoU", "precision", "recall", "IoU, pixels", "its ceiling",
            "area", "control")  # fmt: skip
    return _table(head, lines)


def _removal(rows: Sequence[Row]) -> str:
    rows = _merged(rows)
    everything = dict.fromkeys(name for r in rows for name in r["arms"])
    common = [name for name in everything if all(name in r["arms"] for r in rows)]
    blocks = [_arms(f"removal, {len(rows)} clips", rows, common)]
    ablated = [r for r in rows if set(everything) <= set(r["arms"])]
    if ablated and len(everything) > len(common):
        names = [FULL, *(n for n in everything if n not in common)]
        blocks.append(_arms(f"ablations, {len(ablated)} clips", ablated, names))
    blocks.append(_kinds(rows))
    if ablated:
        blocks.append(_rank(ablated))
    return "\n\n".join(blocks)


def _merged(rows: Sequence[Row]) -> list[Row]:
    """One row for each clip; arms may have been run at different times."""
    clips: dict[tuple[str, int], Row] = {}
    for row in rows:
        known = clips.setdefault((row["set"], row["seed"]), {**row, "arms": {}})
        known["arms"] = {**known["arms"], **row["arms"]}
    return list(clips.values())


def _arms(title: str, rows: Sequence[Row], names: Sequence[str]) -> str:
    lines = []
    for name in names:
        arms = [r["arms"][name] for r in rows]
        better = [r["arms"][FULL]["foreground"] - r["arms"][name]["foreground"] for r in rows]
        gone = [
            [None if arm[key] is None else float(abs(arm[key]) < GONE) for arm in arms]
            for key in ("object_left", "effect_left")
        ]
        lines.append([
            name, _interval([arm["foreground"] for arm in arms], 1),
            "-" if name == FULL else _interval(better, 1),
            *(_interval([arm[key] for arm in arms], 1)
              for key in ("object", "effect", "background", "untouched")),
            *(_interval(share, 0, 100) for share in gone),
        ])  # fmt: skip
    head = (
        title, "object + effect, dB", "full is better by", "object", "effect", "background",
        "outside our mask", "object gone, %", "effect gone, %",
    )  # fmt: skip
    return _table(head, lines)


def _kinds(rows: Sequence[Row]) -> str:
    """Full and baselines by kind of clip."""
    kinds = {kind: [r for r in rows if r["set"] == kind] for kind in (r["set"] for r in rows)}
    lines = [
        (name, *(f"{np.mean([r['arms'][name]['foreground'] for r in of]):.1f}"
                 for of in kinds.values()))
        for name in (FULL, *BASELINES)
    ]  # fmt: skip
    head = ("object + effect, dB", *(f"{kind} ({len(of)})" for kind, of in kinds.items()))
    return _table(head, lines)


def _rank(rows: Sequence[Row]) -> str:
    """TokSim-toy beside the true error, and how their orders of the methods agree."""
    names = list(rows[0]["arms"])
    measured = [r for r in rows if all(r["arms"][n].get("tok_sim") is not None for n in names)]
    if not measured:
        return ""

    def means(key: str) -> np.ndarray:
        return np.array([[r["arms"][n][key] for n in names] for r in measured]).mean(0)

    score, right = means("tok_sim"), means("foreground")
    order = np.argsort(-right)
    lines = [(names[i], f"{score[i]:.2f}", f"{right[i]:.1f}") for i in order]
    head = (f"TokSim-toy, {len(measured)} clips", "TokSim-toy", "object + effect, dB")
    pairs = [
        [[r["arms"][n][key] for n in names] for key in ("tok_sim", "foreground")] for r in measured
    ]
    within = [spearman(*pair) for pair in pairs]
    text = (
        f"Rank correlation of TokSim-toy with the true PSNR over the {len(names)} methods: "
        f"{spearman(score, right):.2f} of the means, {_interval(within)} within a clip."
    )
    return _table(head, lines) + "\n\n" + text


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Rank correlation; ties share their mean rank. 0 where one is constant."""

    def ranks(x: Sequence[float] | np.ndarray) -> np.ndarray:
        values = np.asarray(x, float)
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = counts.cumsum()
        return (last - (counts - 1) / 2)[inverse]

    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / norm) if norm > 0 else 0.0


def _speed(rows: Sequence[Row]) -> str:
    lines = [(r["set"], f"{r['density']:g}", str(r["rounds"]), f"{r['ratio']:.2f}x") for r in rows]
    return _table(("inversion and way back", "density", "rounds", "dense / sparse time"), lines)


_TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "reconstruction": _reconstruction,
    "mask": _masks,
    "removal": _removal,
    "speed": _speed,
}
