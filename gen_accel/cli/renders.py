"""Clips of a pipeline, kept by what they were made from, so that nothing is rendered twice."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gen_accel
from gen_accel.cli import pipeline as shared
from gen_accel.cli.options import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.processors import Policy

_ELSEWHERE = {"cli", "comfyui", "eval", "pipelines"}


@dataclass(frozen=True)
class Setting:
    """A processor to try.

    Attributes:
        label: How it is shown.
        method: ``paro``, ``gna``, ...
        options: Settings of the processor.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def processor(self) -> Policy:
        """A fresh processor.

        Raises:
            UsageError: The method or an option is unknown, or a value is no good.
        """
        if self.method == "none":
            raise UsageError(f"--methods {self.label}: dense is what the others are compared with")
        options = dict(self.options)
        found = shared.make_processor(self.method, options, options.pop("plan", None))
        assert found is not None
        return found

    def at(self, density: float) -> Setting:
        """The same at another density."""
        options = {**self.options, "density": density}
        return Setting(f"{self.label}@{density:g}", self.method, options)


@dataclass
class Render:
    """A clip and what it cost.

    Attributes:
        key: Hash of what it was made from.
        path: Its file.
        seconds: Wall time of the pipeline call.
        run: What ran sparse, see `gen_accel.cli.pages.density`; empty for a dense clip.
        scores: Metric and what it was computed with -> value.
    """

    key: str
    path: Path
    seconds: float
    run: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @cached_property
    def frames(self) -> Tensor:
        """uint8 ``[frames, channels, height, width]``; float where values are not finite."""
        import numpy as np
        import torch

        return torch.from_numpy(np.load(self.path))

    @property
    def density(self) -> float:
        """Kept share, mean over the sparse calls of all transformers."""
        parts = [part["mean"] for part in self.run.values()]
        return sum(parts) / len(parts) if parts else 1.0


class Renders:
    """The clips of one model and one call.

    Args:
        folder: Where they are kept.
        args: Options of the pipeline.
        call: Arguments of its call.
        device: Where it runs.
        load: Makes the pipeline, when the first clip is missing.
    """

    def __init__(
        self,
        folder: Path,
        args: argparse.Namespace,
        call: Mapping[str, Any],
        device: str,
        load: Callable[[], Any],
    ) -> None:
        self.folder = folder
        self.args = args
        self.call = dict(call)
        self.device = device
        self.load = load
        self.made = 0

    @cached_property
    def pipe(self) -> Any:
        """The pipeline."""
        return self.load()

    @cached_property
    def _basis(self) -> dict[str, Any]:
        """What all clips are made from."""
        model = fingerprint(self.args.model)
        if model is None:  # not downloaded yet; the next run must find the same
            model = fingerprint(self.args.model) if self.pipe else None
        return {
            "model": model,
            "call": self.call,
            "dtype": getattr(self.args, "dtype", None),
            "device": self.device.partition(":")[0],
            "versions": _versions(),
        }

    def get(self, prompt: str, seed: int, setting: Setting | None = None) -> Render:
        """The clip, from disk or made now.

        Args:
            prompt: What to show.
            seed: Of the noise.
            setting: Processor to use; None renders dense.

        Raises:
            UsageError: Nothing of it ran sparse.
        """
        made_of = {**self._basis, "prompt": prompt, "seed": seed}
        if setting is not None:
            made_of |= {"processor": repr(setting.processor()), "code": code("", "kernels")}
            plan = setting.options.get("plan")
            made_of["plan"] = plan and hashlib.sha256(Path(plan).read_bytes()).hexdigest()
        text = json.dumps(made_of, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        known = self._read(key)
        return known if known is not None else self._render(key, made_of, prompt, seed, setting)

    def save(self, render: Render) -> None:
        """Keep the scores of a clip."""
        self._write(render, json.loads(self._sheet(render.key).read_text())["made_of"])

    def _render(
        self, key: str, made_of: Mapping[str, Any], prompt: str, seed: int, setting: Setting | None
    ) -> Render:
        import numpy as np

        from gen_accel import apply
        from gen_accel.cli.pages import density
        from gen_accel.eval.files import atomic
        from gen_accel.eval.video import to_uint8

        run: dict[str, Any] = {}
        if setting is None:
            frames, seconds = shared.generate(self.pipe, prompt, seed, self.call)
        else:
            # Installed anew for each clip: what a processor learns from one must not reach another,
            # or a clip would depend on those before it, and could not be resumed.
            with apply(self.pipe, setting.processor()) as handle:
                frames, seconds = shared.generate(self.pipe, prompt, seed, self.call)
                run = density(handle)
            if not any(part["sparse"] for part in run.values()):
                why = "; ".join(reason for part in run.values() for reason in part["dense"])
                raise UsageError(
                    f"{setting.label}: no attention call ran sparse ({why}); for short sequences "
                    "set processor.min_tokens=0"
                )
        self.made += 1
        frames = frames if not bool(frames.isfinite().all()) else to_uint8(frames)
        render = Render(key, self.folder / f"{key}.npy", seconds, run)
        with atomic(render.path) as scratch:
            np.save(scratch, frames.numpy())
        self._write(render, made_of)
        return render

    def _sheet(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _write(self, render: Render, made_of: Mapping[str, Any]) -> None:
        """The sheet comes after the clip: a clip without one is not there."""
        from gen_accel.eval.files import write_text

        sheet = {"made_of": made_of, "seconds": render.seconds, "run": render.run}
        text = json.dumps({**sheet, "scores": render.scores}, indent=1, default=str)
        write_text(self._sheet(render.key), text + "\n")

    def _read(self, key: str) -> Render | None:
        path = self.folder / f"{key}.npy"
        try:
            sheet = json.loads(self._sheet(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not path.is_file():
            return None
        return Render(key, path, sheet["seconds"], sheet["run"], sheet["scores"])


def fingerprint(model: str) -> str | None:
    """What tells a checkpoint from another of the same name, without reading its weights.

    None for a Hub id that is not in the cache.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(model)
    if not folder.is_dir():
        found = try_to_load_from_cache(model, "model_index.json")
        return f"{model} {found}" if isinstance(found, str) else None  # the path has the commit
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md")
    facts = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@cache
def code(*folders: str) -> str:
    """Hash of our sources in some folders; ``""`` is the package, without what does not render."""
    digest = hashlib.sha256()
    for name in folders:
        for root in gen_accel.__path__:
            folder = Path(root) / name
            # gen_accel.__path__ of a clone names the repository too.
            if name or (folder / "engine.py").is_file():
                for path in sorted(folder.rglob("*.py")):
                    if not _ELSEWHERE & set(path.relative_to(folder).parts):
                        digest.update(path.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "transformers")}
