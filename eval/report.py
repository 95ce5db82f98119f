"""One folder that shows a comparison: ``report.json`` for programs, ``index.html`` for people.

The page opens from disk without a network: styles are inline, pictures are data URIs, and videos
are files beside it.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gen_accel.eval.files import write_text
from gen_accel.eval.plot import Plot


@dataclass(frozen=True)
class Row:
    """One method of the table.

    Attributes:
        method: Its name.
        seconds: Wall time of the whole pipeline call.
        density: Kept share of the attention blocks that was run, mean over the sparse calls.
        psnr: dB to the first row's video, None for the first row itself.
        ssim: Likewise.
        note: A remark under the name.
    """

    method: str
    seconds: float
    density: float = 1.0
    psnr: float | None = None
    ssim: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Media:
    """A video or picture file beside the page."""

    file: str
    caption: str


@dataclass(frozen=True)
class Picture:
    """A picture inside the page: uint8 ``[height, width, 3]``."""

    pixels: np.ndarray
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        head: Names of the columns.
        rows: Cells; the first column names the row.
        note: A remark below.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass
class Report:
    """What `write_report` renders.

    Attributes:
        title: Headline.
        summary: One sentence with the result.
        rows: The table of methods; the first row is the baseline that speed-ups refer to.
        media: Players, side by side.
        pictures: Title -> row of pictures, e.g. before and after.
        notes: What a reader has to know to judge the numbers.
        config: Settings of the run.
        versions: Package -> version.
        data: Further numbers for report.json only.
        tables: Title -> further table.
        clips: Title -> players that run together.
        plots: Title -> charts.
    """

    title: str
    summary: str
    rows: Sequence[Row] = ()
    media: Sequence[Media] = ()
    pictures: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    clips: Mapping[str, Sequence[Media]] = field(default_factory=dict)
    plots: Mapping[str, Sequence[Plot]] = field(default_factory=dict)

    def speedup(self, row: Row) -> float:
        """Time of the first row over the time of ``row``."""
        return self.rows[0].seconds / row.seconds


def write_report(folder: str | Path, report: Report) -> Path:
    """Write ``report.json`` and ``index.html`` into ``folder``; returns the page's path.

    Raises:
        ValueError: No table, a time that is not positive, or an unwritable folder.
    """
    if not (report.rows or report.tables):
        raise ValueError("a report needs at least one row, the baseline, or a table")
    for row in report.rows:
        if not (math.isfinite(row.seconds) and row.seconds > 0):
            raise ValueError(f"{row.method}: seconds={row.seconds}; a time is positive")
    folder = Path(folder)
    write_text(folder / "report.json", json.dumps(to_json(report), indent=2, default=str) + "\n")
    write_text(folder / "index.html", to_html(report))
    return folder / "index.html"


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data, pictures left out."""
    return {
        "title": report.title,
        "summary": report.summary,
        "rows": [{**asdict(row), "speedup": report.speedup(row)} for row in report.rows],
        "tables": {title: asdict(table) for title, table in report.tables.items()},
        "media": [asdict(item) for item in report.media],
        "clips": {title: [asdict(m) for m in row] for title, row in report.clips.items()},
        "plots": {title: [asdict(p) for p in row] for title, row in report.plots.items()},
        "notes": list(report.notes),
        "config": dict(report.config),
        "versions": dict(report.versions),
        **report.data,
    }


