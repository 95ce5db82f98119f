import json
import os

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from gen_accel import demo_trained
from gen_accel.cli.main import main
from gen_accel.demo import DemoSettings, run_demo
from gen_accel.demo_model import AXES, NARROW_IN, demo_pipeline
from gen_accel.demo_trained import PROMPTS, ZOOM
from gen_accel.eval.video import read_video
from gen_accel.eval.world.read import read
from gen_accel.order.axis import AXIS_ORDERS

FILES = {"dense.mp4", "index.html", "paro.mp4", "report.json", "side_by_side.mp4"}
TRAINED = {f"trained.{n}.{m}.mp4" for n in range(3) for m in ("dense", "paro", "sparseprocessor")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    words = ["demo", f"--output={folder}", "--height=128", "--width=160", "--num-frames=9"]
    assert main([*words, "--num-inference-steps=5"]) == 0
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_the_folder(folder):
    assert set(os.listdir(folder)) == FILES | TRAINED
    dense, paro = read_video(folder / "dense.mp4"), read_video(folder / "paro.mp4")
    assert dense.shape == paro.shape == (9, 3, 128, 160)
    assert dense.float().std() > 20, "there is something to see"
    assert dense.float().diff(dim=0).abs().mean() > 1, "and it moves"
    joined = read_video(folder / "side_by_side.mp4")
    assert joined.shape[0] == 9 and joined.shape[2] > 128 and joined.shape[3] >= 320


def test_the_numbers(report):
    dense, paro = report["rows"]
    assert dense["psnr"] is None and dense["density"] == 1
    assert paro["speedup"] == pytest.approx(dense["seconds"] / paro["seconds"])
    assert 0.2 < paro["density"] < 0.35
    assert paro["psnr"] > 25 and paro["ssim"] > 0.9
    # 5 steps, one of them dense, four layers, two branches
    assert report["calls"]["sparse"] == 4 * 4 * 2
    assert sum(report["calls"]["dense"].values()) == 1 * 4 * 2
    assert 0.5 < report["mass_kept"] < 1
    assert report["versions"]["torch"] and "5x16x20" in report["config"]["tokens"]


def test_the_trained_model(folder, report):
    found = report["trained"]
    paro, sparse = (np.mean(found["psnr"][name]) for name in ("PARO", "SparseProcessor"))
    assert 10 < paro < sparse < 45  # the stand-ins of dropped blocks are worth something
    assert all(0.2 < kept < 0.4 for kept in found["density"].values())
    assert list(report["clips"]) == list(PROMPTS) and f"PARO {paro:.1f} dB" in report["notes"][-1]
    for number, (colour, shape) in enumerate(
        [("red", "circle"), ("blue", "square"), ("green", "triangle")]
    ):
        video = read_video(folder / f"trained.{number}.dense.mp4") / 255
        seen = read(avg_pool2d(video, ZOOM).movedim(1, -1).numpy())
        assert (seen.colour, seen.shape) == (colour, shape)


def test_without_a_trained_model_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_trained, "trained_toys", lambda: [])
    run_demo(tmp_path, DemoSettings(num_inference_steps=2, height=32, width=32, num_frames=3))
    assert set(os.listdir(tmp_path)) == FILES
    assert "clips of a small trained model here" in (tmp_path / "index.html").read_text()


def test_paro_finds_the_planted_axes(report):
    """The axis a head is wide in has to run fastest, so that a block holds its neighbours."""
    orders = sum((report["orders"][str(layer)] for layer in range(4)), [])
    for name, narrow in zip(orders, NARROW_IN * 2, strict=True):
        (wide,) = {axis[0].upper() for axis in AXES if axis not in narrow}
        assert name in AXIS_ORDERS and name[-1] == {"T": "F"}.get(wide, wide), (name, narrow)


def test_the_page(folder, report):
    page = (folder / "index.html").read_text()
    assert 'src="dense.mp4"' in page and 'src="paro.mp4"' in page
    assert page.count("data:image/png;base64,") == 3
    assert "built, not trained" in page and "ParoProcessor(density=0.25)" in page
    assert f"{report['rows'][1]['psnr']:.1f} dB" in page


@pytest.mark.parametrize("layer", range(4))
def test_the_heads_are_what_the_model_says(layer):
    transformer = demo_pipeline().transformer
    frames, height, width = grid = (7, 15, 16)
    rotary = transformer.rope(torch.zeros(1, 8, frames, 2 * height, 2 * width))
    attn = transformer.blocks[layer].attn1
    hidden = torch.randn(1, 7 * 15 * 16, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q, k = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden))
    q, k = (_rotate(x.unflatten(2, (2, -1)), *rotary) for x in (q, k))
    centre = (3 * height + 7) * width + 8
    for head in range(2):
        narrow = NARROW_IN[layer % 2 * 2 + head]
        weights = (q[0, centre, head] @ k[0, :, head].T / 8).softmax(-1).view(grid)
        for axis, name in enumerate(AXES):
            share = weights.sum([a for a in range(3) if a != axis])
            tokens = float(1 / share.square().sum())  # effective number of them
            assert (tokens < 0.6 * grid[axis]) == (name in narrow), (head, name, tokens)


def _rotate(x, cos, sin):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.complex(cos[..., 0::2], sin[..., 1::2])
    return torch.view_as_real(turned).flatten(-2)


def test_the_same_seed_gives_the_same_weights():
    first, second, other = (demo_pipeline(seed).transformer.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_bad_settings_are_refused_before_anything_is_rendered(tmp_path):
    with pytest.raises(ValueError, match=r"density=2.*\(0, 1\]"):
        run_demo(tmp_path, DemoSettings(density=2))
    assert os.listdir(tmp_path) == []
