import html.parser
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from gen_accel.eval.plot import Plot
from gen_accel.eval.report import (
    Media,
    Picture,
    Report,
    Row,
    Table,
    heatmap,
    to_html,
    write_report,
)


def report(**changes):
    rows = (
        Row("dense", 10.0),
        Row("PARO <b>", 4.0, 0.26, 31.25, 0.9876, "density 0.25"),
    )
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    content = {
        "title": "Dense & sparse",
        "summary": 'one "sentence"',
        "rows": rows,
        "media": [Media("dense.mp4", "dense"), Media("a b.png", "picture")],
        "tables": {"Metrics <m>": Table(("metric", "A & B"), [("psnr", "31.2 <dB>")], "note <n>")},
        "clips": {"clip 1": [Media("1.mp4", "sparse <s>")]},
        "plots": {"PSNR": [Plot({"A <x>": [30.0, 31.0, None]}, "per frame", y="dB")]},
        "pictures": {"Before and after": [Picture(picture, "before"), Picture(picture, "after")]},
        "notes": ["weights <built>"],
        "config": {"steps": 12},
        "versions": {"torch": "2.13"},
        "data": {"orders": ["FHW"]},
    }
    return Report(**{**content, **changes})


class Elements(html.parser.HTMLParser):
    """Collects start tags, and insists that they are closed in order."""

    VOID = {"meta", "img", "br"}  # and what closes itself, as SVG's elements do

    def __init__(self, page):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(page)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_well_formed_and_needs_no_network():
    page = Elements(to_html(report()))
    for tag, attributes in page.found:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/png;base64,") or "/" not in value
        assert tag not in ("link", "iframe")
    assert "http" not in to_html(report()).replace("<!doctype html>", "")


def test_the_page_shows_everything_once_escaped():
    page = to_html(report())
    text = " ".join(Elements(page).text)
    for shown in ("Dense & sparse", "PARO <b>", "4.0 s", "2.50x", "0.260", "31.2 dB", "0.9876"):
        assert shown in text
    for shown in ("Metrics <m>", "A & B", "31.2 <dB>", "note <n>", "clip 1", "sparse <s>", "A <x>"):
        assert shown in text
    assert "weights <built>" in text and "<b> " not in page.replace("<b>2.50x</b>", "")
    sources = [a["src"] for t, a in Elements(page).found if t in ("video", "img")]
    assert sources[:2] == ["dense.mp4", "a b.png"]


def test_pictures_are_inside_and_exact():
    page = to_html(report())
    data = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(data) == 2
    import base64

    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[0]))))
    assert np.array_equal(pixels, np.arange(60, dtype=np.uint8).reshape(4, 5, 3))


def test_the_folder_and_its_json(tmp_path):
    page = write_report(tmp_path / "new" / "folder", report())
    assert page == tmp_path / "new" / "folder" / "index.html" and page.is_file()
    data = json.loads((page.parent / "report.json").read_text())
    assert [row["speedup"] for row in data["rows"]] == [1.0, 2.5]
    assert data["rows"][1]["psnr"] == 31.25 and data["orders"] == ["FHW"]
    assert data["tables"]["Metrics <m>"]["rows"] == [["psnr", "31.2 <dB>"]]
    assert data["plots"]["PSNR"][0]["series"] == {"A <x>": [30.0, 31.0, None]}
    assert data["media"][0] == {"file": "dense.mp4", "caption": "dense"}


def test_a_table_is_enough(tmp_path):
    assert write_report(tmp_path, report(rows=())).is_file()


@pytest.mark.parametrize("rows", [(), (Row("dense", 0.0),), (Row("dense", float("nan")),)])
def test_reports_without_a_baseline_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="row|positive"):
        write_report(tmp_path / "x", report(rows=rows, tables={}))
    assert not (tmp_path / "x").exists()


def test_heatmap_rises_with_its_values():
    values = torch.tensor([[0.0, 0.5, 1.0], [2.0, 4.0, 8.0]])
    light = heatmap(values).astype(int).sum(-1)
    assert light.shape == (2, 3)
    assert (np.diff(light.flatten()) > 0).all()
    assert np.array_equal(heatmap(values), heatmap(values * 3))
    assert heatmap(values, largest=16.0).astype(int).sum() < heatmap(values).astype(int).sum()
    assert np.array_equal(heatmap(torch.zeros(2, 2)), heatmap(torch.zeros(2, 2), largest=1.0))


@pytest.mark.parametrize("bad", [torch.zeros(3), -torch.ones(2, 2), torch.full((2, 2), torch.nan)])
def test_heatmap_needs_a_matrix_of_shares(bad):
    with pytest.raises(ValueError, match="heatmap"):
        heatmap(bad)
