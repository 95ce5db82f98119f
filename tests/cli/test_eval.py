import dataclasses
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import scipy.stats
import torch

from gen_accel.cli import networks
from gen_accel.cli.main import main
from gen_accel.eval.fidelity import psnr
from gen_accel.eval.metrics import METRICS
from gen_accel.eval.video import read_video, write_video
from helpers import tiny
from helpers.clip import save_tiny_clip

OFFLINE = "psnr,ssim,flicker,warp_error,fvd_toy"


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def run(capsys, *words):
    code = main(["eval", *map(str, words)])
    output = capsys.readouterr()
    return code, output.out, output.err


def video(seed=0, frames=5, size=(24, 32)):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 3, 3, 4, 4, generator=generator), (frames, *size), mode="trilinear"
    )
    return (smooth[0].transpose(0, 1) * 255).round().byte()


def noisy(clip, sigma, seed=1):
    noise = sigma * torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    return (clip.float() + 255 * noise).clamp(0, 255).round().byte()


@pytest.fixture
def sets(tmp_path):
    """Three clips in reference/, a little noise in a/, much in b/."""
    for i in range(3):
        write_video(tmp_path / "reference" / f"{i}.npy", video(i))
        write_video(tmp_path / "a" / f"{i}.npy", noisy(video(i), 0.01))
        write_video(tmp_path / "b" / f"{i}.npy", noisy(video(i), 0.1))
    return tmp_path


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_folders_are_paired_by_name_and_written_three_ways(capsys, sets):
    out = sets / "out"
    words = (sets / "a", sets / "b", "--reference", sets / "reference", "--metrics", OFFLINE)
    code, text, _ = run(capsys, *words, "--output", out, "--players", 2)
    assert code == 0 and str(out / "index.html") in text
    table = {
        line.split()[0]: line.split()[2:]
        for line in text.splitlines()
        if " higher " in line or " lower " in line
    }
    means = [
        sum(float(psnr(noisy(video(i), sigma), video(i))) for i in range(3)) / 3
        for sigma in (0.01, 0.1)
    ]
    assert [float(x) for x in table["psnr"]] == pytest.approx(means, rel=1e-3)
    assert float(table["fvd_toy"][0]) < float(table["fvd_toy"][1])
    differences = [
        float(psnr(noisy(video(i), 0.1), video(i)) - psnr(noisy(video(i), 0.01), video(i)))
        for i in range(3)
    ]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(differences), scipy.stats.sem(differences))
    line = next(line for line in text.splitlines() if line.startswith("psnr") and "b - a" in line)
    assert [float(x) for x in re.findall(r"-?\d+\.\d+", line)] == pytest.approx(
        [np.mean(differences), low, high], rel=1e-3
    )
    found = rows(out)
    totals = {(r["config"]["candidate"], r["name"]): r for r in found if r["kind"] == "eval"}
    assert totals["b", "psnr"]["value"] == pytest.approx(means[1]) and totals["b", "psnr"]["n"] == 3
    single = [r for r in found if r["kind"] == "eval clip" and r["name"] == "ssim"]
    assert len(single) == 6 and {r["config"]["clip"] for r in single} == {"0", "1", "2"}
    # Two clips with reference, a, b and two differences each.
    assert sum(name.endswith(".mp4") for name in os.listdir(out)) == 10
    page = (out / "index.html").read_text()
    report = json.loads((out / "report.json").read_text())
    assert list(report["clips"]) == ["0", "1"]
    assert [m["caption"] for m in report["clips"]["0"]][-1] == "b - reference, x8"
    assert len(report["plots"]["0, frame by frame"][0]["series"]["a"]) == 5
    assert "structural similarity" in page and "mostly bias" in page  # definition; warning


