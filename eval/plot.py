"""Line charts as inline SVG: no library, no script, colours that follow the page's theme."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 640, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 14, 34
# Told apart by lightness too (after Okabe and Ito), readable on white and on near-black.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Plot:
    """Curves over a common axis.

    Attributes:
        series: Name -> values at 0, 1, 2, ...; None or NaN leaves a gap.
        caption: Below the chart.
        x: Name of the horizontal axis.
        y: Name of the vertical axis, with its unit.
    """

    series: Mapping[str, Sequence[float | None]]
    caption: str
    x: str = "frame"
    y: str = ""

    def svg(self) -> str:
        """The chart as an ``<svg>`` element.

        Raises:
            ValueError: There is no finite value.
        """
        runs = {name: _runs(curve) for name, curve in self.series.items()}
        values = [v for parts in runs.values() for run in parts for _, v in run]
        if not values:
            raise ValueError(f"plot {self.caption!r}: no finite value to draw")
        ticks = _ticks(min(values), max(values))
        low, high = min(ticks[0], *values), max(ticks[-1], *values)
        last = max(1, max(map(len, self.series.values())) - 1)
        wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

        def at(i: float, value: float) -> str:
            x = _LEFT + wide * i / last
            return f"{x:.1f},{_TOP + tall * (high - value) / (high - low):.1f}"

        parts = []
        for tick in ticks:
            y = at(0, tick).split(",")[1]
            parts.append(
                f'<line class=grid x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
            )
            parts.append(_text(_LEFT - 8, float(y) + 4, f"{tick:g}", "end"))
        for i in range(0, last + 1, max(1, math.ceil(last / 12))):
            parts.append(_text(float(at(i, low).split(",")[0]), _HEIGHT - 18, str(i), "middle"))
        parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 4, self.x, "end"))
        parts.append(_text(_LEFT, 10, self.y, "start"))
        for (name, stretches), colour in zip(runs.items(), _palette(len(runs))):
            parts.append(f'<g stroke="{colour}" fill="{colour}"><title>{html.escape(name)}</title>')
            for run in stretches:
                points = " ".join(at(i, value) for i, value in run)
                parts.append(f'<polyline fill="none" stroke-width="2" points="{points}"/>')
                if len(run) == 1:  # a line of one point is invisible
                    x, y = points.split(",")
                    parts.append(f'<circle cx="{x}" cy="{y}" r="3"/>')
            parts.append("</g>")
        label = html.escape(self.caption, quote=True)
        view = f"0 0 {_WIDTH} {_HEIGHT}"
        return f'<svg viewBox="{view}" role="img" aria-label="{label}">{"".join(parts)}</svg>'

    def figure(self) -> str:
        """The chart with its legend and caption, as a ``<figure>`` element."""
        keys = "".join(
            f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
            for name, colour in zip(self.series, _palette(len(self.series)))
        )
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>"
        return f"<figure class=plot>{self.svg()}<div class=keys>{keys}</div>{caption}</figure>"


def _palette(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose the values."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = 0.5 * abs(low) or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _runs(curve: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Stretches without gaps."""
    runs: list[list[tuple[int, float]]] = [[]]
    for i, value in enumerate(curve):
        if value is not None and math.isfinite(value):
            runs[-1].append((i, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@dataclass(frozen=True)
class Scatter:
    """Points of several series, and a line among them.

    Attributes:
        series: Name -> its points ``(x, y)``.
        caption: Below the chart.
        x: Name of the horizontal axis.
        y: Name of the vertical axis, with its unit.
        line: A line through these.
        log: Both axes are logarithmic.
    """

    series: Mapping[str, Sequence[tuple[float, float]]]
    caption: str
    x: str = ""
    y: str = ""
    line: Sequence[tuple[float, float]] = ()
    log: bool = True

    def svg(self) -> str:
        """The chart as a file of its own: names stand beside the points.

        Raises:
            ValueError: There is no point, or one is not positive on a logarithmic axis.
        """
        points = [p for own in self.series.values() for p in own]
        everything = [*points, *self.line]
        if not points:
            raise ValueError(f"plot {self.caption!r}: no point to draw")
        if self.log and min(min(p) for p in everything) <= 0:
            raise ValueError(f"plot {self.caption!r}: a logarithmic axis takes positive numbers")
        scale = math.log10 if self.log else float
        axes = []
        for values in zip(*everything):
            placed = [scale(v) for v in values]
            pad = 0.06 * (max(placed) - min(placed)) or 0.5
            axes.append((min(placed) - pad, max(placed) + pad))
        wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

        def at(x: float, y: float) -> tuple[float, float]:
            (x0, x1), (y0, y1) = axes
            across, up = (scale(x) - x0) / (x1 - x0), (scale(y) - y0) / (y1 - y0)
            return _LEFT + wide * across, _TOP + tall * (1 - up)

        parts = ["<style>text{font:11px sans-serif;fill:#777}</style>"]
        for low, high, across in ((*axes[0], True), (*axes[1], False)):
            for tick in _ticks(low, high)[1:-1]:
                value = 10**tick if self.log else tick
                x, y = at(value, 1.0) if across else at(1.0, value)
                place = (x, _HEIGHT - 18, "middle") if across else (_LEFT - 8, y + 4, "end")
                parts.append(_text(place[0], place[1], f"{value:.3g}", place[2]))
        if self.line:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in self.line))
            parts.append(f'<polyline fill="none" stroke="#999" points="{path}"/>')
        for (name, own), colour in zip(self.series.items(), _palette(len(self.series))):
            for point in own:
                x, y = at(*point)
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
                left = x < _WIDTH / 2
                parts.append(
                    _text(x + (8 if left else -8), y + 4, name, "start" if left else "end")
                )
        parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 4, self.x, "end"))
        parts.append(_text(_LEFT, 10, self.y, "start"))
        label = html.escape(self.caption, quote=True)
        head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        return f'<svg {head} role="img" aria-label="{label}">{"".join(parts)}</svg>\n'
