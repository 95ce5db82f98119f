"""gen-accel wipe: remove an object and what it casts from a video."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli import options
from gen_accel.cli.options import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.pipelines.wipe_setting import WipeSetting

log = logging.getLogger("gen_accel")

# wipe.steps=28 sets an option of WipeSetting, effects.contrast=5 one of EffectSetting.
SECTIONS = ("wipe", "effects", "processor", "refam")
_SHARED = ("model", "negative_prompt", "seed", "dtype", "device", "cpu_offload")


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "wipe",
        help="remove an object and its shadow or reflection from a video",
        description=__doc__,
        epilog="wipe.NAME=VALUE sets an option of WipeSetting, effects.NAME=VALUE one of "
        "EffectSetting, processor.NAME=VALUE one of the processor, refam.NAME=VALUE one of what "
        "answers --expression. Beside the result stand NAME.masks.png and NAME.compare.mp4.",
    )
    options.add(parser, *_SHARED)
    more: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument("video", help="mp4, gif, npy or a folder of PNGs")
    parser.add_argument("--mask", metavar="FILE", help="the object: mp4, folder or one PNG", **more)
    parser.add_argument(
        "--expression", metavar="TEXT", help="the object in words, instead of a mask", **more
    )
    parser.add_argument("--prompt", metavar="TEXT", help="object, effects and scene", **more)
    parser.add_argument("--target-prompt", metavar="TEXT", help="the scene without it", **more)
    parser.add_argument(
        "--query", metavar="W,W", help="words of the prompt for the object and its effects", **more
    )
    parser.add_argument("--out", metavar="FILE", help="the result (outputs/wiped.mp4)", **more)
    parser.add_argument(
        "--fps", type=options.positive, help="frames per second (the input's, or 16)", **more
    )
    parser.add_argument(
        "--max-sequence-length", type=options.whole, metavar="N", help="text tokens", **more
    )
    parser.add_argument(
        "--processor", metavar="NAME", help="also run sparse: paro, sparse, ... (none)", **more
    )


def run(args: argparse.Namespace) -> int:
    """Wipe one clip; write it, the masks and a comparison."""
    from gen_accel.cli import pipeline as shared
    from gen_accel.cli.ground import refam_settings
    from gen_accel.eval.load import read_clip
    from gen_accel.eval.video import side_by_side, to_uint8, write_video

    out = Path(getattr(args, "out", "outputs/wiped.mp4"))
    texts = {name: _text(args, name) for name in ("prompt", "target_prompt", "query")}
    query = tuple(word.strip() for word in texts["query"].split(",") if word.strip())
    if hasattr(args, "mask") == hasattr(args, "expression"):
        raise UsageError("give --mask FILE or --expression TEXT, one of the two")
    expression = _text(args, "expression") if hasattr(args, "expression") else ""
    if refam_settings(args) and not expression:
        raise UsageError("refam. settings are for --expression TEXT, and a mask is given")
    setting = _setting(args)
    if hasattr(args, "negative_prompt") and setting.true_cfg_scale == 1:
        log.warning("--negative-prompt does nothing at wipe.true_cfg_scale=1; raise it")
    processor = shared.make_processor(
        getattr(args, "processor", "none"), args.sections["processor"], None
    )
    clip = read_clip(args.video)
    video = to_uint8(clip.frames)
    _check_target(out, len(video))
    mask = None if expression else _mask(args.mask)
    pipe = shared.load_pipeline(args, shared.device_of(args))
    if mask is None:
        mask = _from_expression(args, pipe, video, expression)
    result = _wipe(args, pipe, processor, video, mask, texts, query, setting)

    fps = getattr(args, "fps", clip.fps or 16.0)
    write_video(out, result.frames[0], fps=fps)
    beside = {
        "masks.png": preview(video, result.foreground_mask[0], result.effect_mask[0]),
        "compare.mp4": side_by_side(
            [video, painted(video, result.foreground_mask[0], result.effect_mask[0]),
             result.frames[0].cpu()],
            labels=("input", "masks", "wiped"),
        ),
    }  # fmt: skip
    print(f"wrote {out}")
    for suffix, frames in beside.items():
        path = out.with_name(f"{out.stem}.{suffix}")
        write_video(path, frames, fps=fps)
        print(f"wrote {path}")
    _report(result)
    return 0


def painted(video: Tensor, foreground: Tensor, effect: Tensor) -> Tensor:
    """Frames with the object tinted red and its effect blue.

    Args:
        video: uint8 ``[frames, 3, height, width]``.
        foreground: bool ``[frames, height, width]``, object and effect.
        effect: The effect.
    """
    import torch

    out = video.float()
    for mask, colour in ((foreground & ~effect, (255, 40, 40)), (effect, (40, 90, 255))):
        tint = torch.tensor(colour, dtype=out.dtype)[:, None, None]
        out = torch.where(mask[:, None].to(out.device), 0.5 * out + 0.5 * tint, out)
    return out.round().to(torch.uint8)


def preview(video: Tensor, foreground: Tensor, effect: Tensor, count: int = 5) -> Tensor:
    """``count`` frames of `painted` in a row, as a clip of one frame."""
    import torch

    from gen_accel.eval.video import side_by_side

    chosen = torch.linspace(0, len(video) - 1, min(count, len(video))).round().long()
    frames = painted(video, foreground, effect)[chosen]
    return side_by_side([frame[None] for frame in frames])


def _wipe(
    args: argparse.Namespace,
    pipe: Any,
    processor: Any,
    video: Tensor,
    mask: Tensor,
    texts: dict[str, str],
    query: tuple[str, ...],
    setting: WipeSetting,
) -> Any:
    import contextlib

    import torch

    from gen_accel import apply
    from gen_accel.pipelines.object_wiper import ObjectWiperPipeline

    wiper = ObjectWiperPipeline.from_pipe(pipe)
    wiper.set_progress_bar_config(desc="wipe", unit="evaluation")
    with contextlib.nullcontext() if processor is None else apply(pipe, processor):
        return wiper(
            video, mask, texts["prompt"], texts["target_prompt"], query,
            negative_prompt=getattr(args, "negative_prompt", ""),
            setting=setting,
            generator=torch.Generator().manual_seed(getattr(args, "seed", 0)),
            max_sequence_length=getattr(args, "max_sequence_length", None),
        )  # fmt: skip


def _setting(args: argparse.Namespace) -> WipeSetting:
    from gen_accel.cli.pipeline import check_settings
    from gen_accel.pipelines.effects import EffectSetting
    from gen_accel.pipelines.wipe_setting import WipeSetting

    given = {}
    for section, kind in (("effects", EffectSetting), ("wipe", WipeSetting)):
        values = args.sections[section]
        known = {f.name: str(f.type) for f in dataclasses.fields(kind) if f.name != "effects"}
        check_settings(section, values, known)
        given[section] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
    return WipeSetting(**given["wipe"], effects=EffectSetting(**given["effects"]))


def _check_target(out: Path, frames: int) -> None:
    """Raise what writing the result would, before the work for it begins."""
    from gen_accel.eval.files import check_writable
    from gen_accel.eval.video import FORMATS

    suffix = out.suffix.lower()
    check_writable(out.parent)
    if suffix not in (".mp4", ".gif", ".npy", ".png", ""):
        raise UsageError(f"--out {out}: unknown format {out.suffix!r}; use {FORMATS}")
    if suffix == ".png" and frames != 1:
        raise UsageError(f"--out {out}: a PNG holds one frame, the video has {frames}; use .mp4")
    if out.is_dir() and (suffix or any(out.iterdir())):
        raise UsageError(f"--out {out}: a folder is there already; name another file or folder")


def _mask(path: str) -> Tensor:
    """Bool ``[frames, height, width]``: what is brighter than half."""
    from gen_accel.eval.video import read_video

    return read_video(path).float().mean(1) > 127


def _from_expression(args: argparse.Namespace, pipe: Any, video: Tensor, expression: str) -> Tensor:
    from gen_accel.pipelines.refam import ground_video

    call = {"max_sequence_length": getattr(args, "max_sequence_length", None)}
    call |= args.sections["refam"]
    return ground_video(pipe, video, expression, seed=getattr(args, "seed", 0), **call)


def _text(args: argparse.Namespace, name: str) -> str:
    value = getattr(args, name, "").strip()
    if not value:
        raise UsageError(f"{options.flag(name)} is missing; see gen-accel wipe --help")
    return value


def _report(result: Any) -> None:
    """What was taken, what it cost, what the background paid."""
    held = result.diagnostics
    covered = result.foreground_mask.float().mean()
    effect = result.effect_mask.float().mean()
    print(
        f"replaced {100 * covered:.1f} % of the pixels, {100 * effect:.1f} % as effect; "
        f"background drift {float(held.drift[-1]):.4f} (latents, rms); "
        f"kept values {held.cache_bytes / 2**20:.0f} MiB; "
        + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in held.seconds.items())
    )
    for guard in held.guards[0]:
        print(f"effect mask: {guard}")
