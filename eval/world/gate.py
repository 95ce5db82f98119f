"""The bars a toy model must clear, measured on held-out scenes and reported whatever the result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..grounding import average_precision
from ..toys import TOYS, encode_text, to_latents, toy_call, toy_name, velocity
from .caption import describe
from .read import read
from .render import Clip, render
from .scene import TOY, Scene, WorldConfig, held_out, sample_scene

# One object or none on a backdrop that segmentation can see through.
GATE_WORLD = replace(TOY, empty=0.2, counts=(1.0,), backgrounds=(0.6, 0.4, 0, 0, 0, 0))


@dataclass(frozen=True)
class Result:
    """One measured bar.

    Attributes:
        name: What was measured.
        value: Measured value.
        low: Lower end of the 95 % interval.
        high: Upper end.
        n: Sample size.
        bar: Required value, or None for a figure without a bar.
        unit: ``%``, ``dB``, ``AP`` or ``max|d|`` (where less is better).
        note: Where or how.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    bar: float | None
    unit: str
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the measured value reaches the bar."""
        if self.bar is None:
            return True
        return self.value <= self.bar if self.unit == "max|d|" else self.value >= self.bar


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, in percent."""
    if n == 0:
        return 0.0, 100.0
    z, p = 1.96, successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def bootstrap(values: list[float], rounds: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; seeded."""
    array = np.asarray(values, float)
    rng = np.random.default_rng(0)
    means = array[rng.integers(len(array), size=(rounds, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _share(name: str, hits: list[bool], bar: float | None, note: str = "") -> Result:
    value = 100 * float(np.mean(hits)) if hits else 0.0
    return Result(name, value, *wilson(sum(hits), len(hits)), len(hits), bar, "%", note)


def held_out_scenes(count: int, config: WorldConfig = GATE_WORLD, first: int = 0) -> list[Scene]:
    """Scenes of the test split, which no training saw."""
    return [sample_scene(seed, config, "test") for seed in range(first, first + count)]


def generate(
    pipe: Any, prompts: list[str], seeds: list[int], batch: int = 20, **overrides: Any
) -> np.ndarray:
    """Samples the stock pipeline.

    Args:
        pipe: Toy pipeline.
        prompts: One text per sample.
        seeds: One seed per sample.
        batch: Samples per call.
        **overrides: Replace entries of ``toy_call``.

    Returns:
        ``[n, T, S, S, 3]`` in [0, 1]; T is 1 for images.
    """
    call = {**toy_call(toy_name(pipe)), **overrides}
    clips = []
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        call["negative_prompt"] = [""] * len(part)
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
        out = pipe(prompt=part, generator=generators, output_type="pt", **call)[0].float().cpu()
        out = out if out.ndim == 5 else out[:, None]
        clips.append(out.permute(0, 1, 3, 4, 2).clamp(0, 1).numpy())
    return np.concatenate(clips)


def attribute_gate(
    pipe: Any, samples: int = 200, progress: Callable[[str], None] = lambda _: None, **call: Any
) -> list[Result]:
    """Bar 1: colour, shape, emptiness, effect and motion of samples, read off by segmentation."""
    video = TOYS[toy_name(pipe)].frames > 1
    scenes = held_out_scenes(samples)
    captions = [describe(s, clip=video).text for s in scenes]
    clips = generate(pipe, captions, [s.seed for s in scenes], **call)
    progress(f"{samples} samples drawn")
    hits: dict[str, list[bool]] = {}

    def note(name: str, hit: bool) -> None:
        hits.setdefault(name, []).append(bool(hit))

    for scene, clip in zip(scenes, clips):
        seen = read(clip)
        if not scene.things:
            note("empty", seen.empty and not seen.effect)
            continue
        thing = scene.things[0]
        right = (seen.colour == thing.colour, seen.shape == thing.shape)
        note("colour", right[0])
        note("shape", right[1])
        note("effect", seen.effect == (thing.effect is not None) and not seen.empty)
        if thing.effect is not None:
            note(f"  {thing.effect} shown", seen.effect and not seen.empty)
        else:
            note("  none shown", not seen.effect and not seen.empty)
        if video:
            note("motion", seen.motion == (thing.direction or "still"))
        if held_out(thing):
            note("  colour and shape, unseen combination", all(right))
    bars = {"colour": 90.0, "shape": 80.0, "empty": 90.0, "effect": 80.0, "motion": 80.0}
    order = [*(b for b in bars if b in hits), *sorted(h for h in hits if h not in bars)]
    return [_share(name, hits[name], bars.get(name)) for name in order]


def integrate(
    pipe: Any, latents: torch.Tensor, text: dict[str, torch.Tensor], sigmas: torch.Tensor
) -> torch.Tensor:
    """Explicit midpoint rule along ``sigmas``; two evaluations per step, no guidance."""
    for now, after in zip(sigmas[:-1], sigmas[1:]):
        full = torch.full((len(latents),), float(now), device=latents.device)
        half = torch.full_like(full, float(now + after) / 2)
        middle = latents + (after - now) / 2 * velocity(pipe, latents, full, text)
        latents = latents + (after - now) * velocity(pipe, middle, half, text)
    return latents


@torch.no_grad()
def inversion_gate(pipe: Any, clips: int = 8, steps: int = 50, batch: int = 4) -> Result:
    """Bar 2: PSNR after inversion to noise and back along the pipeline's own shifted schedule."""
    frames = TOYS[toy_name(pipe)].frames
    shift = float(pipe.scheduler.config.shift)
    u = torch.linspace(0, 1, steps + 1)
    sigmas = shift * u / (1 + (shift - 1) * u)
    psnr: list[float] = []
    for i in range(0, clips, batch):
        drawn = [_clip(s, frames) for s in held_out_scenes(min(batch, clips - i), first=10_000 + i)]
        latents = _latents(pipe, drawn)
        text = encode_text(pipe, [describe(c.scene, clip=frames > 1).text for c in drawn])
        noise = integrate(pipe, latents, text, sigmas)
        back = integrate(pipe, noise, text, sigmas.flip(0))
        error = ((back.clamp(-1, 1) - latents) / 2).square().flatten(1).mean(dim=1)
        psnr += (-10 * error.clamp(min=1e-12).log10()).tolist()
    note = f"midpoint, {steps} steps, worst {min(psnr):.1f}"
    return Result("inversion", float(np.mean(psnr)), *bootstrap(psnr), clips, 30.0, "dB", note)


def _clip(scene: Scene, frames: int) -> Clip:
    return render(scene, None if frames > 1 else np.array([scene.frames // 2]))


def _latents(pipe: Any, clips: list[Clip]) -> torch.Tensor:
    latents = to_latents(np.stack([c.video for c in clips])).to(pipe.transformer.device)
    return latents[:, :, 0] if TOYS[toy_name(pipe)].frames == 1 else latents


@contextlib.contextmanager
def _recorded(pipe: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collects (query, key) of every attention call of the transformer, after norm and RoPE."""
    import importlib

    module: Any = importlib.import_module(type(pipe.transformer).__module__)
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    stock = module.dispatch_attention_fn

    def record(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query.detach(), key.detach()))
        return stock(query, key, *args, **kwargs)

    module.dispatch_attention_fn = record
    try:
        yield calls
    finally:
        module.dispatch_attention_fn = stock


def _text_logits(
    name: str, query: torch.Tensor, key: torch.Tensor, video: int, text: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Logits (image->text, text->image), each ``[B, H, video, text]``; None for other calls."""
    scale = query.shape[-1] ** -0.5
    joint = query.shape[1] == key.shape[1] == video + text
    if name == "wan":  # cross-attention knows one direction; its transpose is read as the other
        if query.shape[1] != video or key.shape[1] != text:
            return None
        logits = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
        return logits, logits
    if not joint:
        return None
    img, txt = (slice(text, None), slice(0, text)) if name == "flux" else (
        slice(0, video), slice(video, None))  # fmt: skip
    to_text = torch.einsum("bnhd,bmhd->bhnm", query[:, img], key[:, txt]) * scale
    to_image = torch.einsum("bmhd,bnhd->bhnm", query[:, txt], key[:, img]) * scale
    return to_text, to_image


def token_mask(mask: np.ndarray, patch: int) -> np.ndarray:
    """Object mask ``[T, S, S]`` as labels of the tokens, raster order: at least half covered."""
    t, s, _ = mask.shape
    grid = mask.reshape(t, s // patch, patch, s // patch, patch).mean(axis=(2, 4))
    return (grid >= 0.5).reshape(-1)


@dataclass(frozen=True)
class WordMaps:
    """Average precision of word maps against the object.

    Attributes:
        table: ``[direction, word, layer, head, clip]``; directions are image->text and text->image,
            words are colour and shape.
        area: Mean share of tokens on the object, which is what chance scores.
    """

    table: np.ndarray
    area: float

    DIRECTIONS = ("image->text", "text->image")
    WORDS = ("colour", "shape")

    def best(self, word: str) -> tuple[float, str, int, int, list[float]]:
        """Best mean, its direction, layer and head, and the values of the clips."""
        mean = self.table[:, self.WORDS.index(word)].mean(axis=-1)
        d, layer, head = np.unravel_index(int(mean.argmax()), mean.shape)
        values = self.table[d, self.WORDS.index(word), layer, head].tolist()
        return float(mean.max()), self.DIRECTIONS[d], int(layer), int(head), values


@torch.no_grad()
def word_maps(pipe: Any, clips: int = 40, sigma: float = 0.5, batch: int = 10) -> WordMaps:
    """Maps of the colour and the shape word in every layer and head, on noised held-out clips.

    Image->text is the share of a pixel's attention over the valid text that goes to the word;
    text->image is the word's attention over the pixels.
    """
    name = toy_name(pipe)
    frames, patch = TOYS[name].frames, 2 if name == "flux" else 4
    tokenizer = pipe.tokenizer_2 if name == "flux" else pipe.tokenizer
    scenes = [s for s in held_out_scenes(3 * clips, first=20_000) if s.things][:clips]
    columns: list[np.ndarray] = []
    areas: list[float] = []
    for i in range(0, len(scenes), batch):
        drawn = [_clip(s, frames) for s in scenes[i : i + batch]]
        captions = [describe(c.scene, clip=frames > 1) for c in drawn]
        latents = _latents(pipe, drawn)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(i))
        noised = (1 - sigma) * latents + sigma * noise.to(latents)
        text = encode_text(pipe, [c.text for c in captions])
        tokens = text["encoder_hidden_states"].shape[1]
        video = frames * (drawn[0].scene.size // patch) ** 2
        with _recorded(pipe) as calls:
            velocity(pipe, noised, torch.full((len(drawn),), sigma), text)
        pairs = [p for q, k in calls if (p := _text_logits(name, q, k, video, tokens)) is not None]
        for b, (clip, caption) in enumerate(zip(drawn, captions)):
            label = token_mask(clip.target, patch)
            areas.append(float(label.mean()))
            target = torch.from_numpy(label).view(1, 1, -1)
            offsets = tokenizer(caption.text, return_offsets_mapping=True)["offset_mapping"]
            valid = len(offsets)
            where = {
                s.role: next(j for j, (a, z) in enumerate(offsets) if a <= s.start < z)
                for s in caption.spans
                if s.role in WordMaps.WORDS
            }
            entry = np.zeros((2, 2, len(pairs), pairs[0][0].shape[1]))
            for layer, (to_text, to_image) in enumerate(pairs):
                maps = (to_text[b, :, :, :valid].softmax(-1), to_image[b].softmax(-2))
                for d, attention in enumerate(maps):
                    for w, word in enumerate(WordMaps.WORDS):
                        for head, column in enumerate(attention[..., where[word]]):
                            if label.any():  # an object under half a token everywhere scores 0
                                score = average_precision(column.reshape(1, 1, -1), target)
                                entry[d, w, layer, head] = float(score)
            columns.append(entry)
    return WordMaps(np.stack(columns, axis=-1), float(np.mean(areas)))


def word_map_gate(maps: WordMaps) -> list[Result]:
    """Bar 3: the best (layer, head) for the colour and for the shape word."""
    results = []
    for word, bar in (("colour", 0.9), ("shape", 0.7)):
        value, direction, layer, head, values = maps.best(word)
        note = f"{direction}, layer {layer}, head {head}; chance {maps.area:.3f}"
        results.append(
            Result(f"{word} word map", value, *bootstrap(values), len(values), bar, "AP", note)
        )
    return results


def repeat_gate(load: Callable[[], Any], **call: Any) -> Result:
    """Bar 4: two loads, one seed, one clip."""
    prompt = ["a red circle with a shadow moving right on a plain background"]
    first, second = (generate(load(), prompt, [0], **call) for _ in range(2))
    worst = float(np.abs(first - second).max())
    return Result("same seed, two loads", worst, worst, worst, 2, 1e-5, "max|d|")


def table(results: list[Result]) -> str:
    """The results as text, one line each."""
    lines = [f"{'gate':40s} {'value':>9s} {'95% interval':>18s} {'n':>5s} {'bar':>8s}  verdict"]
    for r in results:
        digits = {"AP": 3, "max|d|": 8}.get(r.unit, 1)
        bar = "" if r.bar is None else f"{r.bar:g}"
        verdict = "" if r.bar is None else ("pass" if r.passed else "FAIL")
        interval = f"{r.low:.{digits}f} .. {r.high:.{digits}f}"
        lines.append(
            f"{r.name:40s} {r.value:9.{digits}f} {interval:>18s} {r.n:5d} {bar:>8s}  {verdict:7s} "
            f"{r.unit} {r.note}".rstrip()
        )
    return "\n".join(lines)


def map_table(maps: WordMaps) -> str:
    """Mean average precision per layer and head, both directions and words, as Markdown."""
    heads = maps.table.shape[3]
    lines = ["| direction | word | layer | " + " | ".join(f"head {h}" for h in range(heads)) + " |"]
    lines.append("|" + "---|" * (3 + heads))
    for d, direction in enumerate(maps.DIRECTIONS):
        for w, word in enumerate(maps.WORDS):
            for layer, row in enumerate(maps.table[d, w].mean(axis=-1)):
                cells = " | ".join(f"{v:.2f}" for v in row)
                lines.append(f"| {direction} | {word} | {layer} | {cells} |")
    return "\n".join(lines)
