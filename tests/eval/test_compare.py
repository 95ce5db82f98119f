from pathlib import Path

import pytest
import torch

from gen_accel.eval.compare import Comparison, Pair, pair_up
from gen_accel.eval.metrics import METRICS
from gen_accel.eval.video import write_video


def paths(folder, *names):
    return {name: Path(folder) / f"{name}.npy" for name in names}


def test_clips_meet_by_name():
    a, b, reference = paths("a", "1", "2"), paths("b", "2", "3"), paths("r", "1", "2")
    pairs, errors = pair_up({"a": a, "b": b}, reference)
    assert [(p.candidate, p.name, p.reference) for p in pairs] == [
        ("a", "1", reference["1"]), ("a", "2", reference["2"]), ("b", "2", reference["2"]),
    ]  # fmt: skip
    assert len(errors) == 2 and "b/3.npy: no reference" in errors[0]
    assert errors[1].startswith("r/1.npy: b has no clip")


def test_one_reference_mask_or_prompt_serves_all():
    clips = paths("a", "1", "2")
    pairs, errors = pair_up({"a": clips}, paths("r", "x"), paths("m", "y"), ["a cat"])
    assert errors == [] and {p.reference for p in pairs} == {Path("r/x.npy")}
    assert {p.mask for p in pairs} == {Path("m/y.npy")} and {p.prompt for p in pairs} == {"a cat"}
    pairs, _ = pair_up({"a": clips}, None, None, ["a cat", "a dog"])
    assert [p.prompt for p in pairs] == ["a cat", "a dog"] and pairs[0].reference is None
    with pytest.raises(ValueError, match="3 prompts for 2 clips"):
        pair_up({"a": clips}, None, None, ["x"] * 3)


def test_files_of_other_names_are_the_same_clip():
    pairs, errors = pair_up({"a": paths("", "new"), "b": paths("", "old")}, paths("", "dense"))
    assert errors == [] and [p.name for p in pairs] == ["dense", "dense"]


def test_a_failing_metric_leaves_the_others(tmp_path):
    video = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    write_video(tmp_path / "a.npy", video)
    comparison = Comparison({n: METRICS[n] for n in ("psnr", "flicker")}, {})
    scored = comparison.add(Pair("a", "a", tmp_path / "a.npy", tmp_path / "a.npy"), frames=True)
    assert scored.values == {"psnr": 100} and scored.frames == {"psnr": [100]}
    assert comparison.errors == scored.errors and len(scored.errors) == 1
    assert "flicker" in scored.errors[0]
    assert comparison.totals("a") == ({"psnr": 100.0}, [])
