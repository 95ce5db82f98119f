import pytest

from gen_accel.cli.bench.damage import BEGIN, END
from gen_accel.cli.main import main
from gen_accel.eval.harness import read_rows

SMALL = ["--clips=2", "--frames=4", "--size=16", "--threads=1"]


def test_damage_table_rows_and_page(capsys, tmp_path):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "metrics.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["bench", "damage", *SMALL, f"--out={rows}", f"--docs={page}"]) == 0
    table = capsys.readouterr().out
    assert "| | noise | blur | shuffle | flicker | object loss |" in table
    assert "left out: lpips: LPIPS needs weight files" in table
    found = read_rows(rows)
    assert {row["kind"] for row in found} == {"damage"} and len(found) % 5 == 0
    (noise,) = [r for r in found if (r["name"], r["config"]["damage"]) == ("psnr", "noise")]
    assert noise["value"] == 1.0 and noise["config"]["levels"]["0"] == 100.0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| | noise") and text.endswith(f"|\n{END}\nafter\n")
    assert "old" not in text and "| `psnr` | **1.00** |" in text


def test_a_page_without_marks_is_left_alone(capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no marks\n")
    assert main(["bench", "damage", *SMALL, f"--docs={page}"]) == 2
    assert "no lines <!-- gen-accel bench damage -->" in capsys.readouterr().err
    assert page.read_text() == "no marks\n"


def test_cost_of_every_metric(capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    assert main(["bench", "metrics", *SMALL, f"--out={rows}"]) == 0
    assert "2 clips of 4x16x16" in capsys.readouterr().out
    cost = {row["name"]: row["value"] for row in read_rows(rows)}
    parts = sum(v for k, v in cost.items() if k not in ("all metrics", "peak memory"))
    assert cost["all metrics"] == pytest.approx(parts) and {"psnr", "warp_error"} <= cost.keys()
