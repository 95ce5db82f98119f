import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from gen_accel.eval.plot import Plot, Scatter, _ticks


def points(svg):
    return [
        [tuple(map(float, p.split(","))) for p in run.split()]
        for run in re.findall(r'points="([^"]*)"', svg)
    ]


def test_values_are_drawn_to_scale():
    svg = Plot({"a": [0.0, 10.0, 5.0]}, "c").svg()
    ((low, high, middle),) = points(svg)
    assert low[0] < high[0] < middle[0] and high[0] - low[0] == middle[0] - high[0]
    assert high[1] < middle[1] < low[1]  # SVG counts downwards
    assert middle[1] == pytest.approx((low[1] + high[1]) / 2, abs=0.06)


def test_gaps_and_single_points_are_shown():
    svg = Plot({"a": [1.0, None, 2.0, 3.0, math.nan, 4.0]}, "c").svg()
    assert [len(run) for run in points(svg)] == [1, 2, 1] and svg.count("<circle") == 2
    one = Plot({"a": [7.0]}, "c").svg()
    assert one.count("<circle") == 1 and "nan" not in one


@pytest.mark.parametrize("low", [0.0, 1e-9, -3.0, 0.99999, 37.2, 1e6])
@pytest.mark.parametrize("span", [0.0, 1e-4, 0.3, 7.0, 2e5])
def test_ticks_enclose_the_values(low, span):
    ticks = _ticks(low, low + span)
    slack = 1e-6 * max(span, abs(low), 1e-3)
    assert ticks[0] <= low + slack and low + span <= ticks[-1] + slack
    assert 2 <= len(ticks) <= 7 and ticks == sorted(set(ticks))


def test_names_are_escaped_and_nothing_to_draw_is_refused():
    figure = Plot({"<a>": [1.0, 2.0]}, 'b & "c"', "<x>", "<y>").figure()
    assert "<a>" not in figure and "&lt;a&gt;" in figure and "&lt;x&gt;" in figure
    with pytest.raises(ValueError, match="no finite value"):
        Plot({"a": [None, math.inf]}, "empty").svg()


def test_points_and_a_line_stand_where_they_belong():
    series = {"a": [(1.0, 10.0)], "b & c": [(100.0, 1000.0)]}
    svg = Scatter(series, "all", x="FLOP/B", line=[(1.0, 10.0), (100.0, 1000.0)]).svg()
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    first, second = ((float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{space}circle"))
    assert first[0] < second[0] and first[1] > second[1]  # upwards is smaller in SVG
    line = root.find(f"{space}polyline").get("points").split()
    assert line == [f"{x:.1f},{y:.1f}" for x, y in (first, second)]
    texts = [t.text for t in root.iter(f"{space}text")]
    assert {"a", "b & c", "FLOP/B", "10", "100"} <= set(texts)
    straight = Scatter({"a": [(0.0, 5.0), (2.0, 7.0)]}, "all", log=False).svg()
    assert ElementTree.fromstring(straight).get("aria-label") == "all"


@pytest.mark.parametrize(
    ("series", "message"), [({}, "no point to draw"), ({"a": [(0.0, 1.0)]}, "positive numbers")]
)
def test_what_cannot_be_placed_is_refused(series, message):
    with pytest.raises(ValueError, match=message):
        Scatter(series, "all").svg()
