import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from gen_accel.eval import features
from gen_accel.eval.encoder import VideoEncoder
from gen_accel.eval.fvd import FewClipsWarning, Moments, frechet_distance
from gen_accel.eval.metrics import METRICS


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clips(n=3, frames=12, size=(40, 56), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, frames, 3, *size), generator=generator, dtype=torch.uint8)


# ---- the distance --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 64])  # fewer clips than features, and more
def test_a_shift_costs_its_square_and_nothing_costs_nothing(n):
    x = draw(n, 40)
    c = torch.arange(40, dtype=torch.float64) / 10
    assert float(c @ c) == pytest.approx(205.4)
    assert float(frechet_distance(x, x + c)) == pytest.approx(205.4, abs=1e-9)
    assert float(frechet_distance(x, x)) == pytest.approx(0, abs=1e-10)
    # x and 2x: (2 - 1)^2 of the covariance, and the mean moves by itself
    doubled = torch.cov(x.T).trace() + x.mean(0).square().sum()
    assert float(frechet_distance(x, 2 * x)) == pytest.approx(float(doubled), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 12), (300, 200, 30)])
def test_agrees_with_scipys_matrix_root(n, m, d):
    mix = draw(d, d, 5)
    a, b = draw(n, d, 1) @ mix, draw(m, d, 2) @ mix.T + 0.3
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = float((a.mean(0) - b.mean(0)).square().sum())
    expected += np.trace(covariances[0] + covariances[1] - 2 * root)
    assert float(frechet_distance(a, b)) == pytest.approx(expected, rel=1e-6)
    assert float(frechet_distance(b, a)) == pytest.approx(expected, rel=1e-6)


def test_few_clips_of_one_distribution_lie_apart():
    """The bias that the warning is about. The values are scipy's, for a standard normal."""
    for n, expected in ((8, 778), (64, 541), (256, 300)):
        found = float(frechet_distance(draw(n, 400, 1), draw(n, 400, 2)))
        assert found == pytest.approx(expected, rel=0.05)


def test_moments_stream_and_merge():
    x = draw(101, 9) * torch.logspace(-6, 3, 9, dtype=torch.float64) + 1e3
    streamed = Moments()
    for part in x.split([1, 2, 40, 58]):
        streamed.update(part)
    merged = Moments().update(x[:50]).merge(Moments().update(x[50:])).merge(Moments())
    for moments in (streamed, merged):
        assert moments.count == 101 and len(moments.factor()) <= 9
        assert torch.allclose(moments.mean, x.mean(0), rtol=1e-12)
        # The columns span nine orders of magnitude: each has to be right on its own scale.
        scale = x.std(0)[:, None] * x.std(0)
        error = (moments.covariance() - torch.cov(x.T)).abs() / scale
        assert float(error.max()) < 1e-6
        assert float(frechet_distance(moments, x)) == pytest.approx(0, abs=1e-6)


def test_bad_features_are_refused():
    x = draw(8, 4)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match="4 and 3 features"):
        frechet_distance(x, x[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(x, x * math.nan)
    with pytest.raises(ValueError, match="3 features after 4"):
        Moments().update(x).update(x[:, :3])


# ---- the registry's form -------------------------------------------------------------------------


def means(video):
    """A network without weights: mean colour of the first and the last frame."""
    return torch.cat([video[:, 0].mean((2, 3)), video[:, -1].mean((2, 3))], -1)


def network(**changes):
    values = {"name": "means", "function": means, "sha256": "0", "preprocessing": "-", "frames": 2}
    return features.FeatureNetwork(**{**values, **changes})


def test_fvd_is_a_metric_of_the_registry_and_warns_of_few_clips():
    a, b = clips(5), clips(5, seed=1)
    metric = METRICS["fvd"]
    assert metric.needs == ("video", "reference", "network") and metric.better == "lower"
    with pytest.warns(FewClipsWarning, match="FVD from 5 clips"):
        whole = metric(a, b, network())
    running = metric.accumulator(network=network())
    for one, other in zip(a, b):
        running.update(one, other)
    with pytest.warns(FewClipsWarning):
        assert running.compute() == pytest.approx(whole)
    right = frechet_distance(means(a.float() / 255), means(b.float() / 255))
    assert whole == pytest.approx(float(right), rel=1e-4)
    with pytest.raises(ValueError, match="differ"):
        metric(a, b[:, :11], network())
    with pytest.raises(ValueError, match="at least 2"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric(a[:1], b[:1], network())


def test_uint8_and_float_clips_agree():
    video = clips(2)
    assert torch.allclose(network()(video), network()(video.float() / 255), atol=1e-6)
    grey = network()(video[:, :, :1])
    assert torch.equal(grey[:, 0], grey[:, 1])


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 3, 8, 8), "1 frames: means needs at least 2"),
        (torch.zeros(4, 2, 8, 8), "1 or 3 channels"),
        (torch.full((4, 3, 8, 8), 2.0), "divide by 255"),
        (torch.full((4, 3, 8, 8), math.nan), "divide by 255"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.int64), "dtype torch.int64"),
    ],
)
def test_bad_clips_are_refused(video, message):
    with pytest.raises(ValueError, match=message):
        network()(video)


def test_features_are_cached_by_content_weights_and_preprocessing(tmp_path):
    calls = []

    def counting(video):
        calls.append(len(video))
        return means(video)

    def again(**changes):
        cache = features.Cache(tmp_path)
        return network(function=counting, cache=cache, **changes)

    video = clips(2)
    first = again()(video)
    assert len(calls) == 2
    assert torch.equal(again()(video.clone()), first) and len(calls) == 2
    again()(video.flip(0)[0])
    assert len(calls) == 2  # content, not position
    for changes in ({"sha256": "1"}, {"preprocessing": "other"}):
        calls.clear()
        again(**changes)(video)
        assert len(calls) == 2
    calls.clear()
    changed = video.clone()
    changed[0, 0, 0, 0, 0] ^= 1
    again()(changed)
    assert len(calls) == 1


