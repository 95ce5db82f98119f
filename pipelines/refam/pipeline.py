"""RefAM (arXiv 2509.22650): which pixels an expression means, from a generator's attention.

An independent reconstruction: docs/refam.md lists every choice that the paper's readable parts do
not make.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from gen_accel.pipelines.checks import check_flag, check_layers, check_number
from gen_accel.pipelines.frames import to_frames
from gen_accel.pipelines.probe import block_names
from gen_accel.pipelines.refam.backbone import Backbone
from gen_accel.pipelines.refam.expression import Prompt, Word, default_magnets, make_prompt
from gen_accel.pipelines.refam.heatmap import (
    AGGREGATIONS,
    DIRECTIONS,
    aggregate,
    find_point,
    normalise,
    otsu_mask,
    to_pixels,
    word_shares,
)
from gen_accel.pipelines.refam.reading import Heads, Reading, read, token_table
from gen_accel.pipelines.refam.sam import Segmenter, best_mask
from gen_accel.pipelines.refam.sinks import SINKS, SinkRule

log = logging.getLogger("gen_accel")

_BASES = {
    "FluxTransformer2DModel": "FluxPipeline",
    "HunyuanVideoTransformer3DModel": "HunyuanVideoPipeline",
    "WanTransformer3DModel": "WanPipeline",
}
_PARTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
_SECOND = ("text_encoder_2", "tokenizer_2")  # FLUX and HunyuanVideo


@dataclass
class RefAMOutput(BaseOutput):
    """What an expression means.

    Attributes:
        heatmap: ``[frames, height, width]`` in [0, 1].
        mask: bool ``[frames, height, width]``.
        point: Anchor frame, row and column of the answer.
        words: Content word -> its own map, shape of heatmap.
        sinks: Tokens that everybody looks at: words, or ``"video (frame, row, column)"``.
        magnets: The words that were appended.
        score: Peak of the content words' attention over its mean, before it is stretched: low
            where nothing answers.
        prompt: The text the model read.
        stop_share: Share of the image's attention to text that stop words and magnets drew.
        variation: Mean standard deviation of the stretched heatmap over the draws; 0 for one.
    """

    heatmap: Tensor
    mask: Tensor
    point: tuple[int, int, int]
    words: dict[str, Tensor]
    sinks: list[str]
    magnets: tuple[str, ...]
    score: float
    prompt: str
    stop_share: float
    variation: float


class RefAMPipeline(DiffusionPipeline):
    """Points at what an expression means, in pictures (FLUX) and videos (HunyuanVideo, Wan).

        refam = RefAMPipeline.from_pipe(pipe)
        out = refam(image=picture, expression="the red circle left of the square")
        out.heatmap, out.mask, out.point, out.words

    The picture is noised, one forward is run with the expression as prompt, and the attention
    between its words and the pixels is read; the model computes what it always does. Processors
    that are installed on the pipeline stay.

    Args:
        transformer: FLUX.1, HunyuanVideo or Wan.
        vae: As in the pipeline.
        scheduler: As in the pipeline.
        text_encoder: As in the pipeline.
        tokenizer: As in the pipeline.
        text_encoder_2: FLUX and HunyuanVideo.
        tokenizer_2: FLUX and HunyuanVideo.

    Raises:
        ValueError: Another transformer.
    """

    model_cpu_offload_seq = "vae->text_encoder->text_encoder_2->transformer"
    _optional_components = ["text_encoder_2", "tokenizer_2"]
    transformer: Any

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
    ) -> None:
        super().__init__()
        _base_name(transformer)  # refuses what is none of them
        self.register_modules(  # type: ignore[attr-defined]
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )

    def _base(self) -> Any:
        """The stock pipeline, which lends its text encoding, of the parts of this moment."""
        name = _base_name(self.transformer)
        parts = _PARTS if name == "WanPipeline" else (*_PARTS, *_SECOND)
        stock = getattr(importlib.import_module("diffusers"), name)
        return stock(**{part: getattr(self, part) for part in parts})

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> RefAMPipeline:
        """Share the parts of a pipeline; nothing is copied or cast.

        Args:
            pipeline: FLUX.1, HunyuanVideo or Wan text-to-image or text-to-video.
            **kwargs: None are known.

        Raises:
            ValueError: Another pipeline.
        """
        if kwargs:
            raise ValueError(f"from_pipe() got {', '.join(kwargs)}; it takes the pipeline alone")
        Backbone(pipeline)  # says what is wrong with it
        if type(pipeline).__name__ not in _BASES.values():
            raise ValueError(
                f"{type(pipeline).__name__}: RefAM takes {', '.join(_BASES.values())}; make one of "
                "them with from_pipe() first"
            )
        return cls(**{name: getattr(pipeline, name, None) for name in (*_PARTS, *_SECOND)})

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        expression: str = "",
        video: Any = None,
        caption: str | Any = None,
        magnets: str | Sequence[str] = "default",
        place: str = "last",
        spatial: bool = True,
        direction: str = "auto",
        sigma: float | None = None,
        draws: int = 1,
        seed: int = 0,
        layers: str | Sequence[int] = "auto",
        sinks: str = "drop",
        sink_rule: SinkRule | Mapping[str, Any] | None = None,
        aggregation: str = "mean",
        blur: float | None = None,
        robust_point: bool = True,
        sam: Segmenter | None = None,
        per_frame: bool = False,
        guidance: float = 1.0,
        max_sequence_length: int | None = None,
        prompt_template: dict[str, Any] | None = None,
    ) -> RefAMOutput:
        """Answer one expression.

        Args:
            image: A picture: PIL image, array ``[height, width(, 3)]`` or tensor
                ``[3, height, width]``, uint8 or in [0, 1].
            expression: What to look for.
            video: A clip instead: pictures, an array ``[frames, height, width(, 3)]``, or a tensor
                ``[frames, 3, height, width]``, see `gen_accel.pipelines.frames.to_frames`. Sizes
                are resized, and frames repeated at the end, to what the model takes.
            caption: What is in the picture, read in front of the expression; a function of the
                frames ``[frames, 3, height, width]`` may make it.
            magnets: Words appended to soak up attention: ``"default"`` (stop words and a colour
                that is not asked for), or a list; empty appends none.
            place: ``"last"`` or ``"first"``.
            spatial: Keep words of place as content.
            direction: ``"text"``, ``"joint"`` or ``"rows"``, see
                `gen_accel.pipelines.refam.heatmap.word_shares`; ``"auto"``: the model's choice, or
                ``"text"``.
            sigma: Noise level in (0, 1); None: the model's choice, or 0.5.
            draws: Noise draws that are averaged.
            seed: Of the first draw.
            layers: Indices of blocks; ``"auto"``: chosen on validation scenes where the model has
                an entry in ``chosen.json``, else ``"middle"``: the middle third of the dual-stream
                blocks, or of all where there are fewer than three of those.
            sinks: Sink tokens: ``"none"``, ``"drop"`` (out of the sums) or ``"redirect"`` (their
                attention counts as the magnets').
            sink_rule: When a token is a sink: a `SinkRule`, or its fields by name.
            aggregation: How word maps are joined, see
                `gen_accel.pipelines.refam.heatmap.aggregate`.
            blur: Of the heatmap, in tokens; None: the model's choice, or 1.
            robust_point: Take the peak inside the largest component.
            sam: A segmenter for the mask, such as `gen_accel.pipelines.refam.sam.Sam2`; without one
                it is Otsu's upper class around the point.
            per_frame: Ask the segmenter in every frame at that frame's peak, instead of carrying
                the anchor frame's mask through the clip.
            guidance: Embedded guidance of distilled models.
            max_sequence_length: Text tokens; None: the pipeline's default.
            prompt_template: HunyuanVideo's; None: the pipeline's default.

        Raises:
            ValueError: Bad input; the message says what to do.
            TypeError: An argument of another type.
        """
        check_number("guidance", guidance)
        check_number("max_sequence_length", max_sequence_length, low=1, whole=True, optional=True)
        backbone = Backbone(
            self._base(),
            guidance=guidance,
            max_sequence_length=max_sequence_length,
            prompt_template=prompt_template,
        )
        for name, value, allowed in (
            ("sinks", sinks, SINKS),
            ("aggregation", aggregation, AGGREGATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose {', '.join(map(repr, allowed))}")
        check_number("draws", draws, low=1, whole=True)
        check_number("seed", seed, whole=True)
        check_number("sigma", sigma, above=0, below=1, optional=True)
        check_number("blur", blur, low=0, optional=True)
        for name, flag in (
            ("spatial", spatial),
            ("robust_point", robust_point),
            ("per_frame", per_frame),
        ):
            check_flag(name, flag)
        if not isinstance(expression, str):
            raise TypeError(f"expression={expression!r}: give a text")
        rule = None if sinks == "none" else _rule(sink_rule)
        if (image is None) == (video is None):
            raise ValueError("give image= or video=, one of them")
        frames = to_frames([image] if video is None else video)
        if callable(caption):
            caption = caption(frames)
        if magnets == "default":
            magnets = default_magnets(expression)
        elif isinstance(magnets, str):
            raise ValueError(f"magnets={magnets!r}: give 'default' or a list of words")
        elif not all(isinstance(word, str) for word in magnets):
            raise TypeError(f"magnets={magnets!r}: give 'default' or a list of words")
        prompt = make_prompt(
            expression, magnets=magnets, caption=caption, place=place, spatial=spatial
        )
        choice = choose(self.transformer, layers, direction)
        direction = choice.direction
        fitted = backbone.fit(frames)
        latents = backbone.encode(fitted[None].to(backbone.device))
        readings = [
            read(
                backbone, latents, [prompt.text], heads=choice.heads,
                sigma=sigma if sigma is not None else choice.sigma,
                seeds=[seed + draw], rows=direction == "rows", joint=direction == "joint",
                rule=rule,
            )
            for draw in range(draws)
        ]  # fmt: skip
        answers = [
            answer(backbone, one, prompt, direction=direction, sinks=sinks, how=aggregation)
            for one in readings
        ]
        maps = normalise(torch.stack([a.maps for a in answers]).mean(0))
        grid = readings[0].grid
        at = backbone.frames(grid, len(frames))
        size = (frames.shape[2], frames.shape[3])
        spread = choice.blur if blur is None else blur
        head = next((i for i, w in enumerate(answers[0].content) if w.head), 0)
        joined = aggregate(maps, head, aggregation)
        heatmap = to_pixels(_stretch(joined), grid, at, size, spread).cpu()
        pixels = to_pixels(maps, grid, at, size, spread).cpu()
        point = find_point(heatmap, robust=robust_point)
        if sam is None:
            mask = otsu_mask(heatmap, point)
        else:
            mask = _segment(sam, frames, heatmap, point, per_frame, robust_point)
        each = torch.stack([_stretch(aggregate(normalise(a.maps), head, aggregation))
                            for a in answers])  # fmt: skip
        self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        return RefAMOutput(
            heatmap=heatmap,
            mask=mask,
            point=point,
            words=dict(zip(_names(answers[0].content), pixels)),
            sinks=answers[0].sinks,
            magnets=tuple(magnets),
            score=float(np.mean([a.score for a in answers])),
            prompt=prompt.text,
            stop_share=float(np.mean([a.stop_share for a in answers])),
            variation=float(each.std(0, correction=0).mean()),
        )


def _base_name(transformer: Any) -> str:
    """The stock pipeline of a transformer.

    Raises:
        ValueError: Another transformer.
    """
    for kind in type(transformer).__mro__:
        if kind.__name__ in _BASES:
            return _BASES[kind.__name__]
    raise ValueError(
        f"{type(transformer).__name__}: RefAM reads FLUX.1, HunyuanVideo and Wan pipelines"
    )


@dataclass(frozen=True)
class Choice:
    """Where a model is read.

    Attributes:
        heads: Blocks, and their heads.
        direction: As in `gen_accel.pipelines.refam.heatmap.word_shares`.
        sigma: Noise level.
        blur: Of the heatmap, in tokens.
        source: Where the choice comes from.
    """

    heads: Heads
    direction: str = "text"
    sigma: float = 0.5
    blur: float = 1.0
    source: str = "given"


def model_key(transformer: Any) -> str:
    """How ``chosen.json`` names a model: class, blocks, heads and their size."""
    config = transformer.config
    return (
        f"{type(transformer).__name__}/{len(block_names(transformer))}x"
        f"{config.num_attention_heads}x{config.attention_head_dim}"
    )


def choose(
    transformer: Any, layers: str | Sequence[int] = "auto", direction: str = "auto"
) -> Choice:
    """Direction, blocks, noise level and blur for a model.

    Noise level and blur that ``chosen.json`` has for the direction hold for other layers too.

    Args:
        transformer: The model.
        layers: As in the call of `RefAMPipeline`.
        direction: Likewise.

    Raises:
        ValueError: No such blocks, no such direction.
        TypeError: No list of blocks.
    """
    if direction not in ("auto", *DIRECTIONS):
        raise ValueError(
            f"direction={direction!r}: choose 'auto', {', '.join(map(repr, DIRECTIONS))}"
        )
    if not isinstance(layers, str):
        check_layers("layers", layers, optional=False)
    names = block_names(transformer)
    table = json.loads((Path(__file__).parent / "chosen.json").read_text(encoding="utf-8"))
    known = table["models"].get(model_key(transformer), {})
    if direction == "auto":
        direction = known.get("direction", "text")
    best = known.get(direction, {})
    levels = {name: best[name] for name in ("sigma", "blur") if name in best}
    if not isinstance(layers, str):
        count = len(names)
        blocks = sorted({b + count if b < 0 else b for b in layers})
        if not blocks or blocks[-1] >= count or blocks[0] < 0:
            raise ValueError(f"layers={list(layers)}: the model has blocks 0 to {count - 1}")
        return Choice(dict.fromkeys(blocks), direction, **levels)
    if layers not in ("auto", "middle"):
        raise ValueError(f"layers={layers!r}: give 'auto', 'middle' or indices of blocks")
    if layers == "auto" and best:
        return Choice(dict.fromkeys(best["blocks"]), direction, **levels, source="validation")
    dual = [i for i, name in enumerate(names) if not name.startswith("single_")]
    blocks = dual if len(dual) >= 3 else list(range(len(names)))
    third = len(blocks) // 3
    return Choice(
        dict.fromkeys(blocks[third : len(blocks) - third]),
        direction,
        **levels,
        source="middle third",
    )


@dataclass(frozen=True, eq=False)
class Answer:
    """The content words' maps of one reading.

    Attributes:
        content: The words.
        maps: ``[words, video]``, not stretched.
        sinks: Names of the sink tokens.
        score: Peak over mean of the mean map.
        stop_share: Share of attention to text that went to stop words and magnets.
    """

    content: tuple[Word, ...]
    maps: Tensor
    sinks: list[str]
    score: float
    stop_share: float


def answer(
    backbone: Backbone,
    reading: Reading,
    prompt: Prompt,
    *,
    direction: str = "text",
    sinks: str = "drop",
    how: str = "mean",
) -> Answer:
    """Filter a reading of one sample: stop words and magnets out, sinks as asked for."""
    words = prompt.words
    table = token_table(backbone, prompt.text, [(w.start, w.end) for w in words])
    content = [i for i, w in enumerate(words) if w.role == "content"]
    own = {t for i in content for t in table[i]}
    video = reading.grid.numel
    found = reading.sinks[0].nonzero().flatten().tolist()
    texts = [s - video for s in found if s >= video]
    blamed = [words[i].text for i in content if set(table[i]) & set(texts)]
    if blamed and sinks != "none":
        log.warning(
            "%s: a sink sits on it; it is kept, other layers= may be better", ", ".join(blamed)
        )
    drop: list[int] = []
    if sinks != "none":
        if direction == "rows":
            drop = [s for s in found if s < video]
        elif sinks == "drop":
            drop = [t for t in texts if t not in own]
        # "redirect" leaves a sink's attention in the sums, as the magnets' attention is.
    maps = word_shares(reading, [table[i] for i in content], direction=direction, drop=drop)
    mean = maps.mean(0)
    rest = [i for i in range(len(words)) if i not in content]
    texts_out = drop if direction != "rows" else []  # there it counts video tokens
    share = word_shares(reading, [table[i] for i in rest], drop=texts_out) if rest else maps[:0]
    sizes = torch.tensor([len(table[i]) for i in rest], dtype=share.dtype, device=share.device)
    names = [_name(s, reading.grid, table, words) for s in found]
    return Answer(
        tuple(words[i] for i in content),
        maps,
        names,
        float(mean.quantile(0.995) / mean.mean().clamp(min=1e-12)),
        float((share * sizes[:, None]).sum(0).mean()),
    )


def ground_video(pipe: Any, video: Any, expression: str, **call: Any) -> Tensor:
    """The mask of what an expression means, for methods that need one (``wipe --expression``).

    Args:
        pipe: FLUX, HunyuanVideo or Wan pipeline.
        video: As for `RefAMPipeline`.
        expression: What to look for.
        **call: Other arguments of `RefAMPipeline`.

    Returns:
        bool ``[frames, height, width]``.

    Raises:
        ValueError: As for `RefAMPipeline`.
    """
    return RefAMPipeline.from_pipe(pipe)(video=video, expression=expression, **call).mask


def _rule(given: SinkRule | Mapping[str, Any] | None) -> SinkRule:
    if isinstance(given, Mapping):
        known = [f.name for f in fields(SinkRule)]
        if strange := [name for name in given if name not in known]:
            raise ValueError(f"sink_rule has {strange}: its fields are {', '.join(known)}")
        return SinkRule(**given)
    if not isinstance(given, SinkRule | None):
        raise TypeError(f"sink_rule={given!r}: give a SinkRule, or its fields by name")
    return given or SinkRule()


def _segment(
    sam: Segmenter,
    frames: Tensor,
    heatmap: Tensor,
    point: tuple[int, int, int],
    per_frame: bool,
    robust: bool,
) -> Tensor:
    def at(frame: int, row: int, column: int) -> Tensor:
        masks, quality = sam.masks(frames[frame], [(row, column)])
        return best_mask(masks.cpu(), quality.cpu(), heatmap[frame])

    if per_frame:
        return torch.stack([
            at(f, *find_point(heatmap[f : f + 1], robust=robust)[1:]) for f in range(len(frames))
        ])  # fmt: skip
    anchor = at(*point)
    return anchor[None] if len(frames) == 1 else sam.track(frames, point[0], anchor)


def _stretch(heatmap: Tensor) -> Tensor:
    return normalise(heatmap[None])[0]


def _names(words: Sequence[Word]) -> list[str]:
    """Words as keys; a word that comes twice gets its number."""
    seen: dict[str, int] = {}
    out = []
    for word in words:
        seen[word.text] = seen.get(word.text, 0) + 1
        out.append(word.text if seen[word.text] == 1 else f"{word.text} {seen[word.text]}")
    return out


def _name(sink: int, grid: Any, table: Sequence[Sequence[int]], words: Sequence[Word]) -> str:
    if sink < grid.numel:
        frame, place = divmod(sink, grid.height * grid.width)
        return f"video {(frame, *divmod(place, grid.width))}"
    token = sink - grid.numel
    for word, tokens in zip(words, table):
        if token in tokens:
            return word.text
    return f"text token {token}"
