"""SAM2 through transformers: a mask from a point, in a picture or through a video. Optional.

Written after the documented interfaces of transformers 5; no checkpoint was at hand to run it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Segmenter(Protocol):
    """What `RefAMPipeline` takes as ``sam=``."""

    def masks(self, image: Tensor, points: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Candidate masks of one object.

        Args:
            image: ``[3, height, width]`` in [0, 1].
            points: (row, column) of points on it.

        Returns:
            bool ``[masks, height, width]`` and the segmenter's own quality of each, ``[masks]``.
        """
        ...

    def track(self, video: Tensor, frame: int, mask: Tensor) -> Tensor:
        """Carry a mask of one frame through a clip, both ways.

        Args:
            video: ``[frames, 3, height, width]`` in [0, 1].
            frame: Where the mask is.
            mask: bool ``[height, width]``.

        Returns:
            bool ``[frames, height, width]``.
        """
        ...


class Sam2:
    """`Segmenter` of transformers' SAM2.

    Args:
        checkpoint: Hub id or folder, e.g. ``facebook/sam2.1-hiera-small``.
        device: Where it runs.

    Raises:
        ImportError: transformers is too old, or torchvision is missing.
    """

    def __init__(self, checkpoint: str, device: str | torch.device = "cpu") -> None:
        try:
            from transformers import (
                Sam2Model,
                Sam2Processor,
                Sam2VideoModel,
                Sam2VideoProcessor,
            )

            self._processor: Any = Sam2Processor.from_pretrained(checkpoint)
        except ImportError as error:
            raise ImportError(
                "SAM2 needs transformers>=4.56 and torchvision: pip install 'gen-accel[sam]'"
            ) from error
        self.device = torch.device(device)
        self._checkpoint = checkpoint
        self._video_classes: tuple[Any, Any] = Sam2VideoModel, Sam2VideoProcessor
        model: Any = Sam2Model.from_pretrained(checkpoint)
        self._model = model.to(self.device).eval()
        self._video: tuple[Any, Any] | None = None

    @torch.no_grad()
    def masks(self, image: Tensor, points: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:  # noqa: D102
        inputs = self._processor(
            images=_picture(image),
            input_points=[[[[float(column), float(row)] for row, column in points]]],
            input_labels=[[[1] * len(points)]],
            return_tensors="pt",
        ).to(self.device)
        out = self._model(**inputs, multimask_output=True)
        masks = self._processor.post_process_masks(
            out.pred_masks.cpu(), inputs["original_sizes"].cpu()
        )
        return masks[0][0].bool(), out.iou_scores[0, 0].float().cpu()

    @torch.no_grad()
    def track(self, video: Tensor, frame: int, mask: Tensor) -> Tensor:  # noqa: D102
        if self._video is None:
            model, processor = self._video_classes
            self._video = (
                model.from_pretrained(self._checkpoint).to(self.device).eval(),
                processor.from_pretrained(self._checkpoint),
            )
        model, processor = self._video
        out = mask.new_zeros(len(video), *mask.shape)
        out[frame] = mask
        # A session remembers what it propagated, so each way gets its own.
        for reverse in (False, True):
            session = processor.init_video_session(
                video=[_picture(f) for f in video], inference_device=self.device
            )
            processor.add_inputs_to_inference_session(
                session, frame_idx=frame, obj_ids=1, input_masks=[mask.cpu().numpy()]
            )
            model(inference_session=session, frame_idx=frame)
            for step in model.propagate_in_video_iterator(
                session, start_frame_idx=frame, reverse=reverse
            ):
                if step.frame_idx != frame:
                    found = processor.post_process_masks(
                        [step.pred_masks.cpu()], original_sizes=[list(mask.shape)]
                    )
                    out[step.frame_idx] = found[0][0, 0].bool()
        return out


def best_mask(masks: Tensor, quality: Tensor, heatmap: Tensor) -> Tensor:
    """The mask that holds most of the map and least around it, weighted by its quality.

    By quality alone a part of the object often wins over the whole.

    Args:
        masks: bool ``[masks, height, width]``.
        quality: ``[masks]``.
        heatmap: ``[height, width]``.
    """
    inside = masks.to(heatmap).flatten(1)
    flat = heatmap.flatten()
    within = inside @ flat / inside.sum(1).clamp(min=1)
    around = (1 - inside) @ flat / (1 - inside).sum(1).clamp(min=1)
    score = (within - around) * quality.to(heatmap)
    return masks[int(score.masked_fill(inside.sum(1) == 0, float("-inf")).argmax())]


def _picture(frame: Tensor) -> Any:
    from PIL import Image

    array = frame.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