# ---- the networks --------------------------------------------------------------------------------


class Stub(torch.nn.Module):
    """Takes what the I3D file takes; returns pooled pixels, so that the input can be checked."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool):
        if rescale or resize or not return_features:
            raise RuntimeError("wrong flags")
        return torch.cat([F.adaptive_avg_pool3d(x, (1, 2, 2)).flatten(1), x.amin((2, 3, 4))], 1)


def test_i3d_gets_the_frames_of_the_protocol(tmp_path):
    path = tmp_path / "i3d.pt"
    torch.jit.script(Stub()).save(str(path))
    found = features.i3d(path, sha256=features.file_sha256(path))
    assert found.sha256 == features.file_sha256(path)
    video = clips(1, size=(40, 57))[0]
    # By hand: 40 -> 224, 57 -> ceil(319.2) = 320, no antialiasing, crop 48..272, [-1, 1].
    frames = F.interpolate(video.float() / 255, (224, 320), mode="bilinear", align_corners=False)
    frames = (frames[..., 48:272] - 0.5) * 2
    expected = Stub()(frames.transpose(0, 1)[None], False, False, True)[0]
    assert torch.allclose(found(video), expected, atol=1e-5)
    with pytest.raises(ValueError, match="9 frames: i3d needs at least 10"):
        found(video[:9])


def test_golden_value_of_the_real_file():
    """Zeros against ones: 151.256 in the StyleGAN-V port (common_metrics_on_video_quality)."""
    try:
        found = features.i3d()
    except ValueError as error:
        pytest.skip(str(error))
    zeros = torch.zeros(8, 30, 3, 64, 64)
    with pytest.warns(FewClipsWarning):
        assert METRICS["fvd"](zeros, zeros + 1, found) == pytest.approx(151.256, abs=0.05)


def test_another_file_is_not_run(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the I3D of the FVD protocol"):
        features.i3d(path)


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for load, word in ((features.i3d, "hf download flateon"), (features.videomae, "hf download")):
        with pytest.raises(ValueError, match=word) as caught:
            load()
        assert "\n" not in str(caught.value)
    for load in (features.i3d, features.videomae, features.fvd_toy):
        with pytest.raises(ValueError, match="no such|no fvd-toy"):
            load(tmp_path / "none")


def test_videomae(tmp_path):
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    model = VideoMAEModel(config).eval()
    model.save_pretrained(tmp_path)
    found = features.videomae(tmp_path)
    video = clips(1, frames=10, size=(32, 32))[0]
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    pixels = (video[[0, 3, 6, 9]].float() / 255 - mean) / std
    with torch.no_grad():
        expected = model(pixels[None]).last_hidden_state[0].mean(0)
    assert torch.allclose(found(video), expected, atol=1e-5)
    assert len(found.sha256) == 64 and "4 frames" in found.preprocessing


def test_fvd_toy_answers_for_any_size_and_does_not_mix_a_batch():
    torch.manual_seed(0)
    encoder = VideoEncoder((8, 8, 8, 16)).eval()
    toy = network(function=encoder, name="fvd-toy")
    video = clips(3, frames=5)
    assert toy(video).shape == (3, 16)
    with torch.no_grad():
        together = encoder(video.float() / 255)
    assert torch.allclose(toy(video), together, atol=1e-5)


@pytest.fixture(scope="module")
def toy():
    from gen_accel.eval.encoder import FOLDER

    if not (FOLDER / "model.safetensors").is_file():
        pytest.skip("a clone has models/fvd-toy; the wheel does not")
    return features.fvd_toy()


def world(seeds):
    from gen_accel.eval.world.render import draw as render
    from gen_accel.eval.world.scene import sample_scene

    scenes = [sample_scene(seed, split="test") for seed in seeds]
    frames = np.stack([render(scene, np.arange(scene.frames)) for scene in scenes])
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float().clamp(0, 1)


def test_the_shipped_encoder_tells_attributes_apart(toy):
    """Held-out clips: nearest neighbours in its features share the background."""
    from gen_accel.eval.world.scene import sample_scene

    found = toy(world(range(120)))
    kinds = [sample_scene(seed, split="test").backdrop.kind for seed in range(120)]
    apart = torch.cdist(F.normalize(found), F.normalize(found)).fill_diagonal_(math.inf)
    nearest = apart.argmin(1).tolist()
    same = sum(kinds[i] == kinds[j] for i, j in enumerate(nearest)) / 120
    chance = sum(a == b for a in kinds for b in kinds) / 120**2
    assert same > 2 * chance, (same, chance)


def test_fvd_toy_grows_with_noise_and_with_shuffling(toy):
    video = world(range(48))
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.normal(size=video.shape)).float()
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(9), (48, 1)), axis=1))
    shuffled = torch.stack([clip[at] for clip, at in zip(video, order)])
    metric = METRICS["fvd_toy"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewClipsWarning)
        noisy = [metric((video + s * noise).clamp(0, 1), video, toy) for s in (0, 0.05, 0.15, 0.4)]
        mixed = [metric(torch.cat([shuffled[:n], video[n:]]), video, toy) for n in (0, 16, 48)]
    assert noisy[0] == pytest.approx(0, abs=1e-6) and noisy == sorted(noisy)
    assert mixed[0] == pytest.approx(0, abs=1e-6) and mixed == sorted(mixed) and mixed[1] > 1e-3
