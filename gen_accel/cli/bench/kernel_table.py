"""The page and the plot of ``gen-accel bench kernel``, made from its result rows alone."""

from __future__ import annotations

from typing import Any

from gen_accel.eval.harness import newest

Row = dict[str, Any]

_STYLE = "<style>text{font:11px sans-serif;fill:#777}.grid{stroke:#9994}</style>"


def kernel_page(rows: list[Row]) -> str:
    """Markdown: a table per model, one line per candidate, newest results only.

    Args:
        rows: Result rows of one suite.
    """
    rows = newest(rows)
    cases = list(dict.fromkeys((row["config"]["case"], row["device"]) for row in rows))
    several = len({row["device"] for row in rows}) > 1
    lines = [
        "# Attention calls at the sizes of real models",
        "",
        "`gen-accel bench kernel --suite " + rows[0]["config"]["suite"] + "`. Times in ms, median "
        "and quartiles; TFLOP/s count pairs of tokens in kept blocks; *error* is the relative L2 "
        "distance to fp64 of the worst of some heads and query blocks, on data whose last key and "
        "another weigh about as much as all the others; *x dense* is the speed-up over the fastest "
        "dense kernel that computes in the inputs' precision, *over plain* the time beside the "
        "same lists without a tail and in the inputs' precision.",
    ]
    for case, device in cases:
        mine = [r for r in rows if (r["config"]["case"], r["device"]) == (case, device)]
        shape = " x ".join(map(str, mine[0]["shape"]))
        lines += [
            "",
            f"## {case}, {device}" if several else f"## {case}",
            "",
            f"q, k and v {shape} (batch, tokens, heads, head_dim), {mine[0]['config']['dtype']}, "
            f"blocks of {mine[0]['config']['block']}.",
            "",
            "| lists | density (densest row) | candidate | ms | quartiles | TFLOP/s | x dense "
            "| over plain | error |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row, mine) for row in mine]
    return "\n".join([*lines, "", *_sources(rows), ""])


def kernel_plot(rows: list[Row]) -> str:
    """SVG: rate on kept blocks over density, a line per model, realistic lists without a tail.

    Args:
        rows: Result rows of one suite.

    Raises:
        ValueError: No such row.
    """
    from gen_accel.eval.plot import Plot

    rows = newest(rows)
    several = len({row["device"] for row in rows}) > 1
    plain = [
        row
        for row in rows
        if row["value"] is not None
        and row["config"]["lists"] == "realistic"
        and row["config"].get("tail") == "drop"
        and not row["config"]["part"].startswith("flex")
    ]
    targets = sorted({row["config"]["target"] for row in plain})
    series: dict[str, list[float | None]] = {}
    for row in plain:
        name = f"{row['config']['case']} ({row['name']})"
        name += f", {row['device']}" if several else ""
        rates = series.setdefault(name, [None] * len(targets))
        rates[targets.index(row["config"]["target"])] = _rate(row)
    names = ", ".join(f"{target:g}" for target in targets)
    legend = "; ".join(series)
    plot = Plot(series, f"TFLOP/s on kept blocks: {legend}", f"density {names}", "TFLOP/s")
    svg = plot.svg().replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    svg = svg.replace(" class=grid", ' class="grid"').replace("fill=none", 'fill="none"')
    return svg.replace(">", f">{_STYLE}", 1) + "\n"


def _line(row: Row, rows: list[Row]) -> str:
    config = row["config"]
    kept = f"{config['density']:.3f}"
    if "densest_row" in config:
        kept += f" ({config['densest_row']:.3f})"
    if config["lists"] == "around":
        kept = ""
    if row["value"] is None:
        return (
            f"| {config['lists']} | {kept} | {row['name']} | WRONG: {config['wrong']} | | | | | |"
        )
    low, high = row["spread"]
    rows = [r for r in rows if r["value"] is not None]
    dense = [r["value"] for r in rows if r["config"]["lists"] == "dense" and _exact(r)]
    speed = f"{min(dense) / row['value']:.2f}" if dense and config["lists"] != "around" else ""
    drop = [
        r["value"]
        for r in rows
        if (config.get("tail", "drop") != "drop" or {"precision", "places"} & config.keys())
        and r["config"].get("tail") == "drop"
        and r["config"]["part"] == config["part"]
        and r["name"] == row["name"].split(",")[0]
    ]
    over = f"{100 * (row['value'] / drop[0] - 1):+.1f} %" if drop else ""
    rate = "" if _rate(row) is None else f"{_rate(row):.0f}"
    n = "" if row["n"] >= 20 else f" (n {row['n']})"
    return (
        f"| {config['lists']} | {kept} | {row['name']} | {row['value']:.3f}{n} | "
        f"{low:.3f} .. {high:.3f} | {rate} | {speed} | {over} | {config['error']:.1e} |"
    )


def _exact(row: Row) -> bool:
    return not row["name"].startswith("sageattention") and "precision" not in row["config"]


def _rate(row: Row) -> float | None:
    tflop = row["config"].get("tflop")
    return None if tflop is None else 1e3 * tflop / row["value"]


def _sources(rows: list[Row]) -> list[str]:
    """Where the numbers come from, a line per machine, commit and day."""
    found = dict.fromkeys(
        (
            row["device"],
            ", ".join(f"{name} {version}" for name, version in row["versions"].items()),
            str(row["commit"]),
            row["time"][:10],
        )
        for row in rows
    )
    return [
        f"{device}; {versions}; commit {commit}; {day}." for device, versions, commit, day in found
    ]
