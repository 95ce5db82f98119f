"""gen-accel ground: point at what an expression means in a picture or a video."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli import options
from gen_accel.cli.options import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.pipelines.refam import RefAMOutput

# refam.sigma=0.25 sets an argument of RefAMPipeline's call.
SECTIONS = ("refam",)
_SHARED = ("model", "seed", "dtype", "device", "cpu_offload")
# What has an option, or no way to be written in one.
_OWN = ("self", "image", "video", "expression", "seed", "sam", "sink_rule")


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "ground",
        help="point at what an expression means, with a generator's attention",
        description=__doc__,
        epilog="refam.NAME=VALUE sets an argument of RefAMPipeline's call, say refam.sigma=0.25.",
    )
    options.add(parser, *_SHARED)
    more: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument("input", help="a picture, or a video: mp4, gif, npy, a folder of PNGs")
    parser.add_argument("expression", help='"the red circle left of the square"')
    parser.add_argument("--out", metavar="DIR", help="folder (outputs/ground)", **more)
    parser.add_argument(
        "--sam", metavar="MODEL", help="SAM2 for the mask: folder or Hub id", **more
    )
    parser.add_argument(
        "--fps", type=options.positive, help="frames per second (the input's, or 16)", **more
    )


def run(args: argparse.Namespace) -> int:
    """Answer one expression; write overlay, mask, words and numbers."""
    from gen_accel.cli import pipeline as shared
    from gen_accel.eval.files import check_writable, write_text
    from gen_accel.eval.load import read_clip
    from gen_accel.eval.video import to_uint8, write_video
    from gen_accel.pipelines.refam import RefAMPipeline

    folder = Path(getattr(args, "out", "outputs/ground"))
    check_writable(folder)
    settings = refam_settings(args)
    if not args.expression.strip():
        raise UsageError("an empty expression; name what to look for")
    clip = read_clip(args.input)
    frames = to_uint8(clip.frames)
    device = shared.device_of(args)
    sam = _segmenter(args, device)
    refam = RefAMPipeline.from_pipe(shared.load_pipeline(args, device))
    out = refam(
        video=frames, expression=args.expression, seed=getattr(args, "seed", 0), sam=sam, **settings
    )
    suffix = ".png" if len(frames) == 1 else ".mp4"
    fps = getattr(args, "fps", clip.fps or 16.0)
    pictures = {
        "overlay": overlay(frames, out),
        "mask": _even(out.mask[:, None].float()),
        "words": words(frames, out),
    }
    for name, video in pictures.items():
        path = folder / f"{name}{suffix}"
        write_video(path, video, fps=fps)
        print(f"wrote {path}")
    write_text(folder / "ground.json", json.dumps(facts(args, out), indent=2) + "\n")
    frame, row, column = out.point
    print(f"frame {frame}, row {row}, column {column}; score {out.score:.2f}")
    return 0


def refam_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of RefAMPipeline's call that the section ``refam`` gives, checked."""
    import inspect

    from gen_accel.cli.pipeline import check_settings
    from gen_accel.pipelines.refam import RefAMPipeline

    parameters = inspect.signature(RefAMPipeline.__call__).parameters
    # A caption may be made by a function, which has no place in a command.
    known = {n: str(p.annotation).replace("str | Any", "str | None")
             for n, p in parameters.items() if n not in _OWN}  # fmt: skip
    check_settings("refam", args.sections["refam"], known)
    return args.sections["refam"]


def overlay(frames: Tensor, out: RefAMOutput) -> Tensor:
    """Frames with the heatmap as heat, the mask's outline, and a cross at the point."""
    import torch
    from torch.nn.functional import max_pool2d

    heat, red = out.heatmap[:, None], torch.tensor([1.0, 0.2, 0.1])[:, None, None]
    mixed = _rgb(frames) * (1 - 0.6 * heat) + 0.6 * heat * red
    mask = out.mask[:, None].float()
    rim = (max_pool2d(mask, 3, 1, 1) - mask) > 0
    mixed = mixed.where(~rim, mixed.new_tensor(1.0))
    frame, row, column = out.point
    reach = max(1, min(mixed.shape[2:]) // 24)
    for r, c in [(row + i, column) for i in range(-reach, reach + 1)] + [
        (row, column + i) for i in range(-reach, reach + 1)
    ]:
        if 0 <= r < mixed.shape[2] and 0 <= c < mixed.shape[3]:
            mixed[frame, :, r, c] = 0
    return _even(mixed)


def words(frames: Tensor, out: RefAMOutput) -> Tensor:
    """The input, each word's own map, and the heatmap, side by side."""
    from gen_accel.eval.video import side_by_side

    panels = [_rgb(frames)]
    panels += [m[:, None].expand(-1, 3, -1, -1) for m in (*out.words.values(), out.heatmap)]
    return side_by_side(panels, labels=("input", *out.words, "heatmap"))


def facts(args: argparse.Namespace, out: RefAMOutput) -> dict[str, Any]:
    """What `ground.json` holds."""
    return {
        "input": str(args.input),
        "model": str(args.model),
        "expression": args.expression,
        "settings": args.sections["refam"],
        "prompt": out.prompt,
        "words": list(out.words),
        "magnets": list(out.magnets),
        "point": dict(zip(("frame", "row", "column"), out.point)),
        "mask_share": float(out.mask.float().mean()),
        "score": out.score,
        "stop_share": out.stop_share,
        "variation": out.variation,
        "sinks": out.sinks,
    }


def _segmenter(args: argparse.Namespace, device: str) -> Any:
    if not hasattr(args, "sam"):
        return None
    from gen_accel.pipelines.refam.sam import Sam2

    try:
        return Sam2(args.sam, device)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--sam {args.sam}: cannot be loaded ({reason})") from error


def _rgb(frames: Tensor) -> Tensor:
    frames = frames.float() / 255
    return frames if frames.shape[1] == 3 else frames[:, :1].expand(-1, 3, -1, -1)


def _even(frames: Tensor) -> Tensor:
    """H.264 takes even sizes only."""
    from torch.nn.functional import pad

    return pad(frames, (0, frames.shape[3] % 2, 0, frames.shape[2] % 2), mode="replicate")
