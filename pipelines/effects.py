"""Where an object's effects are: shadow, reflection, glow, trail, from a generator's attention.

Stage A of Object-WIPER. The words of the query propose tokens (cross-attention), the tokens that
attend to the proposal complete it (self-attention).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gen_accel.pipelines.checks import check_flag, check_layers, check_number
from gen_accel.pipelines.flow import Text, VideoFlow
from gen_accel.pipelines.masks import dilate, otsu, touching
from gen_accel.pipelines.probe import Call, probe

RULES = ("otsu", "deviation")
REGIONS = ("object+proposal", "proposal", "object")


@dataclass(frozen=True, kw_only=True)
class EffectSetting:
    """How effects are found. Nothing of this was published but the two thresholds.

    Args:
        sigma: Noise level the words are read at.
        response_sigma: Noise level the self-attention is read at.
        word_layers: Layers that words are read in; None: the middle third.
        response_layers: Layers that self-attention is read in; None: the middle third.
        clip: Quantile above which values count as it, before Otsu; sinks spoil it otherwise.
        word_contrast: A word proposes nothing unless the tokens it would propose get this many
            times the attention of the rest, on average.
        region: What self-attention is asked about: ``"object+proposal"``, ``"proposal"`` or
            ``"object"``.
        rule: Threshold of the response: ``"otsu"``, or ``"deviation"``, mean plus half a standard
            deviation (OmnimatteZero's).
        contrast: There is no effect unless its tokens respond this many times as much as the rest.
        attached: Keep only components that touch the object, of proposals and of the effect.
        grow: Tokens to dilate the effect by.
        max_area: Largest effect, in areas of the object; one that is larger is dropped.
    """

    sigma: float = 0.5
    response_sigma: float = 0.5
    word_layers: tuple[int, ...] | None = None
    response_layers: tuple[int, ...] | None = None
    clip: float = 0.995
    word_contrast: float = 0.0
    region: str = "object+proposal"
    rule: str = "otsu"
    contrast: float = 0.0
    attached: bool = False
    grow: int = 0
    max_area: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r}: choose one of {', '.join(RULES)}")
        if self.region not in REGIONS:
            raise ValueError(f"region={self.region!r}: choose one of {', '.join(REGIONS)}")
        for name in ("sigma", "response_sigma"):
            check_number(name, getattr(self, name), low=0, below=1)
        for name in ("word_layers", "response_layers"):
            check_layers(name, getattr(self, name))
        check_number("clip", self.clip, low=0, high=1)
        for name in ("word_contrast", "contrast"):
            check_number(name, getattr(self, name), low=0)
        check_flag("attached", self.attached)
        check_number("grow", self.grow, low=0, whole=True)
        check_number("max_area", self.max_area, low=0, optional=True)


@dataclass
class Effects:
    """What was found, on the token grid.

    Attributes:
        mask: bool ``[batch, *grid]``, the effect outside the object.
        proposal: bool ``[batch, *grid]``, tokens the words proposed.
        words: ``[batch, *grid]`` maps of the words, mean over them; 1 is the uniform map.
        response: ``[batch, *grid]`` share of each token's attention that goes to the region.
        guards: For each clip, what kept tokens out of the mask.
    """

    mask: Tensor
    proposal: Tensor
    words: Tensor
    response: Tensor
    guards: list[list[str]] = field(default_factory=list)


def find_effects(
    flow: VideoFlow,
    latents: Tensor,
    text: Text,
    queries: Sequence[Sequence[Sequence[int]]],
    object_: Tensor,
    setting: EffectSetting,
    noise: Tensor,
) -> Effects:
    """Find what the object casts; two forwards of the transformer.

    Args:
        flow: The model.
        latents: ``[batch, channels, frames, height, width]``, of the clean video.
        text: Of prompts that name the object and its effects.
        queries: For each clip, for each word of the query its text tokens.
        object_: bool ``[batch, *grid]``, the object.
        setting: How.
        noise: Shape of ``latents``.
    """

    def look(sigma: float, read: Callable[[Call], Tensor | None], layers: frozenset[int]) -> Tensor:
        noisy = (1 - sigma) * latents + sigma * noise
        flow.announce([sigma])
        with probe(flow.pipe.transformer, read, sorted(layers)) as seen:
            flow.velocity(noisy, sigma, text)
        return torch.stack([maps for maps in seen if maps is not None]).mean(0)

    words = look(setting.sigma, WordMaps(queries).read, middle(flow.layers, setting.word_layers))
    flat, near = object_.flatten(1), dilate(object_, frames=True)
    guards: list[list[str]] = [[] for _ in queries]
    proposal = torch.zeros_like(flat)
    for clip, maps in enumerate(words):
        for number, values in enumerate(maps[: len(queries[clip])]):
            chosen, contrast = split(values, "otsu", setting.clip)
            if contrast < setting.word_contrast:
                guards[clip].append(f"word {number} looks everywhere, it proposes nothing")
            else:
                proposal[clip] |= chosen
    if setting.attached:
        proposal = touching(proposal.view_as(object_), near).flatten(1)
    region = {"proposal": proposal, "object": flat}.get(setting.region, flat | proposal)
    share = look(
        setting.response_sigma,
        response(region[..., None]),
        middle(flow.layers, setting.response_layers),
    )[:, 0]
    mask = outside(share, flat, setting.rule, setting.clip, setting.contrast)
    _note(guards, ~mask.any(1), "the response is even, there is no effect")
    mask = dilate(mask.view_as(object_), setting.grow) & ~object_
    if setting.attached:
        kept = touching(mask, near)
        _note(guards, (kept != mask).flatten(1).any(1), "components apart from the object dropped")
        mask = kept
    if setting.max_area is not None:
        large = mask.flatten(1).sum(1) > setting.max_area * flat.sum(1)
        _note(guards, large, "effect larger than max_area dropped")
        mask = mask & ~large[:, None, None, None]
    mean = torch.stack([m[: len(query)].mean(0) for m, query in zip(words, queries)])
    return Effects(
        mask, proposal.view_as(object_), mean.view(object_.shape), share.view(object_.shape), guards
    )


def outside(
    share: Tensor,
    object_: Tensor,
    rule: str,
    clip: float,
    contrast: float,
) -> Tensor:
    """Tokens that respond to the object and are not of it, which would set the scale.

    Args:
        share: ``[batch, tokens]`` responses.
        object_: bool ``[batch, tokens]``.
        rule: As for `split`.
        clip: As for `split`.
        contrast: They must respond this many times as much as the rest, or there are none.
    """
    mask = torch.zeros_like(object_)
    for found, values, inside in zip(mask, share, object_):
        if not inside.all():
            chosen, reached = split(values[~inside], rule, clip)
            found[~inside] = chosen & (reached >= contrast)
    return mask


def split(values: Tensor, rule: str, clip: float) -> tuple[Tensor, float]:
    """What of ``[n]`` lies above the threshold, and how many times the rest it is on average.

    Args:
        values: Not negative.
        rule: ``"otsu"`` or ``"deviation"``.
        clip: Quantile above which values count as it, before Otsu.
    """
    if rule == "otsu":
        threshold, _ = otsu(values, clip)
    else:
        threshold = values.mean() + 0.5 * values.std(correction=0)
    chosen = values > threshold
    if not chosen.any():
        return chosen, 0.0
    return chosen, float(values[chosen].mean() / values[~chosen].mean().clamp(min=1e-12))


class WordMaps:
    """Reads how the words of a query look at the video tokens.

    Args:
        queries: For each clip, for each word its text tokens; sub-tokens are averaged.
    """

    def __init__(self, queries: Sequence[Sequence[Sequence[int]]]) -> None:
        words = max(len(query) for query in queries)
        longest = max(sum(len(word) for word in query) for query in queries)
        self.tokens = torch.zeros(len(queries), longest, dtype=torch.long)
        self.weights = torch.zeros(len(queries), words, longest)
        for clip, query in enumerate(queries):
            place = 0
            for number, word in enumerate(query):
                end = place + len(word)
                self.tokens[clip, place:end] = torch.tensor(word)
                self.weights[clip, number, place:end] = 1 / len(word)
                place = end

    def read(self, call: Call) -> Tensor | None:
        """Head mean ``[batch, words, tokens]``; 1 is the uniform map."""
        if call.kind == "self":
            return None
        maps = call.from_text(self.tokens).mean(1) * call.grid.numel
        return self.weights.to(maps) @ maps


def response(columns: Tensor) -> Callable[[Call], Tensor | None]:
    """Reads how much of each video token's attention to the video goes to some of its tokens.

    Args:
        columns: ``[batch, tokens, columns]``, sets of video tokens.

    Returns:
        A reader of head means ``[batch, columns, tokens]``.
    """

    def read(call: Call) -> Tensor | None:
        if call.kind == "cross":
            return None
        shares = call.share(call.columns(video=columns), keys="video")
        return shares.mean(1).movedim(-1, 1)

    return read


def middle(layers: int, chosen: Sequence[int] | None) -> frozenset[int]:
    """The chosen layers, or the middle third.

    Raises:
        ValueError: One that is not there.
    """
    if chosen is None:
        return frozenset(range(layers // 3, max(layers // 3 + 1, 2 * layers // 3)))
    if not chosen or not all(0 <= layer < layers for layer in chosen):
        raise ValueError(f"layers={tuple(chosen)}: the transformer has layers 0 to {layers - 1}")
    return frozenset(chosen)


def _note(guards: list[list[str]], fired: Tensor, what: str) -> None:
    for clip in fired.nonzero().flatten().tolist():
        guards[clip].append(what)
