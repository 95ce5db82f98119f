"""Object-WIPER: remove an object and what it casts from a video, without training.

An independent reconstruction of arXiv 2601.06391: its code is not public, and the paper itself
could not be read. docs/object_wiper.md lists what is known and what is inferred.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from gen_accel.layout import TokenGrid
from gen_accel.pipelines.checks import check_number
from gen_accel.pipelines.effects import Effects, find_effects
from gen_accel.pipelines.flow import Text, VideoFlow, as_batch, video_family
from gen_accel.pipelines.frames import to_clips, to_masks
from gen_accel.pipelines.masks import pack_mask, unpack_mask
from gen_accel.pipelines.remover import Remover
from gen_accel.pipelines.wipe_setting import WipeSetting
from gen_accel.pipelines.words import find_word, text_spans, word_tokens

Words = str | Sequence[str]


@dataclass
class Diagnostics:
    """What happened on the way.

    Attributes:
        sigmas: Noise levels, from data to noise.
        masks: Foreground of every step of the way, bool ``[steps, batch, *grid]``, from data on.
        moved: ``"inversion"`` and ``"removal"``: share of attention that scaled pairs had before
            and after, in the middle layer, ``[steps, batch, 2]`` in the order of evaluation; empty
            where nothing was scaled.
        drift: Root mean square distance of the background's latents to the inversion's,
            ``[steps, batch]``, in the order of evaluation; the last is the background's error.
        guards: For each clip, which guards of the effect mask fired.
        cache_bytes: Size of the kept values.
        seconds: Wall time of ``"effects"``, ``"inversion"``, ``"removal"``.
    """

    sigmas: list[float]
    masks: Tensor
    moved: dict[str, Tensor]
    drift: Tensor
    guards: list[list[str]]
    cache_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class WipeOutput(BaseOutput):
    """Result of `ObjectWiperPipeline`.

    Attributes:
        frames: ``[batch, frames, 3, height, width]`` in [0, 1]; arrays ``[..., height, width, 3]``
            or lists of images with another ``output_type``.
        effect_mask: What the object casts, bool ``[batch, frames, height, width]``.
        foreground_mask: Object and effect, what was replaced.
        effects: Maps behind the effect mask; None without a search.
        diagnostics: What happened on the way.
    """

    frames: Any
    effect_mask: Tensor
    foreground_mask: Tensor
    effects: Effects | None
    diagnostics: Diagnostics


class ObjectWiperPipeline(DiffusionPipeline):
    """Removes an object, and the shadow or reflection that goes with it, from a clip.

    Example:
        >>> wiper = ObjectWiperPipeline.from_pipe(pipe)  # HunyuanVideo or Wan, text to video
        >>> out = wiper(
        ...     video, mask, "a red ball with a shadow on pebbles", "pebbles", ("ball", "shadow")
        ... )
        >>> out.frames, out.effect_mask

    The arguments of the constructor are the components of those pipelines.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2", "transformer_2"]

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__()
        parts = {
            "transformer": transformer,
            "vae": vae,
            "scheduler": scheduler,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
        }
        second = {"text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2}
        self.register_modules(**parts, **second, transformer_2=transformer_2)
        self.register_to_config(boundary_ratio=boundary_ratio, expand_timesteps=expand_timesteps)
        video_family(transformer)  # refuses what is neither

    def _stock(self) -> Any:
        """The stock pipeline, which knows how to encode prompts, of the parts of this moment."""
        names = ["transformer", "vae", "scheduler", "text_encoder", "tokenizer"]
        if video_family(self.transformer).name == "hunyuan_video":
            from diffusers import HunyuanVideoPipeline

            names += ["text_encoder_2", "tokenizer_2"]
            return HunyuanVideoPipeline(**{name: getattr(self, name) for name in names})
        from diffusers import WanPipeline

        return WanPipeline(
            **{name: getattr(self, name) for name in (*names, "transformer_2")},
            boundary_ratio=self.config.boundary_ratio,
            expand_timesteps=self.config.expand_timesteps,
        )

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> ObjectWiperPipeline:
        """A wiper that shares the parts of a pipeline, whose weights stay as they are.

        Args:
            pipeline: A HunyuanVideo or Wan text-to-video pipeline.
            **kwargs: Components to use instead.

        Raises:
            ValueError: Another kind of pipeline.
        """
        known = set(inspect.signature(cls.__init__).parameters) - {"self"}
        parts = {**pipeline.components, **kwargs}
        # An image encoder of I2V, say, is None in a text-to-video pipeline.
        strange = sorted(k for k, v in parts.items() if k not in known and v is not None)
        if strange or "transformer" not in parts:
            raise ValueError(
                f"{type(pipeline).__name__} with {', '.join(strange) or 'no transformer'}: a video "
                "is wiped with HunyuanVideo's or Wan's text-to-video pipeline"
            )
        config = {k: pipeline.config[k] for k in ("boundary_ratio", "expand_timesteps")
                  if k in pipeline.config}  # fmt: skip
        return cls(**{**{k: v for k, v in parts.items() if k in known}, **config})

    @torch.no_grad()
    def __call__(
        self,
        video: Any,
        mask: Any,
        prompt: str | list[str],
        target_prompt: str | list[str],
        query: Words | Sequence[Words],
        *,
        negative_prompt: str | list[str] = "",
        setting: WipeSetting | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        max_sequence_length: int | None = None,
        prompt_template: dict[str, Any] | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        **options: Any,
    ) -> WipeOutput | tuple[Any, ...]:
        """Remove.

        Args:
            video: ``[frames, height, width, 3]``, ``[frames, 3, height, width]`` or a batch of
                those, uint8 or float in [0, 1], array or tensor; or lists of images. Where the axes
                leave a doubt, channels are last in an array and first in a tensor.
            mask: The object: bool, or 0 and other, ``[frames, height, width]``, one frame for all,
                or a batch of those; or an image, or lists of images.
            prompt: Names the object, its effects and the scene.
            target_prompt: Names the scene alone. If it implies the object, the object comes back.
            query: Words of ``prompt`` that name the object and its effects, for all clips; or for
                each clip of a batch such a list, ``[("ball", "shadow"), ("cat",)]``.
            negative_prompt: For ``true_cfg_scale`` above 1.
            setting: All the knobs; None: the defaults.
            generator: Of the noise; a list has one for each clip.
            max_sequence_length: Text tokens; None: the model's default.
            prompt_template: HunyuanVideo's; None: its default.
            output_type: ``"pt"``, ``"np"`` or ``"pil"``.
            return_dict: Return a `WipeOutput` instead of a tuple.
            **options: Fields of `WipeSetting` that differ from ``setting``.

        Raises:
            ValueError: Frames, sizes or masks do not fit each other or the model, a mask is empty
                or covers everything, a query word is not in the prompt, an unknown option or a
                value out of its range, or not enough memory for what the inversion keeps; all
                of it before the transformer runs.
            TypeError: A setting of another type.
        """
        setting = _with(setting or WipeSetting(), options)
        if output_type not in ("pt", "np", "pil"):
            raise ValueError(f"output_type={output_type!r}: choose pt, np or pil")
        check_number("max_sequence_length", max_sequence_length, low=1, whole=True, optional=True)
        pixels, covered = _inputs(video, mask)
        batch = len(pixels)
        generators = generator
        if isinstance(generator, list):
            generators = as_batch(generator, batch, "generator")
        stock = self._stock()
        flow = VideoFlow(
            stock, max_sequence_length=max_sequence_length, prompt_template=prompt_template
        )
        prompts = as_batch(prompt, batch, "prompt")
        queries = _queries(stock, prompts, _words(query, batch), flow.options)
        targets = as_batch(target_prompt, batch, "target_prompt")
        seconds: dict[str, float] = {}

        latents = flow.encode(pixels)
        text = flow.text(prompts)
        grid = flow.layout(latents, text).grid
        object_ = _tokens(covered, grid, flow)
        noise = randn_tensor(latents.shape, generator=generators, device=latents.device)
        forwards = setting.steps * setting.evaluations
        with self.progress_bar(total=2 * forwards) as bar:
            remover = Remover(flow, setting, bar.update)
            remover.check(latents, text)
            effects = None
            if setting.find_effects:
                with _clock(seconds, "effects"):
                    effects = find_effects(
                        flow, latents, text, queries, object_, setting.effects, noise
                    )
            effect = effects.mask if effects is not None else torch.zeros_like(object_)
            with _clock(seconds, "inversion"):
                inversion = remover.invert(latents, text, object_)
            negative: Text | None = None
            if setting.true_cfg_scale != 1:
                negative = flow.text(as_batch(negative_prompt, batch, "negative_prompt"))
            with _clock(seconds, "removal"):
                removal = remover.remove(inversion, flow.text(targets), effect, noise, negative)
        frames = flow.decode(removal.latents)
        self.maybe_free_model_hooks()

        shape = (*pixels.shape[1:2], *pixels.shape[3:], flow.temporal)
        effect_mask, foreground = (
            unpack_mask(m, *shape).to(covered.device) for m in (effect, effect | object_)
        )
        diagnostics = Diagnostics(
            sigmas=inversion.sigmas,
            masks=torch.stack(inversion.masks) | effect,
            moved={"inversion": _moved(inversion.moved), "removal": _moved(removal.moved)},
            drift=torch.stack(removal.drift),
            guards=effects.guards if effects is not None else [[] for _ in range(batch)],
            cache_bytes=inversion.store.nbytes,
            seconds=seconds,
        )
        if output_type != "pt":
            arrays = frames.movedim(2, -1).cpu().numpy()
            frames = arrays if output_type == "np" else [self.numpy_to_pil(clip) for clip in arrays]
        out = WipeOutput(frames, effect_mask & ~covered, foreground | covered, effects, diagnostics)
        # Not to_tuple(), which leaves out what is None: every item keeps its place.
        return out if return_dict else tuple(getattr(out, f.name) for f in fields(out))


def _with(setting: WipeSetting, options: dict[str, Any]) -> WipeSetting:
    if not isinstance(setting, WipeSetting):
        raise TypeError(f"setting={setting!r}: give a WipeSetting, or its fields as arguments")
    known = {f.name for f in fields(setting)}
    for name in options:
        if name not in known:
            raise ValueError(f"{name}: no such option; the settings are {', '.join(sorted(known))}")
    return replace(setting, **options)


def _inputs(video: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """Clips ``[batch, frames, 3, height, width]`` in [0, 1], masks without the 3."""
    pixels = to_clips(video)
    batch, frames, _, *size = pixels.shape
    covered = to_masks(mask, batch, frames, (size[0], size[1]))
    for clip, inside in enumerate(covered):
        if not inside.any() or inside.all():
            what = "covers everything" if inside.all() else "is empty"
            raise ValueError(f"the mask of clip {clip} {what}; mark the object to remove")
    return pixels, covered.to(pixels.device)


def _words(query: Words | Sequence[Words], batch: int) -> list[tuple[str, ...]]:
    """The query words of each clip: words alone are for all, lists of words one for each."""
    if isinstance(query, str):
        return [(query,)] * batch
    if not isinstance(query, list | tuple):
        raise TypeError(f"query={query!r}: give words of the prompt, or such a list for each clip")
    if all(isinstance(word, str) for word in query):
        return [tuple(str(word) for word in query)] * batch
    each = [(words,) if isinstance(words, str) else words
            for words in as_batch(list(query), batch, "query")]  # fmt: skip
    for words in each:
        if not isinstance(words, list | tuple) or not all(isinstance(w, str) for w in words):
            raise TypeError(f"query={query!r}: {words!r} is no list of words of the prompt")
    return [tuple(words) for words in each]


def _queries(
    pipe: Any, prompts: list[str], queries: list[tuple[str, ...]], options: dict[str, Any]
) -> list[list[tuple[int, ...]]]:
    """For each clip, the text tokens of each query word."""
    found = []
    for prompt, words in zip(prompts, queries):
        if not words:
            raise ValueError("query is empty; name the object and its effects as the prompt does")
        spans = text_spans(pipe, prompt, **options)
        found.append([word_tokens(spans, find_word(prompt, word)) for word in words])
    return found


def _tokens(covered: Tensor, grid: TokenGrid, flow: VideoFlow) -> Tensor:
    object_ = pack_mask(covered, grid, flow.temporal).to(flow.device)
    if object_.flatten(1).all(1).any():
        raise ValueError("the mask touches every token, nothing is left to fill in from; shrink it")
    return object_


def _moved(steps: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    means = [torch.stack([torch.stack(pair, -1) for pair in pairs]).mean(0)
             for pairs in steps if pairs]  # fmt: skip
    return torch.stack(means) if means else torch.empty(0)


@contextmanager
def _clock(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - started
