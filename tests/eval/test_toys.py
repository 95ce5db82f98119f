import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gen_accel.eval.toys import (
    MODELS,
    TOYS,
    encode_text,
    load_toy,
    to_latents,
    toy_call,
    trained_toys,
    velocity,
)
from gen_accel.eval.world import gate
from gen_accel.eval.world.render import render
from gen_accel.eval.world.scene import sample_scene

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import toy_models  # noqa: E402
import train_toy  # noqa: E402

PROMPT = "a red circle with a shadow moving right"
NAMES = sorted(TOYS)
SHIPPED = trained_toys()


@pytest.fixture(scope="module", params=NAMES)
def built(request):
    pipe = toy_models.build(request.param)
    pipe.set_progress_bar_config(disable=True)
    # A fresh transformer answers zero; noise in the last layer makes mistakes visible.
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    return request.param, pipe


def frames(name, count=2):
    clips = [render(sample_scene(s)).video for s in range(count)]
    latents = to_latents(np.stack(clips))
    return latents[:, :, 4] if name == "flux" else latents


def test_vae_is_the_identity(built):
    name, pipe = built
    latents = frames(name)
    posterior = pipe.vae.encode(latents).latent_dist
    assert torch.allclose(posterior.sample(), latents, atol=2e-5)
    assert torch.allclose(pipe.vae.decode(latents, return_dict=False)[0], latents, atol=2e-5)


def test_a_word_is_a_token_and_the_template_takes_its_95(built):
    name, pipe = built
    tokenizer = pipe.tokenizer_2 if name == "flux" else pipe.tokenizer
    encoded = tokenizer(PROMPT, return_offsets_mapping=True)
    words = [PROMPT[a:z] for a, z in encoded["offset_mapping"]][:-1]
    assert words == PROMPT.split() and tokenizer.unk_token_id not in encoded["input_ids"]
    if name == "hunyuan-video":
        wrapped = toy_models.DEFAULT_PROMPT_TEMPLATE["template"].format(PROMPT)
        assert tokenizer(wrapped)["input_ids"][95:] == encoded["input_ids"]


def test_a_noun_knows_the_word_before_it_and_no_other(built):
    _, pipe = built
    prompts = ["a red circle", "red circle and a blue square", "a blue circle"]
    embeds = encode_text(pipe, prompts)["encoder_hidden_states"]
    alike = torch.nn.functional.cosine_similarity
    assert alike(embeds[0, 2], embeds[1, 1], dim=0) > 0.999
    assert alike(embeds[0, 2], embeds[2, 2], dim=0) < 0.9


def test_no_text_reaches_the_modulation(built):
    name, pipe = built
    text = encode_text(pipe, [PROMPT, ""])
    if name != "wan":
        assert (text["pooled_projections"] == 0).all()


def test_velocity_is_what_the_pipeline_integrates(built):
    name, pipe = built
    steps = 3
    call = {**toy_call(name), "num_inference_steps": steps, "output_type": "pt"}
    call.pop("negative_prompt")
    call["guidance_scale" if name == "wan" else "true_cfg_scale"] = 1.0
    noise = torch.randn(frames(name, 1).shape, generator=torch.Generator().manual_seed(0))
    start = pipe._pack_latents(noise, 1, 3, 32, 32) if name == "flux" else noise
    video = pipe(PROMPT, latents=start.clone(), **call)[0]

    text, sigmas = encode_text(pipe, [PROMPT]), pipe.scheduler.sigmas
    assert len(sigmas) == steps + 1
    latents = noise
    with torch.no_grad():
        for now, after in zip(sigmas[:-1], sigmas[1:]):
            latents = latents + (after - now) * velocity(pipe, latents, now.view(1), text)
    mine = (latents / 2 + 0.5).clamp(0, 1)
    mine = mine if name == "flux" else mine.transpose(1, 2)
    assert video.shape == mine.shape and torch.allclose(video, mine, atol=1e-4)


def test_word_maps_see_every_joint_layer_and_leave_no_trace(built):
    name, pipe = built
    module = sys.modules[type(pipe.transformer).__module__]
    stock = module.dispatch_attention_fn
    maps = gate.word_maps(pipe, clips=2, batch=2)
    layers = {"hunyuan-video": 6, "wan": 7, "flux": 5}[name]
    assert maps.table.shape == (2, 2, layers, 3, 2)
    assert 0.02 < maps.area < 0.2 and module.dispatch_attention_fn is stock
    assert len(gate.map_table(maps).splitlines()) == 2 + 4 * layers


