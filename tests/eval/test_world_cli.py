import argparse
import json
import sys
from pathlib import Path

import pytest

from gen_accel.cli import world

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


def run(*words):
    parser = argparse.ArgumentParser()
    world.add_parser(parser.add_subparsers())
    return world.run(parser.parse_args(["world", *words]))


def test_draw(tmp_path, capsys):
    assert run("--seed", "3", "--out", str(tmp_path)) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == json.loads((tmp_path / "clip.json").read_text())["caption"]
    assert {"clip.mp4", "clean.mp4", "sheet.png"} <= {Path(p).name for p in shown[1:]}


def test_gate_prints_every_bar_and_fails_an_untrained_model(tmp_path, capsys):
    from toy_models import build

    build("flux").save_pretrained(tmp_path / "toy")
    counts = ["--samples", "6", "--steps", "1", "--clips", "1", "--maps", "2"]
    lines = tmp_path / "gate.jsonl"
    status = run(
        "gate", "--model", "flux", "--folder", str(tmp_path / "toy"), *counts, "--json", str(lines)
    )
    shown = capsys.readouterr().out
    assert status == 1 and "FAIL" in shown and "text->image" in shown
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    names = {r["name"] for r in records}
    assert {"colour", "shape", "inversion", "colour word map", "same seed, two loads"} <= names
    assert all(r["low"] <= r["value"] <= r["high"] for r in records)


def test_gate_without_a_model_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        run("gate", "--model", "wan", "--folder", str(tmp_path))
