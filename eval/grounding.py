"""How well masks and maps answer an expression: region, boundary and ranking measures."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.eval.metric import Metric, mean


def areas(prediction: Tensor, target: Tensor) -> Tensor:
    """Pixels of intersection and union, ``[2]``, or ``[batch, 2]``.

    Args:
        prediction: Mask, bool ``[frames, height, width]`` or with a batch in front; an image is a
            clip of one frame.
        target: The same shape.

    Raises:
        ValueError: Shapes differ, or a mask is not bool.
    """
    prediction, target = _masks(prediction, target)
    both = torch.stack([prediction & target, prediction | target])
    return both.flatten(-3).sum(-1).double().movedim(0, -1)


def iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of each sample's pixels, all frames together; 1 for empty and empty.

    Args:
        prediction: As for `areas`.
        target: The same shape.

    Returns:
        0-D, or ``[batch]``.

    Raises:
        ValueError: As for `areas`.
    """
    return _ratio(*areas(prediction, target).unbind(-1))


def iou_of_targets(prediction: Tensor, target: Tensor) -> Tensor:
    """`iou`, and NaN for samples without a target, which mIoU leaves out."""
    values = iou(prediction, target)
    return torch.where(target.flatten(-3).any(-1), values, torch.nan)


def region_similarity(prediction: Tensor, target: Tensor, *, per_frame: bool = False) -> Tensor:
    """J of DAVIS: intersection over union per frame, mean over frames; 1 where both are empty.

    DAVIS leaves out the first and the last frame of a clip; this takes all it is given.

    Args:
        prediction: As for `areas`.
        target: The same shape.
        per_frame: Return the value of every frame.

    Returns:
        0-D, or ``[batch]``; with ``per_frame`` ``[frames]`` behind that.

    Raises:
        ValueError: As for `areas`.
    """
    prediction, target = _masks(prediction, target)
    shared = (prediction & target).flatten(-2).sum(-1).double()
    values = _ratio(shared, (prediction | target).flatten(-2).sum(-1).double())
    return values if per_frame else values.mean(-1)


def boundary_accuracy(prediction: Tensor, target: Tensor, *, per_frame: bool = False) -> Tensor:
    """F of DAVIS: harmonic mean of the boundaries' precision and recall, mean over frames.

    A boundary pixel counts as matched within a disk of ``ceil(0.008 diagonal)`` pixels of the other
    boundary. 1 where neither has a boundary, 0 where one has none. Arguments and errors as for
    `region_similarity`.
    """
    prediction, target = _masks(prediction, target)
    drawn, wanted = _boundary(prediction), _boundary(target)
    radius = math.ceil(0.008 * math.hypot(*prediction.shape[-2:]))
    count, total = (x.flatten(-2).sum(-1).double() for x in (drawn, wanted))
    precise = (drawn & _dilate(wanted, radius)).flatten(-2).sum(-1) / count
    recalled = (wanted & _dilate(drawn, radius)).flatten(-2).sum(-1) / total
    values = 2 * precise * recalled / (precise + recalled)
    values = torch.where(count + total == 0, 1.0, values.nan_to_num(0.0))
    return values if per_frame else values.mean(-1)


def j_and_f(prediction: Tensor, target: Tensor, *, per_frame: bool = False) -> Tensor:
    """J&F of DAVIS: mean of `region_similarity` and `boundary_accuracy`; arguments as there."""
    j = region_similarity(prediction, target, per_frame=per_frame)
    return (j + boundary_accuracy(prediction, target, per_frame=per_frame)) / 2


def pointing(prediction: Tensor, target: Tensor) -> Tensor:
    """Whether the peak of a map lies in the target; tied peaks count by their share inside.

    So a constant map scores the target's area, as chance does.

    Args:
        prediction: Map, float ``[frames, height, width]`` or with a batch in front.
        target: Mask, bool, the same shape.

    Returns:
        In [0, 1]: 0-D, or ``[batch]``.

    Raises:
        ValueError: Shapes differ, ``target`` is not bool or has no pixel, or the map is not finite.
    """
    prediction, target = _map(prediction, target)
    peak = prediction == prediction.amax(-1, keepdim=True)
    return (peak & target).sum(-1).double() / peak.sum(-1)