def test_training_starts_resumes_and_exports(tmp_path):
    common = ["--model", "wan", "--image-steps", "1", "--batch", "1", "--image-batch", "2"]
    common += ["--sample-every", "0", "--save-every", "1", "--threads", "1", "--out", str(tmp_path)]
    train_toy.main([*common, "--steps", "1"])
    first = torch.load(tmp_path / "state.pt", weights_only=True)
    train_toy.main([*common, "--steps", "2"])
    second = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (first["step"], second["step"]) == (1, 2) and second["seen"] == 3
    key = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(first["ema"][key], second["ema"][key])
    loaded = load_toy("wan", tmp_path / "toy-wan")
    weight = loaded.transformer.state_dict()[key]
    assert torch.equal(weight, second["ema"][key].bfloat16().float())
    tokenizer = json.loads((tmp_path / "toy-wan" / "tokenizer" / "tokenizer.json").read_text())
    assert tokenizer["padding"] is None and tokenizer["truncation"] is None


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 4, 32, 32)], ids=["frames", "clips"])
def test_focus_follows_the_colour_the_model_sees(shape):
    clean = torch.zeros(shape)
    clean[0, 0, ..., 8:12, 20:24] = 1.0  # red
    level = torch.full((2, *[1] * (len(shape) - 1)), 0.7)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noised = clean + level * (noise - clean)
    guess = (noise - clean).requires_grad_(True)
    weight = train_toy.focus(noised, guess, level, 10.0)
    assert weight.shape == (shape[0], 1, *shape[2:]) and not weight.requires_grad
    assert float(weight.mean()) == pytest.approx(1.0, abs=1e-5)
    near = torch.zeros(shape[2:], dtype=torch.bool)
    near[..., 6:14, 18:26] = True  # two pixels around
    ground = float(weight[1].mean())
    assert torch.allclose(weight[0, 0][near] / ground, torch.tensor(6.0), atol=1e-4)
    assert torch.allclose(weight[0, 0][~near] / ground, torch.tensor(1.0), atol=1e-4)
    assert torch.equal(train_toy.focus(noised, guess, level, 0.0), torch.ones_like(weight))


def test_gate_arithmetic():
    assert gate.wilson(9, 10) == pytest.approx((59.6, 98.2), abs=0.1)
    assert gate.wilson(0, 0) == (0.0, 100.0)
    low, high = gate.bootstrap([1.0] * 9 + [2.0])
    assert low < 1.1 < high
    mask = np.zeros((1, 8, 8), bool)
    mask[0, :4, :2] = mask[0, 4:, 4:7] = True
    assert gate.token_mask(mask, 4).tolist() == [True, False, False, True]
    good = gate.Result("same seed, two loads", 0.0, 0.0, 0.0, 2, 1e-5, "max|d|")
    bad = gate.Result("shape", 50.0, 30.0, 70.0, 20, 80.0, "%")
    assert good.passed and not bad.passed
    lines = gate.table([good, bad]).splitlines()
    assert "pass" in lines[1] and "FAIL" in lines[2]


def test_attributes_of_true_clips_pass_and_of_noise_fail(monkeypatch):
    class HunyuanVideoPipeline:
        pass

    def truth(pipe, prompts, seeds, **call):
        scenes = gate.held_out_scenes(len(prompts))
        assert [s.seed for s in scenes] == seeds
        return np.stack([render(s).video for s in scenes])

    def noise(pipe, prompts, seeds, **call):
        return np.random.default_rng(0).random((len(prompts), 9, 32, 32, 3)).astype(np.float32)

    monkeypatch.setattr(gate, "generate", truth)
    assert all(r.passed for r in gate.attribute_gate(HunyuanVideoPipeline(), 40))
    monkeypatch.setattr(gate, "generate", noise)
    barred = [r for r in gate.attribute_gate(HunyuanVideoPipeline(), 15) if r.bar is not None]
    assert {r.name for r in barred} == {"colour", "shape", "empty", "effect", "motion"}
    assert not any(r.passed for r in barred)


def test_unknown_and_missing_models_say_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="flux, hunyuan-video|hunyuan-video, wan, flux"):
        load_toy("sora")
    with pytest.raises(FileNotFoundError, match="folder="):
        load_toy("wan", tmp_path)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_are_small_and_repeatable(name):
    from safetensors import safe_open

    folder = MODELS / f"toy-{name}"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 8 * 2**20
    index = json.loads((folder / "model_index.json").read_text())
    assert {v[0] for k, v in index.items() if isinstance(v, list) and v[0]} <= {
        "diffusers",
        "transformers",
    }
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, "pt") as file:
        assert all(file.get_tensor(k).dtype == torch.bfloat16 for k in file.keys())  # noqa: SIM118
    result = gate.repeat_gate(lambda: load_toy(name), num_inference_steps=2)
    assert result.passed, result