def heatmap(values: Tensor, *, largest: float | None = None) -> np.ndarray:
    """Non-negative numbers ``[rows, columns]`` as colours, uint8 ``[rows, columns, 3]``.

    Args:
        values: What to show; 0 is dark.
        largest: Value of the brightest colour, default the largest present. Give the same one to
            pictures that are compared.
    """
    if values.ndim != 2 or not bool((values >= 0).all()):
        raise ValueError(f"heatmap of shape {tuple(values.shape)}: expected 2-D, values >= 0")
    values = values.detach().double().cpu()
    top = float(values.max()) if largest is None else largest
    level = (values / max(top, 1e-30)).clamp(0, 1).numpy()
    stops = np.array(_COLOURS, dtype=np.float64)
    at = np.linspace(0, 1, len(stops))
    channels = [np.interp(level, at, stops[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


# Dark blue to pale yellow, rising evenly in lightness.
_COLOURS = (
    (13, 10, 36),
    (60, 26, 98),
    (133, 40, 105),
    (205, 65, 78),
    (244, 128, 55),
    (252, 240, 178),
)


def to_html(report: Report) -> str:
    """The page."""
    e = html.escape
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{e(report.title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{e(report.title)}</h1><p class=summary>{e(report.summary)}</p>",
        _methods(report) if report.rows else "",
    ]
    for title, table in report.tables.items():
        parts.append(f"<h2>{e(title)}</h2>{_table(table)}")
    if report.media:
        parts.append(f"<div class=media>{''.join(map(_media, report.media))}</div>")
    for title, media in report.clips.items():
        parts.append(f"<h2>{e(title)}</h2><div class=media>{''.join(map(_media, media))}</div>")
    for title, plots in report.plots.items():
        figures = "".join(plot.figure() for plot in plots)
        parts.append(f"<h2>{e(title)}</h2><div class=plots>{figures}</div>")
    for title, pictures in report.pictures.items():
        figures = "".join(map(_picture, pictures))
        parts.append(f"<h2>{e(title)}</h2><div class=pictures>{figures}</div>")
    if report.notes:
        items = "".join(f"<li>{e(note)}</li>" for note in report.notes)
        parts.append(f"<h2>Read this with it</h2><ul>{items}</ul>")
    for title, pairs in (("Settings", report.config), ("Versions", report.versions)):
        if pairs:
            rows = "".join(
                f"<tr><th>{e(str(k))}</th><td>{e(str(v))}</td></tr>" for k, v in pairs.items()
            )
            parts.append(f"<details><summary>{title}</summary><table>{rows}</table></details>")
    parts.append("<script>" + _SCRIPT + "</script></main></body></html>\n")
    return "\n".join(parts)


def _table(table: Table) -> str:
    rows = [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in table.head)}</tr>"]
    for row in table.rows:
        # A sentence is set as one, everything else as a number.
        cells = (
            f"<td{' class=words' if i and len(cell) > 24 else ''}>{html.escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    return f"<div class=wide><table class=result>{''.join(rows)}</table></div>{note}"


def _methods(report: Report) -> str:
    head = ("method", "time", "speed-up", "density run", "PSNR", "SSIM")
    rows = [f"<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>"]
    for i, row in enumerate(report.rows):
        note = f"<small>{html.escape(row.note)}</small>" if row.note else ""
        cells = [
            f"{html.escape(row.method)}{note}",
            f"{row.seconds:.1f} s",
            "1" if i == 0 else f"<b>{report.speedup(row):.2f}x</b>",
            f"{row.density:.3f}" if row.density < 1 else "1",
            "&ndash;" if row.psnr is None else f"{row.psnr:.1f} dB",
            "&ndash;" if row.ssim is None else f"{row.ssim:.4f}",
        ]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table class=result>{''.join(rows)}</table>"


def _media(item: Media) -> str:
    source, caption = html.escape(item.file, quote=True), html.escape(item.caption)
    if Path(item.file).suffix == ".mp4":
        element = f'<video src="{source}" autoplay loop muted playsinline controls></video>'
    else:
        element = f'<img src="{source}" alt="{caption}">'
    return f"<figure>{element}<figcaption>{caption}</figcaption></figure>"


def _picture(picture: Picture) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.pixels)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(picture.caption)
    return (
        f'<figure><img class=map src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


_STYLE = """
:root{color-scheme:light dark;--ink:#1c1d22;--soft:#666a75;--line:#e2e4ea;--paper:#fbfbfd;
--card:#fff;--accent:#b3361e}
@media(prefers-color-scheme:dark){:root{--ink:#e9eaf0;--soft:#9a9fad;--line:#2c2f39;
--paper:#121318;--card:#1a1c23;--accent:#f4803e}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:68rem;margin:0 auto;padding:3rem 1.5rem 5rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .6rem;letter-spacing:-.01em}
h2{font-size:1.1rem;margin:2.6rem 0 .8rem}
.summary{font-size:1.15rem;color:var(--soft);max-width:48rem;margin:0 0 2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.result{width:100%;background:var(--card);border:1px solid var(--line);border-radius:10px;
border-spacing:0;border-collapse:separate;overflow:hidden}
.result th{font-size:.8rem;font-weight:600;color:var(--soft);text-align:right;
padding:.7rem 1.1rem;border-bottom:1px solid var(--line)}
.result td{text-align:right;white-space:nowrap;padding:.8rem 1.1rem;vertical-align:top}
.result tr+tr+tr td{border-top:1px solid var(--line)}
.result th:first-child,.result td:first-child{text-align:left}
.result b{color:var(--accent)}
small{display:block;white-space:normal;color:var(--soft)}
.result .words{text-align:left;white-space:normal;color:var(--soft);font-size:.9rem;min-width:14rem}
.wide{overflow-x:auto}
.note{color:var(--soft);font-size:.88rem;max-width:52rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(22rem,1fr));gap:1.6rem}
.plot svg{display:block;width:100%;height:auto;overflow:visible}
.plot text{fill:var(--soft);font-size:11px}
.plot .grid{stroke:var(--line)}
.keys{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem}
.keys i{display:inline-block;width:.8rem;height:.2rem;margin-right:.4rem;vertical-align:middle}
.media,.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:1.2rem}
.media{margin-top:1.6rem}
figure{margin:0}
video,img{display:block;width:100%;border-radius:8px;background:#000}
.pictures figure{max-width:34rem}
.map{image-rendering:pixelated}
figcaption{color:var(--soft);font-size:.88rem;margin-top:.45rem}
ul{padding-left:1.2rem;max-width:52rem}
li{margin:.3rem 0}
details{margin-top:1.2rem}
summary{cursor:pointer;color:var(--soft)}
details th{text-align:left;font-weight:500;color:var(--soft);padding:.15rem 1.2rem .15rem 0;
vertical-align:top;white-space:nowrap}
details td{word-break:break-word}
@media(max-width:40rem){.result{display:block;overflow-x:auto}}
"""

# Players that start together stay together only when they are told to.
_SCRIPT = """
for(const group of document.querySelectorAll('.media')){
const videos=[...group.querySelectorAll('video')],first=videos[0];
if(!first)continue;
const follow=()=>videos.slice(1).forEach(v=>{
if(Math.abs(v.currentTime-first.currentTime)>.05)v.currentTime=first.currentTime});
first.addEventListener('seeked',follow);
first.addEventListener('play',()=>videos.forEach(v=>v.play()));
first.addEventListener('pause',()=>{videos.forEach(v=>v.pause());follow()});
}
"""
