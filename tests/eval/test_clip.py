import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from gen_accel.eval.clip import ClipEncoder, clip_drift, clip_score, clip_sim, clip_temp
from gen_accel.eval.features import Cache
from gen_accel.eval.metrics import METRICS
from helpers.clip import save_tiny_clip
from helpers.text import clip_tokenizer

PROMPT = "a red circle"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def encoder(folder):
    return ClipEncoder(folder, batch=2)


def video(frames=5, size=(32, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, *size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def by_hand(folder):
    """Embeddings of frames and text straight from the model's own parts."""
    model = CLIPModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed(frames, prompt=PROMPT):
        pixels = (frames.float() / 255 - MEAN) / STD
        seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        ids = torch.tensor([clip_tokenizer()(prompt)["input_ids"]])
        read = model.text_projection(model.text_model(input_ids=ids).pooler_output)
        unit = torch.nn.functional.normalize
        return unit(seen, dim=-1), unit(read, dim=-1)[0]

    return embed


def test_scores_against_the_models_own_parts(encoder, by_hand):
    a, b = video(), video(seed=1)
    (seen, read), (other, _) = by_hand(a), by_hand(b)
    sim = (seen @ read).mean()
    assert float(clip_sim(a, PROMPT, encoder)) == pytest.approx(float(sim), abs=1e-5)
    score = 100 * (seen @ read).clamp_min(0).mean()
    assert float(clip_score(a, PROMPT, encoder)) == pytest.approx(float(score), abs=1e-3)
    temp = (seen[1:] * seen[:-1]).sum(-1).mean()
    assert float(clip_temp(a, encoder)) == pytest.approx(float(temp), abs=1e-5)
    drift = (seen * other).sum(-1).mean()
    assert float(clip_drift(a, b, encoder)) == pytest.approx(float(drift), abs=1e-5)
    assert float(clip_drift(a, a, encoder)) == pytest.approx(1, abs=1e-6)
    assert float(clip_temp(a[:1].repeat(4, 1, 1, 1), encoder)) == pytest.approx(1, abs=1e-6)


def test_a_negative_cosine_scores_zero(encoder):
    """Of a frame and its text's opposite: CLIPSIM keeps the sign, CLIPScore does not."""

    class Opposite:
        images = encoder.images

        def texts(self, prompts):
            return -encoder.images(video())[:1]

    assert float(clip_score(video()[:1], PROMPT, Opposite())) == 0
    assert float(clip_sim(video()[:1], PROMPT, Opposite())) == pytest.approx(-1, abs=1e-5)


def test_frames_are_resized_as_pil_does(encoder, by_hand):
    """48x64 -> short side 32, bicubic with antialiasing -> centre crop."""
    frames = video(2, (48, 64))
    images = [Image.fromarray(f.permute(1, 2, 0).numpy()) for f in frames]
    images = [image.resize((42, 32), Image.Resampling.BICUBIC) for image in images]
    resized = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    seen, _ = by_hand(resized.permute(0, 3, 1, 2)[..., 5:37])
    assert torch.allclose(encoder.images(frames), seen, atol=1e-5)


def test_batches_and_floats_agree_with_single_clips(encoder):
    clips = torch.stack([video(), video(seed=1)])
    prompts = [PROMPT, "a dog " * 60]  # the second is longer than 77 tokens
    for name, arguments in (
        ("clip_score", (prompts,)), ("clip_sim", (prompts,)), ("clip_temp", ()),
        ("clip_drift", (clips.flip(0),)),
    ):  # fmt: skip
        metric = METRICS[name]
        running = metric.accumulator(network=encoder)
        for i, clip in enumerate(clips):
            value = running.update(clip, *(a[i] for a in arguments))
            frames = metric.per_frame(clip, *(a[i] for a in arguments), encoder)
            assert float(frames.mean()) == pytest.approx(float(value), abs=1e-6)
        together = metric.function(clips, *arguments, network=encoder)
        assert together.shape == (2,)
        assert torch.allclose(together, running.values)
        floats = metric.function(clips.float() / 255, *arguments, network=encoder)
        assert torch.allclose(together, floats, atol=1e-6)


def test_frames_are_embedded_once(folder, tmp_path):
    encoder = ClipEncoder(folder, cache=Cache(tmp_path))
    clip = video()
    clip_score(clip, PROMPT, encoder)
    again = ClipEncoder(folder, cache=Cache(tmp_path))
    again._images = None  # a call would raise
    assert float(clip_temp(clip, again)) == pytest.approx(float(clip_temp(clip, encoder)))


def test_bad_input_is_refused(encoder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="5 and 4 frames"):
        clip_drift(video(), video(4), encoder)
    with pytest.raises(ValueError, match="at least 2"):
        clip_temp(video(1), encoder)
    with pytest.raises(ValueError, match="one prompt for 2 clips"):
        clip_sim(torch.stack([video(), video()]), PROMPT, encoder)
    with pytest.raises(ValueError, match="shape"):
        clip_sim(video()[0], PROMPT, encoder)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for model, message in ((None, "hf download openai"), (tmp_path, "no config.json")):
        with pytest.raises(ValueError, match=message):
            ClipEncoder(model)
    with pytest.raises(ValueError, match="no such folder"):
        ClipEncoder("./nowhere")


def test_clip_score_against_torchmetrics(encoder):
    from torchmetrics.functional.multimodal import clip_score as oracle
    from transformers import CLIPProcessor

    model = encoder.model

    class Features(torch.nn.Module):
        """The interface of transformers 4, which torchmetrics expects."""

        device, config = model.device, model.config

        def get_image_features(self, pixels):
            return model.get_image_features(pixel_values=pixels).pooler_output

        def get_text_features(self, ids, mask):
            return model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    processor = CLIPProcessor(encoder.processor, encoder.tokenizer)
    frames = video(4, (40, 48))
    # Frame by frame: torchmetrics clamps the mean, we clamp each frame.
    found = [oracle(f, PROMPT, lambda: (Features(), processor)).item() for f in frames]
    ours = METRICS["clip_score"].per_frame(frames, PROMPT, encoder)
    assert ours.tolist() == pytest.approx(found, rel=1e-4, abs=1e-4) and max(found) > 1