def test_files_are_compared_with_one_reference_side_by_side(capsys, sets):
    files = [sets / name / "0.npy" for name in ("a", "b")]
    renamed = [path.rename(sets / f"{path.parent.name}.npy") for path in files]
    words = ("--reference", sets / "reference" / "0.npy", "--output", sets / "out")
    code, text, _ = run(capsys, *renamed, *words, "--prompt=x")
    report = json.loads((sets / "out" / "report.json").read_text())
    assert code == 0 and re.search(r"psnr +higher +\d+\.\d+ +\d+\.\d+\n", text)
    assert [m["caption"] for m in report["clips"]["0"]][:3] == ["reference", "a", "b"]
    assert set(report["plots"]["0, frame by frame"][0]["series"]) == {"a", "b"}


def test_the_page_needs_no_network(capsys, sets):
    words = (sets / "a" / "0.npy", "--reference", sets / "reference" / "0.npy")
    code, *_ = run(capsys, *words, "--metrics=all", "--output", sets / "out")
    page = (sets / "out" / "index.html").read_text()
    assert code == 0
    for target in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert (sets / "out" / target).is_file()
    assert not re.search(r"url\(|@import|<link|<script src|<iframe", page)


def test_a_reference_with_rounding_and_without_gives_the_cap(capsys, sets):
    """uint8 and float files of one clip are the same clip."""
    torch.save(video(0).float() / 255, sets / "float.pt")
    words = (sets / "float.pt", "--reference", sets / "reference" / "0.npy", "--metrics=psnr")
    code, text, _ = run(capsys, *words, "--output", sets / "out")
    assert code == 0 and re.search(r"psnr +higher +100\b", text)


def test_clip_metrics_use_the_prompt(capsys, sets, tmp_path):
    folder = save_tiny_clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na fox\n")
    metrics = "clip_score,clip_temp,clip_drift"
    words = (sets / "a", "--reference", sets / "reference", "--clip", folder)
    words += ("--metrics", metrics, "--feature-cache", tmp_path / "cache")
    code, *_ = run(capsys, *words, "--prompts", tmp_path / "prompts.txt", "--output", sets / "1")
    assert code == 0
    first = {(r["name"], r["config"].get("clip")): r["value"] for r in rows(sets / "1")}
    assert first["clip_drift", None] > 0.9 and any((tmp_path / "cache").rglob("*.npy"))
    assert run(capsys, *words, "--prompt", "a cat", "--output", sets / "2")[0] == 0
    again = {(r["name"], r["config"].get("clip")): r["value"] for r in rows(sets / "2")}
    assert again["clip_score", "0"] == first["clip_score", "0"]
    assert again["clip_score", "1"] != first["clip_score", "1"]
    assert "needs --prompt" in run(capsys, *words, "--output", sets / "3")[2]


def test_masks(capsys, sets):
    mask = torch.zeros(5, 3, 24, 32, dtype=torch.uint8)
    mask[..., :16] = 255
    write_video(sets / "mask.npy", mask)
    words = (sets / "a" / "0.npy", "--reference", sets / "reference" / "0.npy")
    words += ("--mask", sets / "mask.npy", "--metrics=background_psnr", "--output", sets / "out")
    assert run(capsys, *words)[0] == 0
    right = psnr(noisy(video(0), 0.01)[..., 16:], video(0)[..., 16:])
    assert rows(sets / "out")[-1]["value"] == pytest.approx(float(right), abs=1e-6)


def test_the_run_beside_a_clip_is_shown(capsys, sets):
    call = {"steps": 3, "layers": 2, "sparse": 2, "dense": {"first 20% of the steps": 4},
            "mean": 0.25, "carrier": "gather", "calls": [[1, 0, 0.25], [2, 1, 0.25]]}  # fmt: skip
    made = {"config": {"model": "m/x"}, "density": {"transformer": call}}
    (sets / "a" / "report.json").write_text(json.dumps(made))
    words = (sets / "a", "--reference", sets / "reference", "--output", sets / "out")
    assert run(capsys, *words)[0] == 0
    page = (sets / "out" / "index.html").read_text()
    assert "Density of a" in page and "density 0.250" in page and "m/x" in page
    assert "first 20% of the steps" in page


