import json
import os
import re

import pytest
import torch

from gen_accel.cli import pipeline as shared
from gen_accel.cli import verdict
from gen_accel.cli.main import main
from helpers import tiny
from helpers.clip import save_tiny_clip

SIZE = ("--height=64", "--width=96", "--num-frames=17", "pipeline.max_sequence_length=32")
SHORT = ("--num-inference-steps=3", "--guidance-scale=1")
SMALL = ("processor.min_tokens=0", "paro.block=16", "gna.tile=[1, 2, 2]")
BROKEN = "paro:density=0.02:dense_steps=0"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Tiny Wan whose attention matters: random weights hardly see it otherwise."""
    pipe = tiny.tiny_wan()[0]
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.attn1.to_q.weight.mul_(4)
            block.attn1.to_out[0].weight.mul_(40)
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog\n")
    return path


@pytest.fixture
def rendered(monkeypatch):
    """Prompts in the order the pipeline was really called."""
    calls = []
    generate = shared.generate

    def counting(pipe, prompt, seed, call):
        calls.append((prompt, seed))
        return generate(pipe, prompt, seed, call)

    monkeypatch.setattr(shared, "generate", counting)
    return calls


def run(capsys, model, prompts, out, *words):
    command = ["verdict", f"--model={model}", f"--prompts={prompts}", f"--output={out}"]
    code = main([*command, *SIZE, *SHORT, *SMALL, *map(str, words)])
    output = capsys.readouterr()
    return code, output.out, output.err


def report(out):
    return json.loads((out / "report.json").read_text())


def test_a_broken_setting_is_last_and_fails_and_a_good_one_passes(
    capsys, model, prompts, tmp_path, rendered
):
    prompts.write_text("a cat\na dog\na fox\n")
    out = tmp_path / "out"
    words = (f"--methods={BROKEN},paro:density=1,gna:density=0.5", "--limits=psnr>=50,defects<=0")
    code, text, _ = run(capsys, model, prompts, out, *words)
    states = report(out)["states"]
    assert list(states)[-1] == BROKEN and states[BROKEN] == "fail"
    assert states["paro:density=1"] == "pass" and code == 0
    assert re.search(r"^3\. paro:density=0\.02:dense_steps=0: fail", text, re.M)
    # Every prompt has noise of its own, and every setting the noise of the dense clip.
    assert len(rendered) == 12 and rendered[:3] == [("a cat", 0), ("a dog", 1), ("a fox", 2)]
    assert rendered[3:6] == rendered[:3]
    values = report(out)["values"]
    assert min(values["paro:density=1"]["psnr"]) > 50 > max(values[BROKEN]["psnr"])


def test_the_same_command_twice_renders_and_loads_nothing(
    capsys, model, prompts, tmp_path, rendered, monkeypatch
):
    out = tmp_path / "out"
    words = ("--methods=paro:density=0.5", "--limits=psnr>=20,flicker<=1.2x")
    first = run(capsys, model, prompts, out, *words)
    before = report(out)
    assert len(rendered) == 4 and before["rendered"] == 4
    stamps = {p.name: p.stat().st_mtime_ns for p in (out / "clips").iterdir()}

    def refuse(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(shared, "load_pipeline", refuse)
    again = run(capsys, model, prompts, out, *words)
    assert len(rendered) == 4 and report(out)["rendered"] == 0 and again[0] == first[0]
    assert report(out)["values"] == before["values"]
    # No clip and no score was written again: metrics were not computed either.
    assert {p.name: p.stat().st_mtime_ns for p in (out / "clips").iterdir()} == stamps
    assert "4 clips, 0 of them rendered now" in again[1]


def test_an_interrupted_run_goes_on_where_it_stopped(
    capsys, model, prompts, tmp_path, rendered, monkeypatch
):
    counting = shared.generate

    def stopping(*args):
        if len(rendered) == 3:
            raise KeyboardInterrupt
        return counting(*args)

    monkeypatch.setattr(shared, "generate", stopping)
    words = ("--methods=paro:density=0.5", "--limits=psnr>=20")
    assert run(capsys, model, prompts, tmp_path / "out", *words)[0] == 130
    monkeypatch.setattr(shared, "generate", counting)
    run(capsys, model, prompts, tmp_path / "out", *words)
    assert len(rendered) == 4  # three before, one after
    whole = run(capsys, model, prompts, tmp_path / "whole", *words)
    assert report(tmp_path / "whole")["values"] == report(tmp_path / "out")["values"]
    assert whole[0] in (0, 1)


def test_what_changes_a_clip_makes_it_anew_and_the_rest_stays(
    capsys, model, prompts, tmp_path, rendered
):
    out, words = tmp_path / "out", ("--limits=psnr>=20",)
    run(capsys, model, prompts, out, *words, "--methods=paro:density=0.5")
    rendered.clear()
    run(capsys, model, prompts, out, *words, "--methods=paro:density=0.6")
    assert len(rendered) == 2  # dense clips are kept
    rendered.clear()
    run(capsys, model, prompts, out, *words, "--methods=paro:density=0.6", "--seed=1")
    # Prompt and noise make a clip: nothing of these was seen before.
    assert len(rendered) == 4
    rendered.clear()
    os.utime(model / "transformer" / "config.json", (1, 1))
    run(capsys, model, prompts, out, *words, "--methods=paro:density=0.6")
    assert len(rendered) == 4


def test_the_search_finds_a_density_that_passes(capsys, model, prompts, tmp_path, rendered):
    out = tmp_path / "out"
    words = ("--methods=gna", "--search", "--densities=0.1,0.3,0.5,0.75,1", "--limits=psnr>=45")
    code, text, _ = run(capsys, model, prompts, out, *words)
    found = report(out)
    assert code == 0 and found["found"]["gna"] in text
    passing = [label for label, state in found["states"].items() if state == "pass"]
    lowest = min(passing, key=lambda label: float(label.partition("@")[2]))
    assert found["found"]["gna"] == lowest
    assert len(rendered) == 2 * (1 + len(found["states"])) and len(found["states"]) <= 4
    words = (*words[:-1], "--limits=psnr>=200")
    code, text, _ = run(capsys, model, prompts, out, *words)
    assert code == 1 and "no density of gna passes" in text and report(out)["found"]["gna"] is None


def test_clip_limits_and_the_page(capsys, model, prompts, tmp_path):
    clip = save_tiny_clip(tmp_path / "clip")
    out = tmp_path / "out"
    words = ("--methods=paro:density=0.5", "--limits=clip_drop<=50,flicker<=9x", f"--clip={clip}")
    code, text, _ = run(capsys, model, prompts, out, *words)
    assert code == 0 and re.search(r"clip_drop<=50 +-?\d", text)
    page = (out / "index.html").read_text()
    for shown in (
        "worst clip (#",
        "CLIPScore",
        "95 % t intervals",
        "layers (down)",
        "flicker&lt;=9x",
    ):
        assert shown in page
    for target in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert target.startswith("data:") or (out / target).is_file()
    row = json.loads((out / "results.jsonl").read_text().splitlines()[0])
    assert row["kind"] == "verdict" and row["n"] == 2 and row["config"]["state"] == "pass"


def test_a_clip_that_is_not_finite_fails(capsys, model, prompts, tmp_path, monkeypatch):
    generate = shared.generate
    calls = []

    def poisoned(pipe, prompt, seed, call):
        frames, seconds = generate(pipe, prompt, seed, call)
        calls.append(prompt)
        if len(calls) == 4:
            frames[2] = torch.nan
        return frames, seconds

    monkeypatch.setattr(shared, "generate", poisoned)
    words = ("--methods=paro:density=1", "--limits=psnr>=20,defects<=0.9")
    code, text, _ = run(capsys, model, prompts, tmp_path / "out", *words)
    assert code == 1 and report(tmp_path / "out")["states"] == {"paro:density=1": "fail"}
    assert "clip 1: frame 2: nan" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods=parro",), "did you mean paro?"),
        (("--methods=none",), "dense is what the others are compared with"),
        (("--methods=paro:density",), "not NAME=VALUE"),
        (("--methods=paro:densty=0.3",), "did you mean density?"),
        (("--methods=paro:density=2",), "(0, 1]"),
        (("--methods=paro,paro",), "stands twice"),
        (("--methods=paro", "--densities=0.1,x"), "numbers with commas"),
        (("--methods=paro", "--densities=0,0.5"), "(0, 1]"),
        (("--limits=psnr",), "METRIC>=NUMBER"),
        (("--limits=psnr_drop<=1",), "already"),
        (("--limits=clip_drop<=1", "--clip=/nowhere"), "--limits clip_score: /nowhere"),
        (("--limits=lpips<=0.3",), "--limits lpips: LPIPS needs weight files"),
        (("paro.densty=0.3",), "did you mean density?"),
        (("pro.density=0.3",), "did you mean"),
        (("pipeline.nothing=1",), "unknown pipeline argument"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_rendering(
    capsys, model, prompts, tmp_path, rendered, words, message
):
    code, _, err = run(capsys, model, prompts, tmp_path / "out", *words)
    lines = [line for line in err.splitlines() if line.startswith("gen-accel: error: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in err
    assert rendered == [] and not (tmp_path / "out" / "index.html").exists()


def test_one_prompt_and_a_setting_that_stays_dense_are_refused(capsys, model, tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("a cat\n")
    assert "at least 2" in run(capsys, model, one, tmp_path / "out")[2]
    one.write_text("a cat\na dog\n")
    words = ("--methods=gna", "processor.min_tokens=5000")
    code, _, err = run(capsys, model, one, tmp_path / "out", *words)
    assert code == 2 and "no attention call ran sparse" in err and "min_tokens=0" in err


def test_an_image_model_is_judged_without_time(capsys, prompts, tmp_path, rendered):
    tiny.tiny_flux()[0].save_pretrained(tmp_path / "flux")
    words = ["verdict", f"--model={tmp_path / 'flux'}", f"--prompts={prompts}"]
    words += [f"--output={tmp_path / 'out'}", "--height=128", "--width=192", "paro.block=16"]
    words += ["--num-inference-steps=2", "pipeline.max_sequence_length=48"]
    words += ["processor.min_tokens=0", "--methods=paro:density=1"]
    assert main([*words, "--limits=warp_error<=1.1x"]) == 2
    assert "--limits warp_error<=1.1x: compares frames" in capsys.readouterr().err
    assert len(rendered) == 1
    assert main(words) == 0
    assert "left out: flicker<=1.1x: compares frames" in capsys.readouterr().out
    assert set(report(tmp_path / "out")["values"]["paro:density=1"]) == {"psnr", "ssim", "defects"}


def test_every_processor_of_the_package_is_a_method():
    import gen_accel

    names = {n.removesuffix("Processor").lower() for n in gen_accel.__all__ if "Processor" in n}
    assert {"paro", "gna"} <= names <= set(verdict.SECTIONS)


def test_toys_bring_their_call():
    from gen_accel.eval.toys import MODELS, toy_call

    assert verdict._toy_call(str(MODELS / "toy-hunyuan-video")) == toy_call("hunyuan-video")
    for other in ("hunyuan-video", "/elsewhere/toy-hunyuan-video", "owner/toy-wan"):
        assert verdict._toy_call(other) == {}


def test_a_hub_id_is_known_by_its_commit(monkeypatch, tmp_path):
    """Before the download there is no commit; clips of that run must be found by the next."""
    from argparse import Namespace

    from gen_accel.cli import renders

    commits = iter([None, "commit 1", "commit 1"])
    monkeypatch.setattr(renders, "fingerprint", lambda model: next(commits))
    loaded = []

    def keys():
        args = Namespace(model="owner/model")
        load = lambda: loaded.append(1) or "pipe"  # noqa: E731
        return renders.Renders(tmp_path, args, {}, "cpu", load)._basis

    assert keys() == keys() and len(loaded) == 1
