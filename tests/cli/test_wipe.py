"""gen-accel wipe on the trained toy, and the pieces of its bench."""

import json

import numpy as np
import pytest
import torch

from gen_accel.cli import pipeline as shared
from gen_accel.cli.bench.wipe import (
    REMOVED,
    _dilated,
    _errors,
    _jobs,
    _median_fill,
    _mixed,
    _random,
    scenes,
)
from gen_accel.cli.bench.wipe_table import spearman, tables
from gen_accel.cli.main import main
from gen_accel.cli.wipe import painted, preview
from gen_accel.eval.load import read_clip
from gen_accel.eval.toys import MODELS
from gen_accel.eval.video import read_video, write_video
from gen_accel.eval.world.render import render
from gen_accel.pipelines import refam

MODEL = MODELS / "toy-hunyuan-video"
PROMPT = "a red circle with a shadow on a plain background"


@pytest.fixture
def clip(tmp_path):
    drawn = render(scenes("shadow", "val", 1)[0])
    video = torch.from_numpy(drawn.video).permute(0, 3, 1, 2)
    mask = torch.from_numpy(drawn.target)[:, None].expand(-1, 3, -1, -1)
    write_video(tmp_path / "in.npy", video)
    write_video(tmp_path / "mask", mask.float())
    write_video(tmp_path / "mask.png", mask.any(0, keepdim=True).float())
    return tmp_path


def command(clip, *more, mask="mask"):
    return [
        "wipe", str(clip / "in.npy"), "--mask", str(clip / mask), "--model", str(MODEL),
        "--prompt", PROMPT, "--target-prompt", "an empty scene on a plain background",
        "--query", "circle,shadow", "--max-sequence-length", "32", "--out", str(clip / "out.mp4"),
        "wipe.steps=1", "wipe.solver=euler", *more,
    ]  # fmt: skip


@pytest.mark.skipif(not (MODEL / "model_index.json").is_file(), reason="a wheel has no models")
def test_wipe_writes_the_clip_the_masks_and_a_comparison(clip, capsys):
    assert main(command(clip, "effects.word_layers=[3]")) == 0
    said = capsys.readouterr().out
    assert read_video(clip / "out.mp4").shape == (9, 3, 32, 32)
    assert read_video(clip / "out.masks.png").shape[0] == 1
    assert read_video(clip / "out.compare.mp4").shape[0] == 9
    assert "replaced" in said and "background drift" in said
    assert main(command(clip, mask="mask.png")) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["wipe.preserv=freeze"], "did you mean preserve?"),
        (["wipe.preserve=all"], "choose one of none"),
        (["--expression", "the red ball"], "one of the two"),
        (["--query", " , "], "query is empty"),
        (["effects.rule=mean"], "choose one of otsu"),
        (["--query", "ball"], "not in the prompt"),
        (["--target-prompt", " "], "--target-prompt is missing"),
        (["wipe.steps=many"], "wipe.steps='many': expected a whole number"),
        (["wipe.true_cfg_scale=x"], "wipe.true_cfg_scale='x': expected a number"),
        (["wipe.value_layers=3"], "value_layers=3: expected a list, each a whole number or null"),
        (["refam.draws=2"], "for --expression"),
    ],
)
def test_bad_options_are_one_line(clip, capsys, change, message):
    assert main(command(clip, *change)) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.count("\n") == 0 or said.splitlines()[-1].startswith("gen-accel: error")


def refuse(*_):
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--out", "{clip}/w.avi"], "unknown format '.avi'; use .mp4"),
        (["--out", "{clip}/w.png"], "a PNG holds one frame, the video has 9"),
        (["--out", "{clip}/mask"], "a folder is there already"),
        (["--out", "{clip}/in.npy/w.mp4"], "cannot write to"),
        (["--fps", "-1"], "argument --fps: '-1' must be a positive number"),
        (["--fps", "0"], "argument --fps: '0' must be a positive number"),
        (["--max-sequence-length", "0"], "'0' must be a positive whole number"),
    ],
)
def test_outputs_are_checked_before_the_model_is_loaded(clip, capsys, monkeypatch, change, message):
    monkeypatch.setattr(shared, "load_pipeline", refuse)
    assert main(command(clip, *(word.format(clip=clip) for word in change))) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def expressed(clip, *more):
    words = command(clip, *more)
    at = words.index("--mask")
    return [*words[:at], "--expression", "the circle", *words[at + 2 :]]


def test_an_expression_is_asked_with_the_same_options(clip, capsys, monkeypatch):
    asked = {}

    def answer(pipe, video, expression, **call):
        asked.update(call, expression=expression)
        raise ValueError("enough")

    monkeypatch.setattr(shared, "load_pipeline", lambda *_: None)
    monkeypatch.setattr(refam, "ground_video", answer)
    assert main(expressed(clip, "--seed", "7", "refam.draws=2")) == 2
    assert "enough" in capsys.readouterr().err
    assert asked == {
        "expression": "the circle", "seed": 7, "max_sequence_length": 32, "draws": 2,
    }  # fmt: skip
    assert main(expressed(clip, "refam.draws=two")) == 2
    assert "refam.draws='two': expected a whole number" in capsys.readouterr().err


