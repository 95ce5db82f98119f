"""Video feature networks: where they come from, what they are fed, and a cache of their answers."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.eval.clips import require_unit
from gen_accel.eval.files import atomic

# The Kinetics-400 I3D of StyleGAN-V's FVD. A TorchScript file is a program: only this one is run.
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
I3D_REPOSITORY, I3D_FILE = "flateon/FVD-I3D-torchscript", "i3d_torchscript.pt"
VIDEOMAE = "MCG-NJU/videomae-base"


class Cache:
    """Tensors by key, the latest in memory and, when a folder is given, all of them on disk.

    Args:
        folder: Where to keep them.
        entries: How many stay in memory.
    """

    def __init__(self, folder: str | Path | None = None, entries: int = 1024) -> None:
        self.folder = None if folder is None else Path(folder)
        self.entries = entries
        self._memory: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor of ``key``, computed when it is not there."""
        if key not in self._memory:
            self._memory[key] = self._from_disk(key, compute)
        self._memory.move_to_end(key)
        while len(self._memory) > self.entries:
            self._memory.popitem(last=False)
        return self._memory[key]

    def _from_disk(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        if self.folder is None:
            return compute()
        path = self.folder / key[:2] / f"{key}.npy"
        if path.is_file():
            return torch.from_numpy(np.load(path))
        value = compute()
        with atomic(path) as scratch:
            np.save(scratch, value.numpy())
        return value


@dataclass(eq=False)
class FeatureNetwork:
    """A network that turns clips into vectors, with all that its numbers depend on.

    Attributes:
        name: Short name, for reports.
        function: Clips ``[batch, frames, 3, height, width]`` in [0, 1] to ``[batch, features]``.
        sha256: Of the weights.
        preprocessing: What happens to the frames; features of different ones do not compare.
        frames: Least number of frames.
        device: Where it runs.
        cache: Answers by content of the frames, weights and preprocessing.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    sha256: str
    preprocessing: str
    frames: int
    device: torch.device | str = "cpu"
    cache: Cache = field(default_factory=Cache)

    def __call__(self, video: Tensor) -> Tensor:
        """Features of clips.

        Args:
            video: ``[frames, channels, height, width]`` or with a batch in front; uint8, or float
                in [0, 1].

        Returns:
            ``[features]`` or ``[batch, features]``, float32 on the CPU.

        Raises:
            ValueError: Too few frames, a wrong shape, or values outside [0, 1].
        """
        clips = video if video.ndim == 5 else video[None]
        if clips.ndim != 5 or clips.shape[2] not in (1, 3) or 0 in clips.shape:
            raise ValueError(
                f"shape {tuple(video.shape)}: expected [frames, channels, height, width] with 1 or "
                "3 channels, or a batch of those"
            )
        if clips.shape[1] < self.frames:
            raise ValueError(
                f"{clips.shape[1]} frames: {self.name} needs at least {self.frames}; use longer "
                "clips or another network"
            )
        identity = f"{self.name} {self.sha256} {self.preprocessing}"
        keys = [content_key(identity, clip) for clip in clips]
        found = torch.stack(
            [self.cache.get(key, partial(self._run, clip)) for key, clip in zip(keys, clips)]
        )
        return found if video.ndim == 5 else found[0]

    @torch.inference_mode()
    def _run(self, clip: Tensor) -> Tensor:
        clip = unit_range(clip).to(self.device).expand(-1, 3, -1, -1)
        return self.function(clip[None])[0].float().cpu().clone()


def i3d(
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    *,
    cache: Cache | None = None,
    sha256: str = I3D_SHA256,
) -> FeatureNetwork:
    """The Kinetics-400 I3D of StyleGAN-V's FVD: 400 logits before the softmax.

    Frames are resized so that the short side is 224 and the other one rounded up (bilinear, no
    antialiasing), cropped to the central 224x224, and mapped to [-1, 1].

    Args:
        path: The TorchScript file; None looks in the hub's cache. Nothing is downloaded.
        device: Where it runs.
        cache: Where answers are kept.
        sha256: What the file must hash to.

    Raises:
        ValueError: There is no file, or it is another one.
    """
    file = _i3d_file(path)
    found = file_sha256(file)
    if found != sha256:
        raise ValueError(
            f"{file}: SHA-256 {found[:12]}... is not the I3D of the FVD protocol "
            f"({sha256[:12]}...); download {I3D_FILE} from {I3D_REPOSITORY} again"
        )
    with warnings.catch_warnings():  # TorchScript is deprecated; the protocol's file is one
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(str(file), map_location=device).eval()

    def features(clips: Tensor) -> Tensor:
        batch, count = clips.shape[:2]
        frames = centre_crop(resize_short(clips.flatten(0, 1), 224), 224) * 2 - 1
        frames = frames.view(batch, count, *frames.shape[1:]).transpose(1, 2).contiguous()
        with torch.jit.fuser("none"):  # newer fusers fail on this file
            return module(frames, rescale=False, resize=False, return_features=True)

    how = "short side 224 bilinear, centre crop 224, [-1, 1]"
    return FeatureNetwork("i3d", features, found, how, 10, device, cache or Cache())


def videomae(
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    *,
    cache: Cache | None = None,
) -> FeatureNetwork:
    """VideoMAE: last hidden state, mean over the patches.

    The clip's frames are thinned evenly to as many as the model takes (16), resized so that the
    short side fits (bilinear, antialiased), cropped centrally, and normalised as ImageNet.

    Args:
        path: A folder written by ``save_pretrained``, or a Hub id whose files are in the cache.
        device: Where it runs.
        cache: Where answers are kept.

    Raises:
        ValueError: There are no weights.
    """
    from transformers import VideoMAEModel

    folder = model_folder(path or VIDEOMAE, "VideoMAE")
    loaded: Any = VideoMAEModel.from_pretrained(folder, local_files_only=True)
    model = loaded.to(device).eval()
    frames, side = model.config.num_frames, model.config.image_size
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def features(clips: Tensor) -> Tensor:
        kept = torch.linspace(0, clips.shape[1] - 1, frames, device=clips.device).round().long()
        clips = clips[:, kept]
        pixels = resize_short(clips.flatten(0, 1), side, antialias=True)
        pixels = (centre_crop(pixels, side) - mean) / std
        return model(pixels.view(len(clips), frames, 3, side, side)).last_hidden_state.mean(1)

    how = f"{frames} frames, short side {side} bilinear antialiased, centre crop, ImageNet"
    return FeatureNetwork(
        "videomae", features, folder_sha256(folder), how, frames, device, cache or Cache()
    )


def fvd_toy(
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    *,
    cache: Cache | None = None,
) -> FeatureNetwork:
    """Our own small encoder, see `gen_accel.eval.encoder`; ships with a clone.

    Args:
        folder: Where it is; the clone's ``models/fvd-toy`` when None.
        device: Where it runs.
        cache: Where answers are kept.

    Raises:
        ValueError: There is none.
    """
    from gen_accel.eval.encoder import FOLDER, SIZE, load_encoder

    folder = Path(folder or FOLDER)
    encoder = load_encoder(folder).to(device)
    how = f"{SIZE}x{SIZE} bilinear antialiased, [-1, 1]"
    return FeatureNetwork(
        "fvd-toy", encoder, folder_sha256(folder), how, 2, device, cache or Cache()
    )


# ---- frames --------------------------------------------------------------------------------------


def unit_range(video: Tensor) -> Tensor:
    """Float32 in [0, 1].

    Raises:
        ValueError: Another dtype, or values outside, NaN included.
    """
    require_unit(video)
    return video.float() / 255 if video.dtype == torch.uint8 else video.float().clamp(0, 1)


def resize_short(frames: Tensor, size: int, *, antialias: bool = False) -> Tensor:
    """``[n, 3, height, width]`` with its short side ``size``, the other one rounded up."""
    height, width = frames.shape[-2:]
    scale = size / min(height, width)
    # The short side is set, for its own product may round to size + 1.
    new = tuple(size if side == min(height, width) else math.ceil(side * scale)
                for side in (height, width))  # fmt: skip
    return F.interpolate(frames, new, mode="bilinear", align_corners=False, antialias=antialias)


def centre_crop(frames: Tensor, size: int) -> Tensor:
    """The central ``size`` x ``size`` pixels."""
    top, left = (frames.shape[-2] - size) // 2, (frames.shape[-1] - size) // 2
    return frames[..., top : top + size, left : left + size]


# ---- files ---------------------------------------------------------------------------------------


def content_key(identity: str, clip: Tensor) -> str:
    """Hash of what a network would see, whatever file it came from."""
    clip = clip.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{identity} {clip.dtype} {tuple(clip.shape)}".encode())
    digest.update(clip.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """SHA-256 of the weights in a model's folder, of their hashes when there are several files."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    hashes = [file_sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def model_folder(model: str | Path, what: str) -> Path:
    """Folder of a transformers model: a path, or a Hub id that was downloaded before.

    Raises:
        ValueError: It is neither; the message says how to get it.
    """
    from huggingface_hub import snapshot_download

    if Path(model).is_dir():
        if (Path(model) / "config.json").is_file():
            return Path(model)
        raise ValueError(f"{model}: no config.json there; give the folder of a {what} model")
    if str(model).count("/") == 1 and str(model)[0] not in "./~":
        try:
            return Path(snapshot_download(str(model), local_files_only=True))
        except Exception as error:  # the hub's own classes differ between its versions
            raise ValueError(
                f"{what} weights {model} are not in the hub's cache; run `hf download {model}`, or "
                "give a folder"
            ) from error
    raise ValueError(f"{model}: no such folder, and not a Hub id like {VIDEOMAE}")


def _i3d_file(path: str | Path | None) -> Path:
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; give {I3D_FILE} of {I3D_REPOSITORY}")
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(I3D_REPOSITORY, I3D_FILE)
    if not isinstance(found, str):
        raise ValueError(
            f"FVD needs {I3D_FILE}; run `hf download {I3D_REPOSITORY} {I3D_FILE}`, or give its path"
        )
    return Path(found)