def average_precision(prediction: Tensor, target: Tensor) -> Tensor:
    """Area under precision over recall of a map as a ranking of pixels, ties taken together.

    ``sum (R_n - R_{n-1}) P_n`` over the distinct values, largest first: scikit-learn's. Chance
    scores the target's area. Arguments and errors as for `pointing`.
    """
    prediction, target = _map(prediction, target)
    values = [
        _average_precision(score, label)
        for score, label in zip(prediction.reshape(-1, prediction.shape[-1]), _rows(target))
    ]
    return torch.stack(values).view(prediction.shape[:-1])


def _average_precision(score: Tensor, label: Tensor) -> Tensor:
    order = score.argsort(descending=True, stable=True)
    score, hits = score[order], label[order].double().cumsum(0)
    last = torch.ones_like(score, dtype=torch.bool)
    last[:-1] = score[1:] != score[:-1]  # a threshold takes in all equal scores
    hits, taken = hits[last], last.nonzero().flatten() + 1
    gained = torch.diff(hits, prepend=hits.new_zeros(1))
    return (gained * hits / taken).sum() / hits[-1]


def _boundary(mask: Tensor) -> Tensor:
    """Pixels that differ from the one to the right, below or diagonally below."""
    padded = F.pad(mask.double(), (0, 1, 0, 1), mode="replicate").bool()
    here = padded[..., :-1, :-1]
    right, below = padded[..., :-1, 1:], padded[..., 1:, :-1]
    return (here ^ right) | (here ^ below) | (here ^ padded[..., 1:, 1:])


def _dilate(mask: Tensor, radius: int) -> Tensor:
    """Whether a disk around the pixel holds one that is set."""
    offset = torch.arange(-radius, radius + 1, device=mask.device)
    disk = (offset[:, None] ** 2 + offset**2 <= radius**2).float()
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return (F.conv2d(flat, disk[None, None], padding=radius) > 0.5).view(mask.shape)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 1.0)


def _masks(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.dtype != torch.bool:
        raise ValueError(f"prediction of dtype {prediction.dtype}: expected a bool mask; compare "
                         "the map with a threshold")  # fmt: skip
    return _pair(prediction, target)


def _map(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of a sample in one axis."""
    prediction, target = _pair(prediction, target)
    if not (prediction.is_floating_point() and bool(prediction.isfinite().all())):
        raise ValueError(f"map of dtype {prediction.dtype}: expected finite floats")
    if not target.flatten(-3).any(-1).all():
        raise ValueError("a target without a pixel: a map cannot point at nothing; leave it out")
    return prediction.flatten(-3), target.flatten(-3)


def _pair(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if target.dtype != torch.bool:
        raise ValueError(f"target of dtype {target.dtype}: expected a bool mask")
    if prediction.shape != target.shape or target.ndim not in (3, 4) or 0 in target.shape:
        raise ValueError(
            f"shapes {tuple(prediction.shape)} and {tuple(target.shape)}: expected two equal ones, "
            "[frames, height, width] or a batch of those; unsqueeze(0) makes an image a clip"
        )
    return prediction, target.to(prediction.device)


def _rows(mask: Tensor) -> Tensor:
    return mask.reshape(-1, mask.shape[-1])


def _overall(sums: Tensor) -> Tensor:
    return _ratio(*sums.sum(0))


def _mean_of_targets(values: Tensor) -> Tensor:
    if values.isnan().all():
        raise ValueError("miou: no sample has a target; giou also counts those without")
    return values.nanmean()


def _metric(
    name: str,
    function: Callable[..., Tensor],
    definition: str,
    pool: Callable[[Tensor], Tensor] = mean,
    axes: int = 0,
) -> Metric:
    return Metric(name, function, "", "higher", definition, pool=pool, axes=axes)


METRICS = (
    _metric(
        "oiou", areas, "sum of intersections / sum of unions over all samples (also cIoU)",
        _overall, 1,
    ),
    _metric("miou", iou_of_targets, "mean IoU of the samples that have a target", _mean_of_targets),
    _metric("giou", iou, "mean IoU of all samples, 1 where nothing was asked for and found"),
    _metric("j", region_similarity, "IoU per frame, mean over frames (DAVIS)"),
    _metric("f", boundary_accuracy, "boundary precision and recall within 0.8 % of the diagonal"),
    _metric("j_and_f", j_and_f, "mean of J and F (DAVIS)"),
    _metric("pointing", pointing, "share of maps whose peak lies in the target"),
    _metric("average_precision", average_precision, "map as a ranking of pixels, mean over maps"),
)  # fmt: skip
