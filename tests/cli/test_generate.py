import json
import os

import pytest
import torch

from gen_accel import AttentionPlan
from gen_accel.cli.main import main
from gen_accel.eval.video import read_video
from helpers import tiny

SIZE = ("--height=64", "--width=96", "--num-frames=17", "pipeline.max_sequence_length=32")
SHORT = ("--num-inference-steps=5", "--guidance-scale=1")
PAGES = ("index.html", "manifest.json", "report.json")
PARO = ("processor.min_tokens=0", "processor.block=16")


def run(capsys, *words):
    code = main([str(word) for word in words])
    output = capsys.readouterr()
    return code, output.out, output.err


def refused(capsys, *words):
    """The message of a run that must end with one line and exit code 2."""
    code, _, err = run(capsys, *words)
    # Progress bars of loading share stderr; what we say is its last line, and the only one of ours.
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and lines[-1].startswith("gen-accel: error: "), err
    assert err.count("gen-accel: error:") == 1 and "Traceback" not in err
    return lines[-1]


def files(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_wan()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny.tiny_flux()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "below" / "wan.safetensors"
    code = main(
        ["calibrate", f"--model={checkpoint}", "--prompt=a cat", f"--output={path}"]
        + ["--density=0.4", "--block=16", "--groups=2", *SIZE, *SHORT]
    )
    assert code == 0
    return path


def test_compare_writes_videos_report_and_page(capsys, checkpoint, tmp_path):
    out = tmp_path / "out"
    saved = tmp_path / "plan.safetensors"
    words = ("generate", f"--model={checkpoint}", "--prompt=a cat", "--prompt=a dog", "--compare")
    words += (f"--output={out}", f"--save-plan={saved}", "processor.density=0.4")
    code, text, _ = run(capsys, *words, *SIZE, *SHORT, *PARO)
    assert code == 0
    names = ["000.dense.mp4", "000.paro.mp4", "001.dense.mp4", "001.paro.mp4"]
    assert files(out) == [*names, *PAGES]
    for name in names:
        assert read_video(out / name).shape == (17, 3, 64, 96)
    report = json.loads((out / "report.json").read_text())
    dense, paro = report["rows"]
    assert dense["psnr"] is None and dense["density"] == 1 and dense["speedup"] == 1
    assert 0 < paro["density"] < 1 and 0 < paro["psnr"] < 100 and 0 < paro["ssim"] <= 1
    assert paro["speedup"] == pytest.approx(dense["seconds"] / paro["seconds"])
    assert report["prompts"] == ["a cat", "a dog"] and len(report["seconds"]["paro"]) == 2
    assert report["config"]["num_inference_steps"] == 5
    assert "PSNR" in text and str(out / "index.html") in text
    page = (out / "index.html").read_text()
    assert all(f'src="{name}"' in page for name in names)
    assert AttentionPlan.load(saved).density == 0.4


def test_everything_kept_is_the_dense_video(capsys, checkpoint, tmp_path):
    words = ("generate", f"--model={checkpoint}", "--prompt=a cat", "--compare")
    words += (f"--output={tmp_path}", "processor.density=1.0", *SIZE, *SHORT, *PARO)
    assert run(capsys, *words)[0] == 0
    paro = json.loads((tmp_path / "report.json").read_text())["rows"][1]
    assert paro["psnr"] > 60 and paro["density"] == 1


def test_seed_and_dense_only(capsys, checkpoint, tmp_path):
    videos = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        words = ("generate", f"--model={checkpoint}", "--prompt=a cat", "--processor=none")
        words += (f"--output={tmp_path / name}", f"--seed={seed}", *SIZE, "--num-inference-steps=2")
        assert run(capsys, *words)[0] == 0
        assert files(tmp_path / name) == ["000.mp4", *PAGES]
        videos.append((tmp_path / name / "000.mp4").read_bytes())
    assert videos[0] == videos[1] != videos[2]


def test_another_processor(capsys, checkpoint, tmp_path):
    words = ("generate", f"--model={checkpoint}", "--prompt=x", "--processor=gna")
    words += (f"--output={tmp_path}", "processor.window=[3, 3, 3]", "processor.tile=[1, 2, 2]")
    assert run(capsys, *words, *SIZE, *SHORT, "processor.min_tokens=0")[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"][0]["method"] == "gna" and report["rows"][0]["density"] < 1
    assert "window=[3, 3, 3]" in report["config"]["processor"]


def test_an_image_pipeline_writes_png(capsys, image_checkpoint, tmp_path):
    words = ("generate", f"--model={image_checkpoint}", "--prompt=a cat", f"--output={tmp_path}")
    words += ("--height=128", "--width=192", "--num-inference-steps=2", *PARO)
    assert run(capsys, *words, "pipeline.max_sequence_length=48")[0] == 0
    assert files(tmp_path) == ["000.png", *PAGES]
    assert read_video(tmp_path / "000.png").shape == (1, 3, 128, 192)


def test_a_config_file_is_the_same_as_flags(capsys, checkpoint, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {checkpoint}\nprompt: a cat\nheight: 64\nwidth: 96\nnum_frames: 17\n"
        "num_inference_steps: 5\nguidance_scale: 1\nprocessor:\n  name: paro\n  density: 0.9\n"
        "  min_tokens: 0\n  block: 16\npipeline:\n  max_sequence_length: 32\n"
    )
    words = ("generate", f"--config={config}", f"--output={tmp_path / 'out'}")
    assert run(capsys, *words, "--processor.density", "0.4")[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "density=0.4" in report["config"]["processor"]


def test_calibrate_reports_what_it_did(capsys, checkpoint, tmp_path):
    path = tmp_path / "plan.safetensors"
    words = ("calibrate", f"--model={checkpoint}", "--prompt=a cat", f"--output={path}")
    code, out, _ = run(
        capsys, *words, "--block=16", "--density=0.5", "--groups=paper", *SIZE, *SHORT
    )
    assert code == 0
    plan = AttentionPlan.load(path)
    assert plan.density == 0.5 and tuple(plan.grid) == (5, 4, 6) and plan.block == 16
    assert "grid 5x4x6" in out and f"mass kept {plan.mass_kept():.4f}" in out and " s\n" in out


def test_calibrate_chooses_precisions(capsys, checkpoint, tmp_path):
    path = tmp_path / "plan.safetensors"
    words = ("calibrate", f"--model={checkpoint}", "--prompt=a cat", f"--output={path}")
    words += ("--block=16", "--groups=1", *SIZE, *SHORT)
    code, out, _ = run(capsys, *words, "--precision=auto", "--max-error=0.05")
    assert code == 0
    lines = out.splitlines()
    title = "| heads by precision, error at most 0.05 | int8+int8 | int8+fp8 | int8 | not quantised"
    assert lines[1].startswith(title) and lines[3].startswith(
        "| transformer 0 | 2 | 0 | 0 | 0 | 0.0"
    )
    layers = AttentionPlan.load(path).components["transformer"].layers
    assert {layer.precision.names for layer in layers.values()} == {("int8+int8",) * 2}
    for extra, message in (
        (["--precision=int7"], "precision='int7'"),
        (["--precision=auto", "--max-error=0"], "max_error=0.0"),
        (["--max-error=0.1"], "add --precision auto"),
    ):
        assert message in refused(capsys, *words, *extra)


def test_a_plan_is_used(capsys, checkpoint, plan, tmp_path):
    words = ("generate", f"--model={checkpoint}", "--prompt=a cat", f"--plan={plan}")
    assert (
        run(capsys, *words, f"--output={tmp_path}", *SIZE, *SHORT, "processor.min_tokens=0")[0] == 0
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert 0.3 < report["rows"][0]["density"] < 0.8


def test_a_plan_for_another_grid_is_refused(capsys, checkpoint, plan, tmp_path):
    words = ("generate", f"--model={checkpoint}", "--prompt=a cat", f"--plan={plan}")
    words += (f"--output={tmp_path / 'out'}", "processor.min_tokens=0", "--num-frames=17")
    words += ("--height=64", "--width=64", "pipeline.max_sequence_length=32", *SHORT)
    message = refused(capsys, *words)
    assert "5x4x6" in message and "5x4x4" in message and "calibrate" in message
    assert files(tmp_path / "out") == []


def test_foreign_and_missing_plans_are_refused(capsys, checkpoint, tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"not a plan")
    for path, word in ((foreign, "not a readable plan"), (tmp_path / "none", "no such file")):
        words = ("generate", f"--model={checkpoint}", "--prompt=x", f"--plan={path}")
        assert word in refused(capsys, *words, f"--output={tmp_path / 'out'}")
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize("command", ["generate", "calibrate"])
def test_an_empty_prompt_list_is_refused(capsys, checkpoint, tmp_path, command):
    (tmp_path / "empty.txt").write_text("\n")
    for extra in ((), (f"--prompts={tmp_path / 'empty.txt'}",)):
        words = (command, f"--model={checkpoint}", f"--output={tmp_path / 'out'}", *extra)
        assert "prompt" in refused(capsys, *words)
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize("density", ["0", "-0.1", "1.5", ".nan"])
def test_density_outside_the_range_is_refused(capsys, checkpoint, tmp_path, density):
    common = (f"--model={checkpoint}", "--prompt=x", f"--output={tmp_path / 'out'}")
    message = refused(capsys, "generate", *common, f"processor.density={density}")
    assert "(0, 1]" in message and "density=" in message
    message = refused(capsys, "calibrate", *common, f"--density={density.lstrip('.')}")
    assert "(0, 1]" in message
    assert "(0, 1]" in refused(capsys, "demo", common[-1], f"--density={density.lstrip('.')}")
    assert files(tmp_path / "out") == []


def test_a_model_with_nan_is_refused_before_anything_is_written(capsys, tmp_path):
    pipe, _ = tiny.tiny_wan()
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_k.bias[3] = float("nan")
    pipe.save_pretrained(tmp_path / "model")
    words = ("generate", f"--model={tmp_path / 'model'}", "--prompt=x", *SIZE, *SHORT, *PARO)
    message = refused(capsys, *words, f"--output={tmp_path / 'out'}")
    assert "NaN" in message and "layer 1" in message
    assert files(tmp_path / "out") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_only_options_on_a_cpu_are_refused(capsys, checkpoint, tmp_path):
    common = (f"--model={checkpoint}", "--prompt=x", f"--output={tmp_path / 'out'}")
    assert "no cuda; use --device cpu" in refused(capsys, "generate", *common, "--device=cuda")
    assert "--cpu-offload" in refused(capsys, "generate", *common, "--device=cpu", "--cpu-offload")
    assert "not a device" in refused(capsys, "calibrate", *common, "--device=gpu0")
    assert "impl" in refused(capsys, "generate", *common, "processor.impl=triton")
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-inference-step=3",), "did you mean --num-inference-steps?"),
        (("processor.densty=0.2",), "did you mean density?"),
        (("processor.density=some",), "processor.density='some': expected a number"),
        (("--processor=spaattn", "processor.inside=2"), "expected true or false"),
        (("processor.block=17",), "block=17"),
        (("processor.impl=gathr",), "did you mean 'gather'?"),
        (("--processor=gna", "processor.criterion=mass"), "unknown setting of --processor gna"),
        (("--processor=gna", "--plan=x"), "follows no plan"),
        (("--processor=gna", "--save-plan=p.safetensors"), "--save-plan needs a processor"),
        (("--processor=parro",), "did you mean paro?"),
        (("--processor=none", "processor.density=0.2"), "takes no settings"),
        (("--processor=none", "--save-plan=p.safetensors"), "--save-plan needs a processor"),
        (("--height=10",), "10"),
        (("pipeline.max_sequence_lenght=3",), "did you mean max_sequence_length?"),
        (("pipeline.output_type=np",), "pipeline.output_type: the command sets it; drop it"),
        (("pipeline.generator=1",), "pipeline.generator: the command sets it; use --seed"),
        (("pipeline.num_videos_per_prompt=2",), "run again with another --seed"),
        (("--num-inference-steps=0",), "'0' must be a positive whole number"),
        (("--fps=-1",), "'-1' must be a positive number"),
        (("--processor=gna", "processor.tile=8"), "expected text or a list, each a whole number"),
        (("processor.dense_layers=3",), "dense_layers=3: expected a list, each a whole number"),
    ],
)
def test_unknown_and_malformed_settings(capsys, checkpoint, tmp_path, words, message):
    common = ("generate", f"--model={checkpoint}", "--prompt=x", f"--output={tmp_path / 'out'}")
    assert message in refused(capsys, *common, "--num-inference-steps=1", *words)
    assert files(tmp_path / "out") == []


def test_options_the_pipeline_does_not_take(capsys, image_checkpoint, tmp_path):
    words = ("generate", f"--model={image_checkpoint}", "--prompt=x", "--num-frames=5")
    message = refused(capsys, *words, f"--output={tmp_path / 'out'}")
    assert "--num-frames: FluxPipeline does not take it" in message


def test_a_negative_prompt_that_does_nothing_is_told(image_checkpoint, caplog):
    import argparse

    from diffusers import FluxPipeline

    from gen_accel.cli.pipeline import call_arguments

    pipe = FluxPipeline.from_pretrained(image_checkpoint)
    for extra, told in (({}, True), ({"true_cfg_scale": 2.0}, False)):
        caplog.clear()
        args = argparse.Namespace(negative_prompt="rain", sections={"pipeline": extra})
        call_arguments(args, pipe)
        assert ("does nothing at pipeline.true_cfg_scale=1" in caplog.text) == told


def test_models_that_cannot_be_loaded(capsys, tmp_path):
    words = ("--prompt=x", f"--output={tmp_path / 'out'}")
    assert "--model is missing" in refused(capsys, "generate", *words)
    assert "no such folder" in refused(capsys, "generate", *words, f"--model={tmp_path / 'none'}")
    assert "cannot be loaded" in refused(capsys, "generate", *words, f"--model={tmp_path}")


def test_unwritable_outputs_are_refused_before_the_model_is_loaded(capsys, checkpoint, tmp_path):
    (tmp_path / "file").write_text("kept")
    common = (f"--model={checkpoint}", "--prompt=x")
    below = tmp_path / "file" / "out"
    for words in (
        ("generate", *common, f"--output={below}"),
        ("generate", *common, f"--output={tmp_path / 'out'}", f"--save-plan={below / 'p'}"),
        ("calibrate", *common, f"--output={below / 'plan.safetensors'}"),
        ("demo", f"--output={below}"),
    ):
        code, out, err = run(capsys, *words)
        assert code == 2 and err.startswith("gen-accel: error: cannot write to")
        assert err.count("\n") == 1 and out == ""
    assert "a folder" in refused(capsys, "calibrate", *common, f"--output={tmp_path}")
    assert files(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_bench_refuses_a_head_dim_of_zero(capsys):
    message = refused(capsys, "bench", "attention", "--head-dims=0", "--tokens=256", "--repeats=1")
    assert "--head-dims" in message and "'0' must be a positive" in message
