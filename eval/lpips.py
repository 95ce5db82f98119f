"""LPIPS (Zhang et al. 2018), version 0.1 on AlexNet, from weight files the user has."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.eval.clips import over_frames
from gen_accel.eval.metric import Metric

_ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
_LINEAR = "alex.pth of version 0.1, which the packages lpips and torchmetrics carry"
_WIDTHS = (64, 192, 384, 256, 256)
_SMALLEST = 31  # pixels; below, AlexNet's second pooling has nothing to pool


def lpips(
    video: Tensor,
    reference: Tensor,
    network: Callable[[Tensor, Tensor], Tensor],
    *,
    per_frame: bool = False,
) -> Tensor:
    """LPIPS per frame, mean over positions and frames; 0 for equal clips.

    Args:
        video: ``[frames, 3, height, width]`` or with a batch in front, at least 31x31 pixels;
            uint8, or float in [0, 1].
        reference: The same shape.
        network: `load_lpips`, or what else takes two batches of frames in [-1, 1] and returns one
            distance per frame.
        per_frame: Return the value of every frame.

    Returns:
        One value per clip: 0-D, or ``[batch]``; with ``per_frame`` ``[frames]`` behind that.

    Raises:
        ValueError: Shapes differ, values are outside [0, 1], or frames are too small.
    """

    def of_frame(frame: Tensor, wanted: Tensor) -> Tensor:
        return network(2 * frame[None].float() - 1, 2 * wanted[None].float() - 1).flatten()[0]

    values = over_frames(of_frame, video, reference)
    return values if per_frame else values.mean(-1)


class Lpips(nn.Module):
    """AlexNet's five activations, unit length per position, squared differences, learned weights.

    Its weights are set by `load_lpips`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d, e = _WIDTHS
        # Numbered as torchvision's AlexNet, whose weight file this loads.
        self.features = nn.Sequential(
            nn.Conv2d(3, a, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, 3, padding=1), nn.ReLU(),
            nn.Conv2d(c, d, 3, padding=1), nn.ReLU(),
            nn.Conv2d(d, e, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.linear = nn.ParameterList([torch.zeros(1, width, 1, 1) for width in _WIDTHS])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), False)

    @torch.inference_mode()
    def forward(self, frames: Tensor, others: Tensor) -> Tensor:
        """Distances ``[n]`` of frames ``[n, 3, height, width]`` in [-1, 1], in pairs."""
        if frames.ndim != 4 or frames.shape[1] != 3 or min(frames.shape[-2:]) < _SMALLEST:
            raise ValueError(
                f"frames {tuple(frames.shape)}: LPIPS takes [n, 3, height, width], at least "
                f"{_SMALLEST}x{_SMALLEST}; repeat grey channels, resize small frames"
            )
        distance = frames.new_zeros(len(frames))
        # AlexNet reads the same numbers, in a unit of its own.
        both = (torch.cat([frames, others]).to(self.shift.device) - self.shift) / self.scale
        weights = iter(self.linear)
        for layer in self.features:
            both = layer(both)
            if isinstance(layer, nn.ReLU):
                unit = both / (both.square().sum(1, keepdim=True) + 1e-8).sqrt()
                a, b = unit.chunk(2)
                near = F.conv2d((a - b).square(), next(weights)).mean((1, 2, 3))
                distance = distance + near.to(distance)
        return distance.clone()


def load_lpips(*paths: str | Path, device: torch.device | str = "cpu") -> Lpips:
    """LPIPS from weight files; nothing is downloaded.

    Args:
        paths: Files that together hold torchvision's AlexNet (``features.0.weight``, ...) and the
            linear layers of version 0.1 (``lin0.model.1.weight``, ...): ``.pth`` or
            ``.safetensors``. One file is enough where it is the state of ``lpips.LPIPS("alex")``.
        device: Where it runs.

    Raises:
        ValueError: There is no file, it cannot be read, or weights are missing; the message says
            where to get them.
    """
    if not paths:
        raise ValueError(f"LPIPS needs weight files: {_ALEXNET} and {_LINEAR}; give their paths")
    found: dict[str, Tensor] = {}
    for path in map(Path, paths):
        found |= {_rename(name): value for name, value in _read(path).items()}
    module = Lpips()
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        kind = _ALEXNET if missing[0].startswith("features") else _LINEAR
        names = ", ".join(map(str, paths))
        raise ValueError(f"{names}: no weights for {missing[0]}; give {kind} as well")
    wrong = [name for name in wanted if found[name].shape != wanted[name].shape]
    if wrong:
        shape = tuple(found[wrong[0]].shape)
        raise ValueError(f"{wrong[0]} of shape {shape}: not AlexNet's; LPIPS here is version alex")
    module.load_state_dict({name: found[name].float() for name in wanted})
    return module.eval().requires_grad_(False).to(device)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; LPIPS needs {_ALEXNET} and {_LINEAR}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers raise whatever they like
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a file of weights ({reason[0]})") from error


def _rename(name: str) -> str:
    """Names of the lpips package to ours; torchvision's are ours."""
    name = re.sub(r"^net\.slice\d\.", "features.", name)
    return re.sub(r"^lins?\.?(\d)\.model\.\d\.weight$", r"linear.\1", name)


METRICS = (
    Metric(
        "lpips", lpips, "", "lower", "LPIPS 0.1 on AlexNet, mean over positions and frames",
        network="lpips",
    ),
)  # fmt: skip
