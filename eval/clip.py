"""CLIP between frames, words and the dense video: CLIPScore, CLIPSIM, CLIP-temp, drift."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen_accel.eval.features import Cache, content_key, folder_sha256, model_folder, unit_range
from gen_accel.eval.metric import Metric

DEFAULT = "openai/clip-vit-large-patch14"


class ClipEncoder:
    """Unit vectors of frames and texts from transformers' CLIP classes; frames are cached.

    Frames become PIL images, are resized by the checkpoint's own processor (short side, bicubic,
    antialiased; centre crop; its mean and deviation) and go through the model in batches. Texts are
    cut at the model's length, 77 tokens.

    Args:
        model: A folder written by ``save_pretrained``, or a Hub id whose files are in the cache.
        device: Where it runs.
        batch: Frames per forward.
        cache: Where embeddings of clips are kept.

    Raises:
        ValueError: There are no weights.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        device: torch.device | str = "cpu",
        *,
        batch: int = 32,
        cache: Cache | None = None,
    ) -> None:
        from transformers import AutoTokenizer, CLIPModel

        folder = model_folder(model or DEFAULT, "CLIP")
        loaded: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
        self.model = loaded.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.processor = _processor().from_pretrained(folder, local_files_only=True)
        self.name = str(model or DEFAULT)
        self.sha256 = folder_sha256(folder)
        self.device = device
        self.batch = batch
        self.cache = cache or Cache(entries=256)

    def images(self, frames: Tensor) -> Tensor:
        """Unit vectors ``[frames, dim]`` of ``[frames, channels, height, width]``."""
        key = content_key(f"clip {self.sha256}", frames)
        return self.cache.get(key, lambda: self._images(frames))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors ``[prompts, dim]``."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            found = self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
        return _unit(_tensor(found))

    @torch.inference_mode()
    def _images(self, frames: Tensor) -> Tensor:
        from PIL import Image

        pixels = (unit_range(frames.detach().cpu()) * 255).round().to(torch.uint8)
        pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        parts = []
        for first in range(0, len(pixels), self.batch):
            images = [Image.fromarray(frame) for frame in pixels[first : first + self.batch]]
            values = self.processor(images=images, return_tensors="pt")["pixel_values"]
            found = self.model.get_image_features(pixel_values=values.to(self.device))
            parts.append(_unit(_tensor(found)))
        return torch.cat(parts)


def clip_sim(video: Tensor, prompt: str | Sequence[str], network: ClipEncoder) -> Tensor:
    """CLIPSIM: cosine between frame and text, mean over frames, in [-1, 1].

    Args:
        video: ``[frames, channels, height, width]`` or with a batch in front; uint8, or float in
            [0, 1].
        prompt: Text of the clip; one per clip for a batch.
        network: The encoder.

    Returns:
        0-D, or ``[batch]``.

    Raises:
        ValueError: A wrong shape or wrong values, or not one prompt per clip.
    """
    return _per_clip(clip_sim_frames, video, network, prompt)


def clip_score(video: Tensor, prompt: str | Sequence[str], network: ClipEncoder) -> Tensor:
    """CLIPScore: ``100 max(cos(frame, text), 0)``, mean over frames; arguments of `clip_sim`.

    Hessel et al. 2021 scale by 2.5; this is torchmetrics' scale.
    """
    return _per_clip(clip_score_frames, video, network, prompt)


def clip_temp(video: Tensor, network: ClipEncoder) -> Tensor:
    """CLIP-temp: cosine between neighbouring frames, mean over pairs; arguments of `clip_sim`.

    Raises:
        ValueError: As for `clip_sim`, or the clip has one frame.
    """
    return _per_clip(clip_temp_frames, video, network)


def clip_drift(video: Tensor, reference: Tensor, network: ClipEncoder) -> Tensor:
    """Cosine between each frame and the reference's frame of that time, mean over frames.

    Args:
        video: As for `clip_sim`.
        reference: As many frames; the size may differ.
        network: The encoder.

    Raises:
        ValueError: As for `clip_sim`, or lengths differ.
    """
    return _per_clip(clip_drift_frames, video, network, reference)


def clip_sim_frames(video: Tensor, prompt: str, network: ClipEncoder) -> Tensor:
    """`clip_sim` of every frame, ``[frames]``."""
    return network.images(video).double() @ network.texts([prompt])[0].double()


def clip_score_frames(video: Tensor, prompt: str, network: ClipEncoder) -> Tensor:
    """`clip_score` of every frame, ``[frames]``."""
    return 100 * clip_sim_frames(video, prompt, network).clamp_min(0)


def clip_temp_frames(video: Tensor, network: ClipEncoder) -> Tensor:
    """`clip_temp` of every pair of neighbours, ``[frames - 1]``."""
    if len(video) < 2:
        raise ValueError("1 frame: CLIP-temp compares neighbours, so it needs at least 2")
    frames = network.images(video).double()
    return (frames[1:] * frames[:-1]).sum(-1)


def clip_drift_frames(video: Tensor, reference: Tensor, network: ClipEncoder) -> Tensor:
    """`clip_drift` of every frame, ``[frames]``."""
    if len(video) != len(reference):
        raise ValueError(f"{len(video)} and {len(reference)} frames; drift compares them in pairs")
    return (network.images(video).double() * network.images(reference).double()).sum(-1)


def _per_clip(measure: Any, video: Tensor, network: ClipEncoder, *others: Any) -> Tensor:
    if video.ndim == 4:
        return measure(video, *others, network).mean()
    if video.ndim != 5:
        raise ValueError(
            f"shape {tuple(video.shape)}: expected [frames, channels, height, width], or a batch "
            "of those"
        )
    for other in others:
        if isinstance(other, str) or len(other) != len(video):
            count = "one prompt" if isinstance(other, str) else f"{len(other)} prompts or clips"
            raise ValueError(f"{count} for {len(video)} clips; give one each")
    return torch.stack([measure(*clip, network).mean() for clip in zip(video, *others)])


def _unit(vectors: Tensor) -> Tensor:
    return (vectors / vectors.norm(dim=-1, keepdim=True)).float().cpu().clone()


def _tensor(found: Any) -> Tensor:
    """Transformers 5 returns an output object where 4 returned its tensor."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _processor() -> Any:
    """The image processor that needs no torchvision; transformers 5 gave it a name of its own."""
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def _metric(name: str, function: Any, per_frame: Any, unit: str, definition: str) -> Metric:
    return Metric(name, function, unit, "higher", definition, per_frame, network="clip")


METRICS = (
    _metric(
        "clip_score", clip_score, clip_score_frames, "",
        "CLIPScore, 100 max(cos(frame, text), 0), mean over frames",
    ),
    _metric(
        "clip_sim", clip_sim, clip_sim_frames, "",
        "CLIPSIM, cos(frame, text), mean over frames",
    ),
    _metric(
        "clip_temp", clip_temp, clip_temp_frames, "",
        "CLIP-temp, cos(frame, next frame), mean over pairs",
    ),
    _metric(
        "clip_drift", clip_drift, clip_drift_frames, "",
        "cos(frame, the reference's frame) in CLIP, mean over frames",
    ),
)  # fmt: skip