@pytest.mark.skipif(not (MODEL / "model_index.json").is_file(), reason="a wheel has no models")
def test_a_clip_keeps_its_speed(clip, caplog):
    write_video(clip / "in.mp4", read_video(clip / "in.npy"), fps=24)
    words = command(clip, "--negative-prompt", "blurred")
    words[1] = str(clip / "in.mp4")
    assert main(words) == 0
    assert read_clip(clip / "out.mp4").fps == read_clip(clip / "out.compare.mp4").fps == 24
    assert "--negative-prompt does nothing at wipe.true_cfg_scale=1" in caplog.text
    assert main([*words, "--fps", "8"]) == 0
    assert read_clip(clip / "out.mp4").fps == 8


def test_painted_masks_are_seen():
    video = torch.full((6, 3, 8, 8), 100, dtype=torch.uint8)
    object_ = torch.zeros(6, 8, 8, dtype=torch.bool)
    object_[:, :2], effect = True, torch.zeros(6, 8, 8, dtype=torch.bool)
    effect[:, 4:6] = True
    out = painted(video, object_ | effect, effect)
    assert (out[:, :, 7] == 100).all()
    assert (out[:, 0, 0] > out[:, 2, 0]).all()
    assert (out[:, 2, 4] > out[:, 0, 4]).all()
    assert len(preview(video, object_, effect)) == 1


def test_baselines_cover_as_much_as_the_effect_and_leave_the_object():
    object_ = torch.zeros(2, 3, 6, 6, dtype=torch.bool)
    object_[:, :, 2:4, 2:4] = True
    effect = torch.zeros_like(object_)
    effect[0, :, 4, 2:5] = True
    for found in (_dilated(object_, effect), _random(object_, effect, [1, 2])):
        assert found.flatten(1).sum(1).tolist() == effect.flatten(1).sum(1).tolist()
        assert not (found & object_).any()


def test_the_median_fills_from_other_frames():
    video = torch.full((1, 3, 3, 4, 4), 0.5)
    mask = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[0, :, 3, 3] = True
    video[0, 0, :, 0, 0] = video[0, :, :, 3, 3] = 1.0
    torch.testing.assert_close(_median_fill(video, mask), torch.full_like(video, 0.5))


def test_residue_is_one_for_the_input_and_zero_for_the_twin():
    drawn = render(scenes("shadow", "val", 1)[0])

    class Batch:
        video, clean = (
            torch.from_numpy(x).permute(0, 3, 1, 2)[None] for x in (drawn.video, drawn.clean)
        )
        object_pixels = torch.from_numpy(drawn.target)[None]
        effect_pixels = torch.from_numpy(drawn.target_effect)[None]

    used = Batch.object_pixels[0]
    same = _errors(Batch, 0, Batch.video[0], used, None)
    gone = _errors(Batch, 0, Batch.clean[0], used, None)
    assert same["object_left"] == same["effect_left"] == 1.0
    assert gone["object_left"] == gone["effect_left"] == 0.0
    assert gone["foreground"] == 100.0 > same["foreground"]


def test_clips_are_mixed_and_not_run_twice():
    class Args:
        split, clips, ablate, batch = "val", 20, 4, 8

    mixed = _mixed("val", 20)
    kinds = [kind for kind, _ in mixed]
    assert {kind: kinds.count(kind) for kind in REMOVED} == REMOVED
    assert len({(k, s.seed) for k, s in mixed}) == 20
    jobs = _jobs(Args, [])
    removal = [pair for part, _, chosen in jobs for pair in chosen if part == "removal"]
    assert sorted(s.seed for _, s in removal) == sorted(s.seed for _, s in mixed)
    done = [
        {"part": p, "set": what if p == "mask" else k, "seed": s.seed, "split": "val"}
        for p, what, chosen in jobs
        for k, s in chosen
    ]
    assert _jobs(Args, done) == []


def test_test_seeds_are_not_val_seeds():
    val, test = ({s.seed for s in scenes("none", split, 30)} for split in ("val", "test"))
    assert not val & test


def test_spearman():
    rng = np.random.default_rng(0)
    a = rng.permutation(9)
    assert spearman(a, 3.0 * a + 1) == pytest.approx(1.0)
    assert spearman(a, -np.exp(a)) == pytest.approx(-1.0)
    assert spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1.0)
    assert spearman([1, 1], [2, 3]) == 0.0


def test_tables_are_made_of_rows():
    arm = dict.fromkeys(
        ("foreground", "object", "effect", "background", "untouched", "object_left",
         "effect_left", "tok_sim"), 1.0,
    )  # fmt: skip
    arms = {"full": {**arm, "foreground": 30.0, "tok_sim": 2.0}, "identity": arm}
    from gen_accel.cli.bench.wipe_table import BASELINES

    arms |= {name: arm for name in BASELINES}
    rows = [{"part": "removal", "set": "shadow", "seed": i, "arms": arms} for i in range(3)]
    text = tables(json.loads(json.dumps(rows)))
    assert "| full | 30.0 [30.0, 30.0] |" in text
    assert "29.0 [29.0, 29.0]" in text
