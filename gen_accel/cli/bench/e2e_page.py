"""Pages of ``gen-accel bench e2e``: Markdown, CSV and plots, from its result rows alone."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from gen_accel.eval.harness import newest

Row = dict[str, Any]

BEGIN, END = "<!-- e2e:begin -->", "<!-- e2e:end -->"
_CSV = (
    "case", "device", "name", "value", "unit", "n", "wrong", "precision", "error", "density", "x",
    "x_stock", "attention_share", "predicted_ms", "run_s", "run_x", "peak_mib", "joules", "psnr",
    "ssim",
)  # fmt: skip


def write_pages(
    folder: Path, rows: list[Row], manifest: dict[str, Any], docs: str | None = None
) -> str:
    """Write everything that follows from rows; returns a line that says where.

    Args:
        folder: Takes ``manifest.json``, ``index.md``, ``results.csv`` and the plots.
        rows: Result rows of one suite.
        manifest: What was asked for, and what became of its pieces.
        docs: Page whose marked place takes the tables.

    Raises:
        ValueError: ``docs`` has no such place.
    """
    from gen_accel.eval.files import put_between, write_text

    rows = newest(rows)
    files = ["manifest.json"]
    if rows:
        tables = e2e_tables(rows)
        write_text(folder / "index.md", f"# {manifest['suite']}\n\n{tables}\n")
        write_text(folder / "results.csv", _csv(rows))
        files += ["index.md", "results.csv"]
        for name, picture in (("roofline.svg", roofline(rows)), ("pareto.svg", pareto(rows))):
            if picture is not None:
                write_text(folder / name, picture)
                files.append(name)
        if docs is not None:
            put_between(docs, BEGIN, END, tables)
    write_text(folder / "manifest.json", json.dumps({**manifest, "files": files}, indent=1) + "\n")
    return f"wrote {folder / files[-1 if len(files) == 1 else 1]}"


def e2e_tables(rows: list[Row]) -> str:
    """Markdown: a table per case and device, and where its numbers come from."""
    lines: list[str] = []
    for case, device in dict.fromkeys((row["config"]["case"], row["device"]) for row in rows):
        mine = [r for r in rows if (r["config"]["case"], r["device"]) == (case, device)]
        steps = [row for row in mine if row["kind"] == "e2e"]
        clips = [row for row in mine if row["kind"] == "e2e clips"]
        lines += _step_table(case, steps) if steps else []
        lines += _clip_table(case, clips) if clips else []
    return "\n".join(lines).strip()


def _step_table(case: str, rows: list[Row]) -> list[str]:
    first = rows[0]["config"]
    grid = "x".join(map(str, first["grid"]))
    blocks = f"{first['blocks']} blocks"
    if first["blocks"] != first["of_blocks"]:
        blocks = f"{first['blocks']} of {first['of_blocks']} blocks"
    lines = [
        f"**{case}**: {first['tokens']:,} tokens ({grid}), {blocks}, {first['dtype']}. Dense is "
        f"`{first['baseline']}`, the fastest here.",
        "",
        "| | forward, ms (quartiles, n) | x dense | x stock | density | attention | forecast, ms "
        f"| {first['steps']} steps, {first['dense_steps']} dense: s (extrapolated) | x |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        config = row["config"]
        if row["value"] is None:
            lines.append(f"| {row['name']} | WRONG: {config['wrong']} | | | | | | | |")
            continue
        low, high = row["spread"]
        name, precision = row["name"], config.get("precision", first["dtype"])
        name += "" if precision == first["dtype"] else f" ({precision})"
        share = config["attention_share"]
        lines.append(
            f"| {name} | {row['value']:,.0f} ({low:,.0f} .. {high:,.0f}, {row['n']}) "
            f"| {config['x']:.2f} | {config['x_stock']:.2f} | {config['density']:.3f} "
            f"| {'' if share is None else f'{share:.0%}'} | {config['predicted_ms']:,.0f} "
            f"({config['predicted_over_measured'] - 1:+.0%}) | {config['run_s']:,.0f} "
            f"| {config['run_x']:.2f} |"
        )
    lines += ["", _parts(rows), "", _source(rows[-1]), ""]
    return lines


def _parts(rows: list[Row]) -> str:
    """Where a sparse forward goes."""
    told = []
    for row in rows:
        if row["value"] is None:
            continue
        parts = row["config"]["parts_ms"]
        if not row["config"]["dense"] and parts:
            shares = ", ".join(f"{part} {ms:,.0f}" for part, ms in parts.items())
            more = row["config"]["calibration_ms"]
            once = f"; calibration {more:,.0f} once a branch" if more else ""
            told.append(f"{row['name']}: {shares}{once}")
    return f"Parts of one forward in ms, timed apart. {'. '.join(told)}." if told else ""


def _clip_table(case: str, rows: list[Row]) -> list[str]:
    scores = list(dict.fromkeys(name for row in rows for name in row["config"]["scores"]))
    lines = [
        f"**{case}**: whole clips, mean of {rows[0]['n']}",
        "",
        f"| | s | x dense | density | {' | '.join(scores)} |",
        "|---|---|---|---|" + "---|" * len(scores),
    ]
    for row in rows:
        config = row["config"]
        cells = (f"{config['scores'][n]:.3f}" if n in config["scores"] else "" for n in scores)
        lines.append(
            f"| {row['name']} | {row['value']:.2f} | {config['x']:.2f} | {config['density']:.3f} "
            f"| {' | '.join(cells)} |"
        )
    return [*lines, "", _source(rows[-1]), ""]


def _source(row: Row) -> str:
    config = row["config"]
    packages = ("torch", "triton", "diffusers")
    versions = ", ".join(f"{n} {row['versions'][n]}" for n in packages if n in row["versions"])
    suite = f" --suite {config['suite']}" if config["suite"] in ("h200", "cpu", "smoke") else ""
    return (
        f"`gen-accel bench e2e{suite}`, commit {row['commit']}, "
        f"{row['device']}, {versions}, {row['time'][:10]}."
    )


def _csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for row in rows:
        known = {**row, **row["config"], **row["config"].get("scores", {})}
        writer.writerow([known.get(name, "") for name in _CSV])
    return text.getvalue()


def roofline(rows: list[Row]) -> str | None:
    """SVG: rate of the kernels over their FLOP per byte, under what the device reaches."""
    from gen_accel.eval.plot import Scatter

    rates = [row for row in rows if row["kind"] == "rate"]
    if not rates:
        return None
    points = [
        (
            f"{row['name']} ({row['config']['case']})",
            row["config"]["intensity"],
            row["value"] / 1e12,
        )
        for row in rates
        if row["name"] != "memory"
    ]
    memory = max(row["value"] for row in rates if row["name"] == "memory") / 1e12
    peak = max(y for _, _, y in points)
    low, high = min(x for _, x, _ in points) / 4, max(x for _, x, _ in points) * 2
    knee = peak / memory
    low = min(low, knee / 4)
    roof = [(low, low * memory), (knee, peak), (max(high, 2 * knee), peak)]
    return Scatter(
        {name: [(x, y)] for name, x, y in points},
        "Rate of the kernels; the line is the memory's rate, and the best rate measured",
        x="FLOP per byte moved at least",
        y="TFLOP/s",
        line=roof,
    ).svg()


def pareto(rows: list[Row]) -> str | None:
    """SVG: speed against fidelity, the line joins those that none beats in both."""
    from gen_accel.eval.plot import Scatter

    clips = [r for r in rows if r["kind"] == "e2e clips" and "psnr" in r["config"]["scores"]]
    if not clips:
        return None
    points = [(r["name"], r["config"]["x"], r["config"]["scores"]["psnr"]) for r in clips]
    return Scatter(
        {name: [(x, y)] for name, x, y in points},
        "Whole clips: speed against fidelity to the dense clip",
        x="x dense",
        y="PSNR, dB",
        line=front([(x, y) for _, x, y in points]),
        log=False,
    ).svg()


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points that no other is at least as good as in both and better in one."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]
