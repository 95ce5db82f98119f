"""What a removal left behind and what it cost: TokSim, background PSNR, flicker in the mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.eval.clips import over_frames, over_pairs
from gen_accel.eval.fidelity import decibels
from gen_accel.eval.metric import Metric

_PAD = 24  # pixels around the object, TokSim's

# Crops [n, channels, height, width] in [0, 1] to patch tokens [n, rows, columns, features].
Tokens = Callable[[Tensor], Tensor]


def tok_sim(
    video: Tensor,
    reference: Tensor,
    mask: Tensor,
    network: Tokens,
    *,
    per_frame: bool = False,
) -> Tensor:
    """TokSim of Object-WIPER (arXiv 2601.06391), re-implemented after the authors' script.

    For each pair of neighbours, ``U`` is the union of the two masks, and the frames are cropped to
    its bounding box plus 24 pixels. Over the unit patch tokens ``P`` of the result and ``G`` of the
    input: ``100 mean_i (P_f,i . P_f+1,i) (mean_b P_f,i . P_f,b) (1 - P_f,i . G_f,i)``, ``i`` in
    ``U``, ``b`` outside ``U`` in the same crop. The last product is that of its mean over mask f
    for tokens that are in mask f + 1 only. Nothing is clamped.

    A pair that has no tokens for one of the means (empty mask f or union, no background in the
    crop) has no value and is left out; the script crashes or returns NaN there. It also cuts clips
    to 24 frames, which is left to the caller.

    It rewards flat paint (a crop of one colour scores ``100 (1 - eta)``, above every published
    result) and never looks further than 24 pixels from the object: shadows and reflections there
    are not seen. Read it beside `background_psnr`. With the effects' masks added to ``mask`` it is
    our extension, not the paper's.

    Args:
        video: Result, ``[frames, channels, height, width]`` or with a batch in front; uint8, or
            float in [0, 1].
        reference: The input, with the object; the same shape.
        mask: The object, bool ``[frames, height, width]``.
        network: Crops to patch tokens, of any length; see `gen_accel.eval.dino.Dino.tokens`. The
            paper's is DINOv3 ViT-S/16.
        per_frame: Return the value of every pair, NaN where it has none.

    Returns:
        One value per clip: 0-D, or ``[batch]``; with ``per_frame`` ``[frames - 1]`` behind that.

    Raises:
        ValueError: Shapes differ, values are outside [0, 1], there is one frame only, or no pair of
            a clip has a value.
    """

    def of_pair(
        now: Tensor, after: Tensor, input_: Tensor, _: Tensor, object_: Tensor, next_: Tensor
    ) -> Tensor:
        union = object_ | next_
        if not union.any():
            return _none(now)
        rows, columns = _crop(union)
        tokens = network(torch.stack([now, after, input_])[..., rows, columns].float())
        p, p_next, g = F.normalize(tokens.double().to(now.device), dim=-1).flatten(1, 2)
        grid = tokens.shape[1:3]
        inside, first = (_to_tokens(m[rows, columns], grid) for m in (union, object_))
        if not first.any() or inside.all():
            return _none(now)
        consistency = (p * p_next).sum(-1)[inside]
        coherence = p[inside] @ p[~inside].mean(0)
        kept = (p * g).sum(-1)
        kept = torch.where(first, kept, kept[first].mean())[inside]
        return 100 * (consistency * coherence * (1 - kept)).mean()

    values = over_pairs(of_pair, video, reference, _bool(mask))
    return values if per_frame else _mean(values, "tok_sim", "an object with background around it")


def background_psnr(
    video: Tensor, reference: Tensor, mask: Tensor, *, per_frame: bool = False
) -> Tensor:
    """PSNR in dB over the pixels outside the mask, at most 100 per frame, mean over frames.

    The paper's table has a column of this name; its exact definition was not to be found.

    Args:
        video: Result, ``[frames, channels, height, width]`` or with a batch in front; uint8, or
            float in [0, 1].
        reference: What the background should be, the same shape.
        mask: What was to change, bool ``[frames, height, width]``: the object and its effects.
        per_frame: Return the value of every frame, NaN where the mask covers all of it.

    Returns:
        One value per clip: 0-D, or ``[batch]``; with ``per_frame`` ``[frames]`` behind that.

    Raises:
        ValueError: Shapes differ, values are outside [0, 1], or no frame has a background.
    """

    def of_frame(frame: Tensor, wanted: Tensor, covered: Tensor) -> Tensor:
        error = (frame - wanted).square().mean(0)
        return decibels(error[~covered].mean()) if not covered.all() else _none(frame)

    values = over_frames(of_frame, video, reference, _bool(mask))
    return values if per_frame else _mean(values, "background_psnr", "pixels outside the mask")


def foreground_flicker(video: Tensor, mask: Tensor, *, per_frame: bool = False) -> Tensor:
    """`gen_accel.eval.temporal.flicker` inside the union of the two masks of each pair.

    Our definition: FG-flicker is named in reports on the paper, and not defined there.

    Args:
        video: ``[frames, channels, height, width]`` or with a batch in front, at least two frames;
            uint8, or float in [0, 1].
        mask: Where the object was, bool ``[frames, height, width]``.
        per_frame: Return the value of every pair, NaN where both masks are empty.

    Returns:
        One value per clip, 1 for a still: 0-D, or ``[batch]``; with ``per_frame`` ``[frames - 1]``
        behind that.

    Raises:
        ValueError: Shapes differ, values are outside [0, 1], there is one frame only, or all masks
            of a clip are empty.
    """

    def of_pair(now: Tensor, after: Tensor, object_: Tensor, next_: Tensor) -> Tensor:
        union = object_ | next_
        change = (after - now).abs().mean(0)
        return 1 - change[union].mean() if union.any() else _none(now)

    values = over_pairs(of_pair, video, _bool(mask))
    return values if per_frame else _mean(values, "foreground_flicker", "pixels inside the mask")


def _crop(union: Tensor) -> tuple[slice, slice]:
    """Bounding box plus the pad. The authors' upper bounds are exclusive ends: one pixel less."""

    def along(hit: Tensor) -> slice:
        places = hit.nonzero()
        low, high = int(places.min()), int(places.max())
        return slice(max(0, low - _PAD), max(min(len(hit) - 1, high + _PAD), low + 1))

    return along(union.any(1)), along(union.any(0))


def _to_tokens(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """Nearest pixel of each token, flat."""
    return F.interpolate(mask[None, None].float(), tuple(grid)).flatten() > 0


def _bool(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask of dtype {mask.dtype}: expected bool; compare with a threshold")
    return mask


def _none(frame: Tensor) -> Tensor:
    return frame.new_tensor(torch.nan)


def _mean(values: Tensor, name: str, what: str) -> Tensor:
    """Mean over the frames that have a value."""
    if values.isnan().all(-1).any():
        raise ValueError(f"{name}: no frame of a clip has {what}; leave this clip out")
    return values.nanmean(-1)


METRICS = (
    Metric(
        "tok_sim", tok_sim, "", "higher",
        "100 x consistency x coherence x change of the tokens in the mask (Object-WIPER)",
        network="dino-tokens",
    ),
    Metric(
        "background_psnr", background_psnr, "dB", "higher",
        "PSNR over the pixels outside the mask, at most 100 dB per frame, mean",
    ),
    Metric(
        "foreground_flicker", foreground_flicker, "", "higher",
        "1 - mean |v[t+1] - v[t]| inside the mask, 1 for a still",
    ),
)  # fmt: skip
