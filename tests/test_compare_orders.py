"""tools/compare_orders.py, which reaches into planners and recorders."""

import importlib.util
from pathlib import Path

import pytest

from gen_accel.eval.harness import read_rows
from gen_accel.eval.toys import MODELS

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (MODELS / "toy-hunyuan-video").is_dir(), reason="no trained toy here")
def test_a_table_of_criteria(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("compare", ROOT / "tools" / "compare_orders.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    call = '{"height": 32, "width": 32, "num_frames": 3, "max_sequence_length": 32}'
    words = ["--prompts", "a red circle", "--held-out", "a blue square", "--densities", "0.5"]
    words += ["--num-inference-steps", "1", "--every", "1", "--block", "16", "--call", call]
    out = tmp_path / "rows.jsonl"
    tool.main([str(MODELS / "toy-hunyuan-video"), *words, "--out", str(out)])
    kept = {row["config"]["choice"]: row["value"] for row in read_rows(out)}
    assert {"raster", *tool.CRITERIA} < kept.keys() and all(0.3 < x <= 1 for x in kept.values())
    # On what it was chosen from, no order keeps more mass; on other prompts nearly so.
    assert kept["mass"] >= kept["raster"] - 0.02
    assert "mass kept on held-out runs" in capsys.readouterr().out
