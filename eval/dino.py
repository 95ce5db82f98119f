"""DINO vision transformers, as the networks of subject consistency and TokSim."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.eval.features import model_folder

SUBJECT = "facebook/dino-vitb16"  # VBench's
TOKENS = "facebook/dinov3-vits16-pretrain-lvd1689m"  # TokSim's
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Dino:
    """A DINO encoder from transformers.

    For class tokens the short side of frames is resized and the positions interpolated, as VBench
    does (whose interpolation of positions, DINO's own, differs from transformers' in the last
    digits); for patch tokens frames are squeezed to a square, as TokSim's script does.

    Args:
        model: A folder written by ``save_pretrained``, or a Hub id whose files are in the cache.
        device: Where it runs.
        antialias: Of the resizing; VBench has none.

    Raises:
        ValueError: There are no weights, or they are no vision transformer with patches.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        device: torch.device | str = "cpu",
        *,
        antialias: bool = False,
    ) -> None:
        from transformers import AutoModel

        folder = model_folder(model or SUBJECT, "DINO")
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        config = self.model.config
        if not (hasattr(config, "patch_size") and hasattr(config, "hidden_size")):
            raise ValueError(f"{folder}: {config.model_type} has no patches; name a DINO model")
        # A class token, then registers where the model has some, then patches.
        self.skip = 1 + getattr(config, "num_register_tokens", 0)
        self.patch = config.patch_size
        described = _processor(Path(folder))
        self.size = described.get("size", config.image_size)
        self.device, self.antialias = device, antialias
        takes = inspect.signature(self.model.forward).parameters
        name = "interpolate_pos_encoding"  # where positions are not made for any size anyway
        self._options = {name: True} if name in takes else {}
        self._mean = torch.tensor(described.get("mean", _MEAN), device=device).view(3, 1, 1)
        self._std = torch.tensor(described.get("std", _STD), device=device).view(3, 1, 1)

    def __call__(self, frames: Tensor) -> Tensor:
        """Class tokens ``[n, features]`` of frames ``[n, 3, height, width]`` in [0, 1]."""
        short = min(frames.shape[-2:])
        height, width = (self.size * side // short for side in frames.shape[-2:])
        return self._states(frames, height, width)[:, 0]

    def tokens(self, frames: Tensor) -> Tensor:
        """Patch tokens ``[n, rows, columns, features]``, class token and registers left out."""
        side = self.size // self.patch
        states = self._states(frames, self.size, self.size)
        return states[:, self.skip :].unflatten(1, (side, side))

    @torch.inference_mode()
    def _states(self, frames: Tensor, height: int, width: int) -> Tensor:
        resized = F.interpolate(
            frames.float().to(self.device).expand(-1, 3, -1, -1),
            (height, width),
            mode="bilinear",
            align_corners=False,
            antialias=self.antialias,
        )
        normed = (resized - self._mean) / self._std
        return self.model(normed, **self._options).last_hidden_state.clone()


def _processor(folder: Path) -> dict:
    """Size, mean and deviation a checkpoint asks for."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    size = found.get("size")
    side = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    named = {"size": side, "mean": found.get("image_mean"), "std": found.get("image_std")}
    return {name: value for name, value in named.items() if value is not None}
