import json

import pytest
import torch
import torch.nn.functional as F

from gen_accel.eval.dino import Dino
from gen_accel.eval.metrics import METRICS, load_network
from gen_accel.eval.removal import tok_sim
from gen_accel.eval.temporal import subject_consistency
from helpers.clips import drift


@pytest.fixture(scope="module")
def dino3(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DINOv3ViTModel"):
        pytest.skip("this transformers has no DINOv3")
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=64, patch_size=16, num_register_tokens=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dinov3")
    transformers.DINOv3ViTModel(config).save_pretrained(folder)
    described = {
        "size": {"height": 64, "width": 64},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def dino1(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=48, patch_size=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dino")
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def test_tokens_without_class_and_registers(dino3):
    from transformers import AutoModel

    frames = drift(frames=3, size=50)[:2] / 255
    network = Dino(dino3)
    square = F.interpolate(frames, (64, 64), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    with torch.no_grad():
        states = AutoModel.from_pretrained(dino3)((square - mean) / std).last_hidden_state
    assert torch.allclose(network.tokens(frames).reshape(2, 16, 32), states[:, 5:], atol=1e-5)
    assert torch.allclose(network(frames), states[:, 0], atol=1e-5)
    assert network.tokens(frames).shape == (2, 4, 4, 32)
    # Row by row: what changes on the right changes the tokens there most.
    changed = frames.clone()
    changed[..., 40:] = 0
    moved = (network.tokens(changed) - network.tokens(frames)).norm(dim=-1).mean((0, 1))
    assert int(moved.argmax()) == 3


def test_class_tokens_keep_the_aspect(dino1):
    """As VBench: short side resized without antialiasing, no crop, positions interpolated."""
    from transformers import AutoModel

    frames = drift(frames=2, size=60)[..., :40, :] / 255
    wide = F.interpolate(frames, (48, 72), mode="bilinear", align_corners=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normed = (wide - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    model = AutoModel.from_pretrained(dino1)
    with torch.no_grad():
        right = model(normed, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        square = F.interpolate(normed, (48, 48), mode="bilinear")
        squeezed = model(square).last_hidden_state[:, 0]
    assert torch.allclose(Dino(dino1)(frames), right, atol=1e-5)
    assert not torch.allclose(right, squeezed, atol=1e-2)


def test_networks_of_the_registry(dino1, dino3):
    video = drift(size=40)
    subject = load_network(METRICS["subject_consistency"], dino1)
    assert 0 < METRICS["subject_consistency"](video, subject) <= 1
    assert float(subject_consistency(video[:1].expand(3, -1, -1, -1), subject)) == pytest.approx(1)
    mask = torch.zeros(5, 40, 40, dtype=torch.bool)
    mask[:, 10:25, 10:25] = True
    tokens = load_network(METRICS["tok_sim"], dino3)
    removed = video.clone()
    removed[:, :, 10:25, 10:25] = 128
    assert float(tok_sim(video, video, mask, tokens)) == pytest.approx(0, abs=1e-3)
    assert abs(float(tok_sim(removed, video, mask, tokens))) > 1e-3


def test_missing_weights_say_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match="no config.json.*DINO"):
        load_network(METRICS["subject_consistency"], tmp_path)
    with pytest.raises(ValueError, match="hf download facebook/dinov3"):
        load_network(METRICS["tok_sim"])
    with pytest.raises(ValueError, match="psnr needs no network"):
        load_network(METRICS["psnr"])
