"""`gen-accel ground` on the trained toy, and `gen-accel bench ground` on a few expressions."""

import json
from dataclasses import replace

import pytest
import torch

from gen_accel.cli.bench import ground_checks, ground_score
from gen_accel.cli.main import main
from gen_accel.eval.harness import read_rows
from gen_accel.eval.load import read_clip
from gen_accel.eval.toys import MODELS
from gen_accel.eval.video import read_video, write_video
from gen_accel.eval.world.render import render
from gen_accel.eval.world.scene import TOY, sample_scene

TOY_MODEL = str(MODELS / "toy-hunyuan-video")


@pytest.fixture(scope="module")
def clip():
    return render(sample_scene(3, replace(TOY, empty=0.0, counts=(0, 0.5, 0.5)), "val"))


def test_a_clip_and_its_files(clip, tmp_path, capsys):
    source = tmp_path / "in.mp4"
    write_video(source, torch.from_numpy(clip.video).movedim(-1, 1), fps=24)
    colour = clip.scene.things[0].colour
    call = ["ground", str(source), f"the {colour} object", "--model", TOY_MODEL]
    assert main([*call, "--out", str(tmp_path / "out"), "refam.draws=2"]) == 0
    assert "score" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "ground.json").read_text())
    assert facts["words"] == [colour] and facts["settings"] == {"draws": 2}
    point = tuple(facts["point"].values())
    assert clip.objects[0][point]
    assert read_video(tmp_path / "out" / "overlay.mp4").shape == (9, 3, 32, 32)
    assert read_clip(tmp_path / "out" / "overlay.mp4").fps == 24  # the input's
    assert (tmp_path / "out" / "mask.mp4").is_file()
    assert read_video(tmp_path / "out" / "words.mp4").shape[3] >= 3 * 32


def test_a_picture_gives_pictures(clip, tmp_path):
    source = tmp_path / "in.png"
    write_video(source, torch.from_numpy(clip.video).movedim(-1, 1)[:1])
    call = ["ground", str(source), "the circle", "--model", TOY_MODEL, "--out", str(tmp_path / "o")]
    assert main(call) == 0
    assert {p.name for p in (tmp_path / "o").iterdir()} == {
        "overlay.png", "mask.png", "words.png", "ground.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.mp4", "the ball"], "nowhere.mp4: no such file"),
        (["{png}", "  "], "an empty expression"),
        (["{png}", "of the"], "stop words only"),
        (["{png}", "the ball", "refam.sigmas=1"], "did you mean sigma"),
        (["{png}", "the ball", "refam.sigma=abc"], "sigma='abc': expected a number or null"),
        (["{png}", "the ball", "refam.layers=3"], "expected text or a list, each a whole number"),
        (["{png}", "the ball", "refam.draws=two"], "draws='two': expected a whole number"),
        (["{png}", "the ball", "refam.prompt_template=foo"], "expected names and values or null"),
        (["{png}", "the ball", "refam.caption=2024-01-01"], "expected text or null"),
        (["{png}", "the ball", "refam.sink_rule=3"], "unknown setting refam. 'sink_rule'"),
        (["{png}", "the ball", "--fps=0"], "'0' must be a positive number"),
        (["{png}", "the ball", "--sam", "{none}"], "--sam"),
    ],
)
def test_errors_are_one_line(words, message, clip, tmp_path, capsys):
    source = tmp_path / "in.png"
    write_video(source, torch.from_numpy(clip.video).movedim(-1, 1)[:1])
    words = [w.format(png=source, none=tmp_path / "none") for w in words]
    assert main(["ground", *words, "--model", TOY_MODEL, "--out", str(tmp_path / "o")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]


@pytest.mark.parametrize("model", ["hunyuan-video", "wan"])
def test_bench_measures_every_condition(model, tmp_path, capsys, monkeypatch):
    items = ground_score.items
    monkeypatch.setattr(
        ground_score, "items", lambda split, count, **kw: items(split, min(count, 3), **kw)
    )
    monkeypatch.setattr(ground_checks, "ROUNDS", 2)
    path = tmp_path / "rows.jsonl"
    call = ["bench", "ground", "--model", model, "--expressions", "3", "--out", str(path)]
    assert main(call) == 0
    rows = read_rows(path)
    names = {row["name"] for row in rows if row["kind"] == "ground"}
    assert {r.name for r in ground_score.READOUTS} | set(ground_score.BASELINES) == names
    assert {row["kind"] for row in rows} == {
        "ground", "ground hypothesis", "ground sinks", "ground abstention", "ground overhead",
    }  # fmt: skip
    truth = [r for r in rows if r["name"] == "point on the target" and r["kind"] == "ground"]
    assert all(r["value"] == 1 and r["config"]["flood"] > 0.5 for r in truth)
    sinks = next(r for r in rows if r["kind"] == "ground sinks" and r["name"] == "kappa 20")
    assert sinks["value"] == 1 and sinks["config"]["false_positives"] == 0
    assert "Pointing accuracy" in capsys.readouterr().out


def test_validation_and_held_out_clips_differ():
    val, test = (ground_score.items(split, 12) for split in ("val", "test"))
    assert not any(torch.equal(a.video, b.video) for a in val for b in test)
    assert all(i.expression.thing is None for i in ground_score.items("test", 4, targets=False))


def test_pictures_have_one_frame_and_no_motion():
    found = ground_score.items("val", 12, pictures=True)
    assert {i.video.shape[0] for i in found} == {i.target.shape[0] for i in found} == {1}
    assert {i.objects.shape[1] for i in found} == {1}
    assert "motion" not in {i.expression.tier for i in found}
    assert all(t.direction is None for i in found for t in i.scene.things)


def test_controls_append_as_many_words_as_magnets():
    item = ground_score.items("val", 1)[0]
    counts = {
        kind: len(ground_score.make(item, kind).of("magnet"))
        for kind in ("magnets", "first", "content", "pads", "nonsense", "absent", "present")
    }
    assert set(counts.values()) == {9}
    named = {t.colour for t in item.scene.things}
    assert ground_score.make(item, "present").text.split()[-1] in named
    assert not named & set(ground_score.make(item, "absent").text.split()[-9:])
