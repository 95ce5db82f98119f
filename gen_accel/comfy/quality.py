"""Nodes that look at pictures: how near to the dense ones, and whether any is broken."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from gen_accel.comfy.widgets import QUALITY

_REPORT, _STOP = "report", "stop the run"


class Fidelity(io.ComfyNode):
    """Distance of two clips."""

    @classmethod
    def define_schema(cls) -> Any:  # noqa: D102
        return io.Schema(
            node_id="GenAccelFidelity",
            display_name="Fidelity",
            category=QUALITY,
            description="PSNR, SSIM and flicker of frames against those they should equal, such as "
            "the same seed with dense attention.",
            inputs=[
                _frames("images", "Frames to judge."),
                _frames("reference", "What they should look like: as many, of the same size."),
            ],
            outputs=[
                io.Float.Output(
                    "psnr", display_name="psnr", tooltip="Mean over frames in dB; 100 is the same."
                ),
                io.Float.Output(
                    "ssim", display_name="ssim", tooltip="Mean over frames; 1 is the same."
                ),
                io.Float.Output(
                    "flicker",
                    display_name="flicker",
                    tooltip="VBench's temporal flickering minus the reference's; below 0 these "
                    "frames flicker more. 0 for one frame.",
                ),
                io.String.Output("report", display_name="report", tooltip="All of it as text."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: Any, reference: Any) -> Any:  # noqa: D102
        from gen_accel.eval.fidelity import psnr, ssim
        from gen_accel.eval.temporal import flicker

        video, wanted = _video(images), _video(reference)
        near, alike = float(psnr(video, wanted)), float(ssim(video, wanted))
        steady = float(flicker(video) - flicker(wanted)) if len(video) > 1 else 0.0
        text = f"PSNR {near:.2f} dB, SSIM {alike:.4f}, flicker {steady:+.5f}, {len(video)} frames"
        return io.NodeOutput(near, alike, steady, text, ui=ui.PreviewText(text))


class Guard(io.ComfyNode):
    """Broken frames."""

    @classmethod
    def define_schema(cls) -> Any:  # noqa: D102
        return io.Schema(
            node_id="GenAccelGuard",
            display_name="Broken Frame Guard",
            category=QUALITY,
            description="Finds frames that are not finite, black, frozen or flickering, and stops "
            "the run if asked to.",
            inputs=[
                _frames("images", "Frames to look at."),
                io.Combo.Input(
                    "on_broken",
                    options=[_REPORT, _STOP],
                    default=_REPORT,
                    tooltip="Stopping keeps broken frames from being saved.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "frames",
                    display_name="images",
                    tooltip="The frames, unchanged.",
                ),
                io.Int.Output("broken", display_name="broken", tooltip="Number of findings."),
                io.String.Output(
                    "report", display_name="report", tooltip="What was found, by frame."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: Any, on_broken: str) -> Any:  # noqa: D102
        from gen_accel.eval.guard import check

        frames = _images(images)
        found = [str(finding) for finding in check(_video(frames))]
        if found and on_broken == _STOP:
            raise ValueError(f"images: {'; '.join(found)}")
        text = "\n".join(found) or f"{len(frames)} frames, none broken"
        return io.NodeOutput(frames, len(found), text, ui=ui.PreviewText(text))


def _frames(name: str, tooltip: str) -> Any:
    return io.MultiType.Input(name, types=[io.Image, io.Video], tooltip=tooltip)


def _images(given: Any) -> Tensor:
    """IMAGE or VIDEO as ``[frames, height, width, channels]``."""
    return given if isinstance(given, Tensor) else given.get_components().images


def _video(given: Any) -> Tensor:
    """The same as ``[frames, 3, height, width]``, transparency left out."""
    return _images(given)[..., :3].movedim(-1, 1)


NODES = [Fidelity, Guard]
