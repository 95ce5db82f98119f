"""Where the words of a prompt stand among the text tokens that a transformer sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]


def find_word(prompt: str, word: str) -> list[Span]:
    """Character spans of a word or phrase, whole words only, case ignored.

    Args:
        prompt: Text.
        word: ``"ball"``, ``"red ball"``.

    Returns:
        ``(start, end)`` of every occurrence, at least one.

    Raises:
        ValueError: The word is empty or not in the prompt.
    """
    if not word.strip():
        raise ValueError(f"query word {word!r} is empty; name words of the prompt")
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, word.split())) + r"(?!\w)"
    spans = [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)]
    if not spans:
        raise ValueError(f"query word {word!r} is not in the prompt {prompt!r}; name words of it")
    return spans


def text_spans(
    pipe: Any,
    prompt: str,
    *,
    max_sequence_length: int | None = None,
    prompt_template: dict[str, Any] | None = None,
) -> list[Span | None]:
    """The characters of the prompt behind each text token of the transformer.

    The position in the sequence is found from the tokenizer's offsets, never by counting words:
    HunyuanVideo's encoder reads a template around the prompt and cuts the template's head off.

    Args:
        pipe: A HunyuanVideo, Wan or FLUX pipeline.
        prompt: Text, as given to the pipeline.
        max_sequence_length: As given to the pipeline; None: its default.
        prompt_template: HunyuanVideo's, as given to the pipeline; None: its default.

    Returns:
        One entry per text token that is not padding: a character span of ``prompt``, or None for
        special tokens and the rest of a template.

    Raises:
        ValueError: A pipeline of another kind, a tokenizer without offsets, or a prompt that is
            longer than ``max_sequence_length``.
    """
    kind = type(pipe.transformer).__name__
    tokenizer, text, start, crop, room = pipe.tokenizer, prompt, 0, 0, 512
    if kind.startswith("HunyuanVideo"):
        text, start, crop = _in_template(pipe, prompt, prompt_template)
        room = 256
    elif kind.startswith("Flux"):
        tokenizer = pipe.tokenizer_2
    elif kind.startswith("Wan"):
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        if prompt_clean(prompt) != prompt:
            raise ValueError(
                f"prompt {prompt!r}: Wan reads {prompt_clean(prompt)!r}; pass that, for its "
                "words to be located"
            )
    else:
        raise ValueError(f"{kind}: words are located for HunyuanVideo, Wan and FLUX only")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} has no offsets; load the fast tokenizer")
    room = max_sequence_length or room
    offsets: Sequence[Span] = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) - crop > room:
        raise ValueError(
            f"the prompt has {len(offsets) - crop} tokens and max_sequence_length={room}; shorten "
            "it or raise max_sequence_length"
        )
    end = start + len(prompt)
    return [(a - start, b - start) if start <= a < b <= end else None for a, b in offsets[crop:]]


def word_tokens(spans: Sequence[Span | None], where: Sequence[Span]) -> tuple[int, ...]:
    """Text tokens that share a character with one of the spans; a word may have several.

    Args:
        spans: From `text_spans`.
        where: Character spans, from `find_word` say.
    """
    return tuple(
        i
        for i, span in enumerate(spans)
        if span is not None and any(span[0] < end and start < span[1] for start, end in where)
    )


def _in_template(pipe: Any, prompt: str, template: dict[str, Any] | None) -> tuple[str, int, int]:
    """What HunyuanVideo's encoder reads, where the prompt begins in it, tokens that are cut off."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    chosen: dict[str, Any] = template or dict(DEFAULT_PROMPT_TEMPLATE)
    head = chosen["template"].partition("{}")[0].format()
    crop = chosen.get("crop_start")
    if crop is None:  # the pipeline counts the end token and the braces off
        crop = len(pipe.tokenizer(chosen["template"])["input_ids"]) - 2
    return chosen["template"].format(prompt), len(head), crop
