import csv
import json
import subprocess
import sys

import pytest

from gen_accel.cli import simulate
from gen_accel.cli.options import Parser, UsageError

HUNYUAN = "--grid 30x48x80 --window 18x24x24 --stride 16x8x8 --tile-q 4x8x8 --tile-kv 2x8x8"


def command(words):
    parser = Parser(prog="gen-accel")
    simulate.add_parser(parser.add_subparsers(parser_class=Parser))
    return simulate.run(parser.parse_args(["simulate", *words.split()]))


def test_report_of_the_published_setting(capsys):
    assert command(f"{HUNYUAN} --attention-share 0.607 --dense-steps 15/50") == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    lines = {name: text.strip() for name, text in lines.items()}
    assert lines["grid"] == "30x48x80, 115,200 tokens"
    assert "density 0.0900" in lines["window"]
    assert lines["visited"].startswith("81 (worst) and 81.0 (mean) of 900 key tiles")
    assert lines["bounds"].startswith("11.11x (worst), 11.11x (mean), 11.11x by visible pairs")
    assert lines["block-sparse"] == "yes"
    assert lines["end to end"].startswith("1.63x")
    assert "padding 0.0%" in lines["tiles"]


def test_report_says_why_not(capsys):
    command("--grid 33x45x80 --window 18x24x24 --stride 2x8x8 --tile-q 2x8x8")
    out = capsys.readouterr().out
    assert "block-sparse  no: frames: key tiles of 2 do not divide length 33; height:" in out
    assert "padding 9.9%" in out
    assert "end to end" not in out


def test_shapes_may_be_short(capsys):
    command("--grid 1x64x64 --window fullx16x16 --stride 8 --tile-q 1x8x8 --json")
    row = json.loads(capsys.readouterr().out)
    assert (row["window"], row["stride"]) == ("fullx16x16", "1x8x8")
    command("--grid 4096 --window 512 --stride 128 --causal 1 --json")
    row = json.loads(capsys.readouterr().out)
    assert row["tile_q"] == "128" and row["causal"] == "1" and "causal" in row["problem"]


def test_border_snap(capsys):
    words = "--grid 21x45x80 --window 12x24x40 --stride 4x8x8 --tile-q 4x8x8 --json"
    command(words)
    assert not json.loads(capsys.readouterr().out)["block_sparse"]
    command(f"{words} --border snap")
    assert json.loads(capsys.readouterr().out)["block_sparse"]


def test_sweep_prints_a_table_and_writes_csv_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    table, plot = tmp_path / "rows.csv", tmp_path / "plot.png"
    command(
        "--grid 30x48x80 --sweep --density 0.1 --count 4 --attention-share 0.6 "
        f"--csv {table} --plot {plot}"
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "grid 30x48x80, query tiles 2x8x8, key tiles 2x8x8 (900 of them)"
    assert lines[1].split()[:3] == ["window", "stride", "density"] and len(lines) == 6
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(row["block_sparse"] == "True" for row in rows)
    assert float(rows[0]["density"]) == pytest.approx(0.1, rel=0.1)
    assert rows[0]["window"] in lines[2]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'gen-accel\[plot\]'"):
        command(f"--grid 32x32 --sweep --plot {tmp_path / 'plot.png'}")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--grid 30x48x80", "--window is missing"),
        ("--grid 30xABx80 --window 2", "--grid 30xABx80: write numbers"),
        ("--grid 1x2x3x4 --window 2", "one to three axes"),
        ("--grid 30x48x80 --window 2x2", "--window 2x2: the grid has 3 axes"),
        ("--grid 30x48x80 --window 2 --dense-steps 50/15", "K is 0..N"),
        ("--grid 30x48x80 --window 2 --dense-steps 0.3", "write K/N"),
        ("--grid 30x48x80 --window 2 --plot x.png", "--plot draws a sweep"),
        ("--grid 5x7 --sweep --tile-q 5x7 --density 0.2", "no window of whole tiles"),
    ],
)
def test_usage_errors(words, message):
    with pytest.raises(UsageError, match=message):
        command(words)


def test_illegal_settings_name_the_nearest_legal_one():
    with pytest.raises(ValueError, match="window=40 on frames .* nearest legal setting: window=30"):
        command("--grid 30x48x80 --window 40x24x24")


def test_torch_is_not_needed():
    code = "import gen_accel.simulate, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_forecast_of_a_whole_run(capsys):
    assert command("e2e --model wan2.1-14b --density 0.2 --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["grid"] == [21, 45, 80] and (found["steps"], found["dense_steps"]) == (50, 10)
    dense = found["linear"] + found["elementwise"] + found["attention"]
    sparse = found["linear"] + found["elementwise"] + found["sparse"]
    assert found["run_s"] == pytest.approx(2 * (10 * dense + 40 * sparse))
    assert command("e2e --model wan2.1-14b --density 0.2 --windows --json") == 0
    assert json.loads(capsys.readouterr().out) == found  # nothing else is assumed of windows
    assert command("e2e --model flux-dev --height 1024 --width 1024") == 0
    text = capsys.readouterr().out
    assert "grid 1x64x64, 4,608 tokens" in text and "assumed" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--device abacus", "--device abacus: rates are known of h200"),
        ("--model wan", "choose from hunyuan-video"),
        ("--dense-steps 7", "write K/N"),
        ("--density -1", "--density -1: a share of the keys"),
        ("--density 2", "--density 2: a share of the keys"),
        ("--height 721", "takes multiples of 16"),
    ],
)
def test_a_forecast_refuses(words, message):
    with pytest.raises((UsageError, ValueError), match=message):
        command(f"e2e {words}")
