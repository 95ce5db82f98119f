import sys
import types

import pytest
import torch
from torch import nn

from gen_accel.eval.lpips import Lpips, load_lpips, lpips
from gen_accel.eval.metrics import METRICS, load_network
from helpers.clips import drift


def random_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in Lpips().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        state[name] = noise.abs() if name.startswith("linear") else 0.1 * noise
    return state


@pytest.fixture
def files(tmp_path):
    """What a user has: torchvision's AlexNet, with its classifier, and the linear layers."""
    state = random_weights()
    alexnet = {k: v for k, v in state.items() if k.startswith("features")}
    alexnet["classifier.1.weight"] = torch.zeros(2, 2)
    linear = {f"lin{k[-1]}.model.1.weight": v for k, v in state.items() if k.startswith("linear")}
    torch.save(alexnet, tmp_path / "alexnet.pth")
    torch.save(linear, tmp_path / "alex.pth")
    return tmp_path / "alexnet.pth", tmp_path / "alex.pth"


@pytest.fixture
def oracle(monkeypatch):
    """torchmetrics' LPIPS; of torchvision it needs nothing but AlexNet's layers."""
    module = pytest.importorskip("torchmetrics.functional.image.lpips")

    def alexnet(weights=None):
        layers = [
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2), nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        ]  # fmt: skip
        return types.SimpleNamespace(features=nn.Sequential(*layers))

    torchvision = types.ModuleType("torchvision")
    torchvision.models = types.SimpleNamespace(alexnet=alexnet)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setattr(module, "_TORCHVISION_AVAILABLE", True)
    return module._LPIPS(pretrained=False, net="alex", pnet_rand=True).eval()


@pytest.mark.parametrize("size", [(31, 31), (64, 48), (65, 97)])
def test_agrees_with_torchmetrics(oracle, files, size):
    places = {"0": "slice1", "3": "slice2", "6": "slice3", "8": "slice4", "10": "slice5"}
    state = {}
    for name, value in random_weights().items():
        kind, number, *rest = name.split(".")
        if kind == "features":
            state[f"net.{places[number]}.{number}.{rest[0]}"] = value
        else:
            state[f"lin{number}.model.1.weight"] = state[f"lins.{number}.model.1.weight"] = value
    oracle.load_state_dict(state)
    generator = torch.Generator().manual_seed(1)
    video, reference = torch.rand(2, 3, 3, *size, generator=generator)
    wanted = oracle(2 * video - 1, 2 * reference - 1).flatten()
    ours = lpips(video, reference, load_lpips(*files), per_frame=True)
    assert ours.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    assert float(lpips(video, reference, load_lpips(*files))) == pytest.approx(
        float(wanted.mean()), rel=1e-4
    )
    assert float(wanted.min()) > 1e-3


def test_reads_the_state_of_the_lpips_package_from_one_file(files, tmp_path):
    from safetensors.torch import save_file

    slices = {"0": 1, "3": 2, "6": 3, "8": 4, "10": 5}
    state = {"scaling_layer.shift": torch.zeros(1)}
    for name, value in random_weights().items():
        kind, number, *rest = name.split(".")
        if kind == "features":
            state[f"net.slice{slices[number]}.{number}.{rest[0]}"] = value
        else:
            state[f"lin{number}.model.1.weight"] = value
    save_file(state, tmp_path / "lpips.safetensors")
    video = drift(size=40)
    one, two = load_lpips(tmp_path / "lpips.safetensors"), load_lpips(*files)
    assert float(lpips(video, video.flip(0), one)) == float(lpips(video, video.flip(0), two)) > 0


def test_the_linear_layers_that_torchmetrics_carries_load(files):
    module = pytest.importorskip("torchmetrics.functional.image.lpips")
    from pathlib import Path

    learned = Path(module.__file__).parent / "lpips_models" / "alex.pth"
    network = load_lpips(files[0], learned)
    assert all(bool((weight >= 0).all()) for weight in network.linear)  # as published
    assert float(lpips(drift(size=40), drift(size=40, seed=1), network)) > 0


def test_equal_clips_and_the_registry(files):
    video = drift(size=40)
    network = load_network(METRICS["lpips"], ",".join(map(str, files)))
    assert METRICS["lpips"](video, video, network) == 0
    running = METRICS["lpips"].accumulator(network=network)
    running.update(video / 255, video.flip(0))
    assert running.compute() == pytest.approx(METRICS["lpips"](video, video.flip(0), network))


def test_missing_weights_say_how_to_get_them(files, tmp_path):
    with pytest.raises(ValueError, match="LPIPS needs weight files: https.*give their paths"):
        load_lpips()
    with pytest.raises(ValueError, match="no weights for linear.0; give alex.pth"):
        load_lpips(files[0])
    with pytest.raises(ValueError, match="no weights for features.0.bias; give https"):
        load_lpips(files[1])
    with pytest.raises(ValueError, match="nowhere.pth: no such file"):
        load_lpips(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="text.pth: not a file of weights"):
        load_lpips(tmp_path / "text.pth")
    state = {**torch.load(files[0]), "features.0.weight": torch.zeros(64, 3, 3, 3)}
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="not AlexNet's"):
        load_lpips(tmp_path / "vgg.pth", files[1])


def test_frames_that_are_too_small(files):
    with pytest.raises(ValueError, match="31x31.*resize"):
        lpips(drift(size=24), drift(size=24), load_lpips(*files))
