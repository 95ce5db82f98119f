import pytest

from gen_accel.cli.main import main
from gen_accel.eval.harness import read_rows
from gen_accel.kernels import flex, gather

SMALL = ["bench", "gna", "--grid=4x8x16", "--heads=2", "--head-dims=16", "--densities=0.25"]
SMALL += ["--block=32", "--repeats=2"]


@pytest.fixture(autouse=True)
def no_flex(monkeypatch):
    """Its compilation would take longer than all of these tests."""
    monkeypatch.setattr(flex, "missing", lambda: "no compiler; install one")


def test_the_window_and_its_stride_1_twin(capsys, tmp_path):
    path = tmp_path / "results.jsonl"
    assert main([*SMALL, "--dtypes=fp32,bf16", f"--out={path}"]) == 0
    table = capsys.readouterr().out
    assert "512 tokens, 2 heads, head_dim 16, bf16, blocks of 32" in table
    assert "WRONG" not in table and "FlexAttention was not measured: no compiler" in table

    rows = read_rows(path)
    assert {row["kind"] for row in rows} == {"gna", "gna speed-up"}
    ours = [r for r in rows if r["name"] == "whole call" and r["unit"] == "ms"]
    assert len(ours) == 2 * 3 and all(r["shape"] == [1, 512, 2, 16] for r in ours)
    sparse, single, fitted = (r["config"] for r in ours[:3])
    size, stride, tile = sparse["mask"].split(", ")
    assert single["mask"].split(", ") == [size, "stride 1x1x1", tile] and stride != "stride 1x1x1"
    assert fitted["mask"].startswith(f"{size}, stride 1x1x1, ") and tile not in fitted["mask"]
    # On block edges the blocks visited are the keys seen; at stride 1 they are more.
    assert sparse["density"] == pytest.approx(0.25) and single["density"] > 0.25


def test_a_wrong_result_has_no_time(capsys, tmp_path, monkeypatch):
    right = gather.run

    def wrong(call):
        out, lse = right(call)
        return (out if call.blocks is None else out + 1e-3), lse

    monkeypatch.setattr(gather, "run", wrong)
    path = tmp_path / "results.jsonl"
    assert main([*SMALL, "--dtypes=fp32", f"--out={path}"]) == 1
    assert "WRONG: error" in capsys.readouterr().out
    assert {row["config"]["mask"] for row in read_rows(path)} == {"dense"}


@pytest.mark.parametrize("grid", ["8x32", "8x0x36", "8x32xw"])
def test_bad_grids(grid, capsys):
    assert main(["bench", "gna", f"--grid={grid}"]) == 2
    assert "must be" in capsys.readouterr().err
