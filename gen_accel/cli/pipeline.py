"""What ``generate`` and ``calibrate`` share: a pipeline from options, and calls of it."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gen_accel
from gen_accel.cli.options import CALL, UsageError, check_names, flag, nearest, require

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.processors import Policy

log = logging.getLogger("gen_accel")

# paro -> ParoProcessor
PROCESSORS = {
    name.removesuffix("Processor").lower(): name
    for name in gen_accel.__all__
    if name.endswith("Processor")
}
# Parts of annotations: what they hold, and how that is called.
_KINDS: dict[str, tuple[Any, str]] = {
    "bool": (bool, "true or false"),
    "float": ((int, float), "a number"),
    "int": (int, "a whole number"),
    "str": (str, "text"),
    "dict[str, Any]": (dict, "names and values"),
    "None": (type(None), "null"),
}
_ITEMS = {"Sequence[bool]": "bool", "Sequence[int]": "int", "Sequence[str]": "str",
          "tuple[int, ...]": "int"}  # fmt: skip


# Arguments of a call that are not the user's to give, and what to do instead.
_OURS = {
    "prompt": "use --prompt",
    "generator": "use --seed",
    "output_type": "drop it",
    "return_dict": "drop it",
    "num_images_per_prompt": "for more of a prompt run again with another --seed",
    "num_videos_per_prompt": "for more of a prompt run again with another --seed",
}


def make_processor(name: str, settings: dict[str, Any], plan: str | None) -> Policy | None:
    """The processor ``--processor NAME`` with its dotted settings; None for ``none``."""
    if name == "none":
        if settings or plan is not None:
            given = ", ".join(f"processor.{key}" for key in settings) or "--plan"
            raise UsageError(f"--processor none takes no settings, but got {given}; drop one")
        return None
    if name not in PROCESSORS:
        raise UsageError(f"unknown processor {name!r}; {nearest(name, ['none', *PROCESSORS])}")
    kind = getattr(gen_accel, PROCESSORS[name])
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    check_names(f"setting of --processor {name}:", settings, fields)
    for key, value in settings.items():
        _check_type(f"processor.{key}", value, str(fields[key].type))
    if plan is not None:
        if "plan" not in fields:
            raise UsageError(f"--plan {plan}: --processor {name} follows no plan; drop it")
        settings = {**settings, "plan": plan}
    processor = kind(**settings)
    _check_carrier(processor.impl)
    processor.load_plan()  # a missing or damaged file is told before the model is loaded
    return processor


def processor_settings() -> set[str]:
    """Every setting that some processor takes."""
    kinds = (getattr(gen_accel, name) for name in PROCESSORS.values())
    return {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}


def check_settings(section: str, given: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Raise `UsageError` for a setting of another name or type.

    Args:
        section: Stands before the dot.
        given: Name -> value.
        known: Name -> annotation.
    """
    check_names(f"setting {section}.", given, known)
    for name, value in given.items():
        _check_type(f"{section}.{name}", value, known[name])


def _check_type(name: str, value: Any, annotation: str) -> None:
    """Values come from YAML, where ``0.2x`` is a string; simple annotations say what they hold."""
    parts = annotation.split(" | ")
    if not all(part in _KINDS or part in _ITEMS for part in parts):
        return
    if not any(_holds(part, value) for part in parts):
        expected = " or ".join(
            f"a list, each {_KINDS[_ITEMS[part]][1]}" if part in _ITEMS else _KINDS[part][1]
            for part in parts
        )
        raise UsageError(f"{name}={value!r}: expected {expected}")


def _holds(part: str, value: Any) -> bool:
    if part in _ITEMS:
        return isinstance(value, list | tuple) and all(_holds(_ITEMS[part], x) for x in value)
    kind = _KINDS[part][0]
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _check_carrier(impl: str) -> None:
    """Without this, a carrier that cannot run is noticed after the dense steps."""
    from gen_accel.kernels.api import available

    reason = available().get(impl)
    if reason is not None:
        raise UsageError(f"processor.impl={impl}: {reason}; or use impl=auto")


def device_of(args: argparse.Namespace) -> str:
    """The device asked for, or the best there is."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "cpu"
    if best == "cpu" and torch.backends.mps.is_available():
        best = "mps"
    name = getattr(args, "device", None) or best
    if name == "cuda" and processes() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device; use cpu, cuda, cuda:1 or mps") from error
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": best == "mps"}
    if not usable.get(kind, False):
        raise UsageError(f"--device {name}: this machine has no {kind}; use --device {best}")
    if kind == "cuda" and (torch.device(name).index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    if getattr(args, "cpu_offload", False) and kind == "cpu":
        raise UsageError("--cpu-offload moves models between CPU and GPU; drop it on a CPU")
    return name


def processes() -> int:
    """How many processes a launcher (accelerate, torchrun) started for this command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def load_pipeline(args: argparse.Namespace, device: str) -> Any:
    """The pipeline of ``--model`` on its device, its call options checked."""
    import torch
    from diffusers import DiffusionPipeline

    model = require(args, "model")
    for name, instead in _OURS.items():
        if name in args.sections.get("pipeline", {}):
            raise UsageError(f"pipeline.{name}: the command sets it; {instead}")
    if not Path(model).exists() and (model.count("/") != 1 or model[0] in "./~"):
        raise UsageError(f"--model {model}: no such folder, and not a Hub id like owner/name")
    name = getattr(args, "dtype", None) or ("float32" if device == "cpu" else "bfloat16")
    try:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, name))
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {model}: cannot be loaded ({_first(error)})") from error
    if getattr(args, "cpu_offload", False):
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def call_arguments(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """Arguments of the pipeline's call, without the prompt."""
    known = list(inspect.signature(pipe.__call__).parameters)
    call = {name: getattr(args, name) for name in CALL if getattr(args, name, None) is not None}
    for name in call:
        if name not in known:
            kind = type(pipe).__name__
            raise UsageError(f"{flag(name)}: {kind} does not take it; drop it")
    extra = args.sections["pipeline"]
    check_names("pipeline argument", extra, known)
    call = {**call, **extra}
    true_cfg = inspect.signature(pipe.__call__).parameters.get("true_cfg_scale")
    scale = None if true_cfg is None else call.get("true_cfg_scale", true_cfg.default)
    if call.get("negative_prompt") and scale == 1:
        log.warning("--negative-prompt does nothing at pipeline.true_cfg_scale=1; raise it")
    return call


def generate(pipe: Any, prompt: str, seed: int, call: dict[str, Any]) -> tuple[Tensor, float]:
    """One call of the pipeline: ``[frames, channels, height, width]`` in [0, 1], and seconds."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    result = pipe(prompt=prompt, generator=generator, output_type="pt", **call)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    pixels = result.frames[0] if hasattr(result, "frames") else result.images
    return pixels.float().clamp(0, 1).cpu(), seconds


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