def test_what_generate_wrote_is_understood(capsys, tmp_path):
    tiny.tiny_wan()[0].save_pretrained(tmp_path / "model")
    words = ["generate", f"--model={tmp_path / 'model'}", "--prompt=a cat", "--compare"]
    words += ["--height=64", "--width=96", "--num-frames=9", "--num-inference-steps=3"]
    words += ["pipeline.max_sequence_length=32", "processor.min_tokens=0", "processor.block=16"]
    assert main([*words, f"--output={tmp_path / 'made'}"]) == 0
    clips = (tmp_path / "made" / "000.paro.mp4", "--reference", tmp_path / "made/000.dense.mp4")
    assert run(capsys, *clips, "--output", tmp_path / "out")[0] == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Density of 000.paro" in page and "2 layers (down) x 3 steps (across)" in page


# ---- bad input: the others are still scored, the failure is counted ------------------------------

BAD = {
    "longer": lambda path: write_video(path, video(1, frames=6)),
    "larger": lambda path: write_video(path, video(1, size=(24, 36))),
    "one frame": lambda path: write_video(path, video(1, frames=1)),
    "empty": lambda path: path.write_bytes(b""),
    "corrupt": lambda path: path.write_bytes(b"\x93NUMPY and then nothing"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_clip_is_one_line_and_the_others_are_scored(capsys, sets, kind):
    path = sets / "a" / "1.npy"
    path.unlink()
    BAD[kind](path)
    words = (sets / "a", "--reference", sets / "reference", "--metrics=psnr,fvd_toy")
    code, text, err = run(capsys, *words, "--output", sets / "out")
    lines = [line for line in err.splitlines() if line.startswith("gen-accel eval: ")]
    assert code == 2 and len(lines) == 1 and "1.npy" in lines[0] and "Traceback" not in err
    assert "1 of 3 clips failed" in text
    assert {r["config"]["clip"] for r in rows(sets / "out") if r["kind"] == "eval clip"} == {
        "0", "2",
    }  # fmt: skip
    assert "1.npy" in (sets / "out" / "index.html").read_text()


def test_another_frame_rate_is_refused(capsys, tmp_path):
    for fps, name in ((8, "reference"), (16, "a")):
        write_video(tmp_path / name / "0.mp4", video(), fps=fps)
        write_video(tmp_path / name / "1.mp4", video(1), fps=8)
    words = (tmp_path / "a", "--reference", tmp_path / "reference", "--output", tmp_path / "out")
    code, text, err = run(capsys, *words)
    assert code == 2 and "16 frames per second" in err and "1 of 2 clips failed" in text


def test_a_video_of_one_frame_fails_where_time_is_needed(capsys, tmp_path):
    write_video(tmp_path / "a.png", video(frames=1))
    write_video(tmp_path / "r.png", video(1, frames=1))
    words = (tmp_path / "a.png", "--reference", tmp_path / "r.png", "--output", tmp_path / "out")
    code, _, err = run(capsys, *words, "--metrics=psnr,flicker")
    assert code == 2 and "flicker" in err and "at least two" in err
    assert [r["name"] for r in rows(tmp_path / "out") if r["kind"] == "eval"] == ["psnr"]
    assert run(capsys, *words, "--metrics=psnr")[0] == 0


def test_pictures_are_scored_without_what_compares_frames(capsys, tmp_path):
    for name, seed in (("a", 0), ("r", 1)):
        write_video(tmp_path / f"{name}.png", video(seed, frames=1))
    words = (tmp_path / "a.png", "--reference", tmp_path / "r.png", "--output", tmp_path / "out")
    for extra, found in (((), {"psnr", "ssim"}), (("--metrics=all",), {"psnr", "ssim", "defects"})):
        code, text, _ = run(capsys, *words, *extra)
        assert code == 0 and re.search(r"left out: .*flicker.*: compares frames", text)
        names = {row["name"] for row in rows(tmp_path / "out")}
        assert found <= names and not names & set(networks.OVER_TIME)
    message = run(capsys, tmp_path / "a.png", "--output", tmp_path / "out")[2]
    assert "nothing to compute (compares frames" in message


def test_what_compares_frames_is_known():
    one = {"video": video(frames=1), "reference": video(1, frames=1)}
    one["mask"] = torch.ones(1, 24, 32, dtype=torch.bool)
    for name, metric in METRICS.items():
        if set(metric.needs) <= one.keys():
            arguments = {need: one[need] for need in metric.needs}
            if name in networks.OVER_TIME:
                with pytest.raises(ValueError, match="at least two"):
                    metric.function(**arguments)
            elif name != "background_psnr":  # the mask leaves nothing of it
                metric.function(**arguments)


def test_values_that_are_not_finite_are_left_out_of_differences(capsys, sets, monkeypatch):
    def share(video, reference):
        return (video.double() - reference).abs().sum() / reference.double().sum()

    metric = dataclasses.replace(METRICS["relative_l1"], function=share, per_frame=None)
    monkeypatch.setitem(METRICS, "relative_l1", metric)
    write_video(sets / "reference" / "0.npy", torch.zeros_like(video(0)))
    words = (sets / "a", sets / "b", "--reference", sets / "reference", "--output", sets / "out")
    code, text, _ = run(capsys, *words, "--metrics=psnr,relative_l1")
    assert code == 0 and "relative_l1: not finite for 2 clip(s)" in text
    lines = [line for line in text.splitlines() if "b - a" in line]
    assert [line.rsplit("(")[1].split(", ")[1] for line in lines] == ["3 clips)", "2 clips)"]
    assert "inf" not in "".join(lines) and "not finite" in (sets / "out/index.html").read_text()


def test_clips_without_a_partner_are_counted(capsys, sets):
    (sets / "a" / "1.npy").rename(sets / "a" / "other.npy")
    words = (sets / "a", "--reference", sets / "reference", "--output", sets / "out")
    code, text, err = run(capsys, *words)
    assert code == 2 and "other.npy: no reference" in err and "1.npy: a has no clip" in err
    assert "2 of 4 clips failed" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metrics=psrn",), "did you mean psnr?"),
        (("--metrics=fvd",), "hf download flateon/FVD-I3D-torchscript"),
        (("--metrics=fvd_videomae",), "hf download MCG-NJU/videomae-base"),
        (("--metrics=clip_temp",), "hf download openai/clip-vit-large-patch14"),
        (("--metrics=clip_temp", "--clip=/nowhere"), "no such folder"),
        (("--metrics=fvd", "--i3d=/nowhere.pt"), "no such file"),
        (("--metrics=background_psnr",), "needs --mask"),
        (("--metrics=,",), "nothing to compute"),
        (("--refrence=x",), "did you mean --reference?"),
        (("--prompts=/nowhere",), "cannot be read"),
        (("--prompt=a", "--prompt=b"), "2 prompts for 3 clips"),
        (("--mask=/nowhere",), "no such file"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(capsys, sets, words, message):
    common = (sets / "a", "--reference", sets / "reference", "--output", sets / "out")
    code, out, err = run(capsys, *common, *words)
    assert code == 2 and message in err and err.count("\n") == 1 and not (sets / "out").exists()


def test_one_clip_has_no_distance_and_a_video_is_named_once(capsys, sets):
    common = ("--reference", sets / "reference" / "0.npy", "--output", sets / "out")
    assert "set of clips" in run(capsys, sets / "a" / "0.npy", *common, "--metrics=fvd_toy")[2]
    assert "given twice" in run(capsys, sets / "a", sets / "a", *common)[2]
    assert "no such file" in run(capsys, sets / "none", *common)[2]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a headless Chromium")
def test_a_browser_shows_the_page_without_a_network(capsys, sets):
    words = (sets / "a", "--reference", sets / "reference", "--output", sets / "out")
    assert run(capsys, *words, "--players", 1)[0] == 0
    picture = sets / "page.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={sets / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--window-size=1200,1600", "--virtual-time-budget=3000", f"--screenshot={picture}"]
    done = subprocess.run(
        [*command, f"file://{sets / 'out' / 'index.html'}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "Uncaught" not in done.stderr
    pixels = read_video(picture)[0].float()
    assert pixels.shape == (3, 1600, 1200)
    # The players stand below the table; their frames are as colourful as the clips.
    colour = pixels.amax(0) - pixels.amin(0)
    assert float((colour > 40).float().mean()) > 0.02
