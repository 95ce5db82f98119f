"""Consistency over time: flicker, warping error, motion against the reference, subject."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.eval.clips import over_frames, over_pairs
from gen_accel.eval.metric import Metric

# Two frames [channels, height, width] in [0, 1] -> flow [2, height, width] from the first to the
# second, (x, y) in pixels: first[y, x] looks like second[y + flow[1], x + flow[0]].
Flow = Callable[[Tensor, Tensor], Tensor]

_SMALLEST, _FULL = 12, 128  # pixels; below 12, DIS has no place for its 8x8 patches


def dis_flow(first: Tensor, second: Tensor) -> Tensor:
    """Dense inverse search (Kroeger et al. 2016) by OpenCV, medium preset.

    The preset stops at half resolution; frames of less than 128 pixels are searched in full.

    Args:
        first: Frame ``[channels, height, width]``, 1 or 3 channels, float in [0, 1].
        second: Likewise.

    Returns:
        ``[2, height, width]``, (x, y) in pixels.

    Raises:
        ValueError: Frames are smaller than 12 pixels.
    """
    import cv2

    if min(first.shape[-2:]) < _SMALLEST:
        raise ValueError(
            f"frames of {first.shape[-2]}x{first.shape[-1]} pixels: DIS flow needs at least "
            f"{_SMALLEST}x{_SMALLEST}; resize first or pass another flow"
        )
    search: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    if min(first.shape[-2:]) < _FULL:
        search.setFinestScale(0)  # halves the error there, and takes five times as long
    # Rec. 601, as cv2.cvtColor.
    weights = first.new_tensor([0.299, 0.587, 0.114])[:, None, None] if len(first) == 3 else 1
    grey = [((f * weights).sum(0) * 255).round().byte().cpu().numpy() for f in (first, second)]
    return torch.from_numpy(search.calc(*grey, None)).permute(2, 0, 1).to(first.device)


def warp(frame: Tensor, flow: Tensor) -> Tensor:
    """``frame[y + flow[1], x + flow[0]]``, bilinear, the edge repeated outside.

    Args:
        frame: ``[channels, height, width]``.
        flow: ``[2, height, width]``, (x, y) in pixels.
    """
    height, width = frame.shape[-2:]
    x, y = _targets(flow.to(frame))
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], -1)
    return F.grid_sample(frame[None], grid[None], padding_mode="border", align_corners=True)[0]


def visible(forward: Tensor, backward: Tensor) -> Tensor:
    """Where the first frame can be compared with the second warped to it, bool ``[height, width]``.

    Lai et al. 2018 (their ``detect_occlusion``): not where forward flow and warped backward flow
    disagree, ``|f + b|^2 > 0.01 (|f|^2 + |b|^2) + 0.5``, and not on motion boundaries,
    ``|grad f|^2 > 0.01 |f|^2 + 0.002``. Ours in addition: not where the flow leaves the frame,
    where there is nothing to compare with.

    Args:
        forward: Flow of the first frame to the second, ``[2, height, width]`` in pixels.
        backward: Flow of the second to the first.
    """
    back = warp(backward, forward)
    size = _square(forward)
    agrees = _square(forward + back) <= 0.01 * (size + _square(back)) + 0.5
    along, down = torch.zeros_like(forward), torch.zeros_like(forward)
    along[..., :-1] = forward[..., 1:] - forward[..., :-1]
    down[..., :-1, :] = forward[..., 1:, :] - forward[..., :-1, :]
    smooth = _square(along) + _square(down) <= 0.01 * size + 0.002
    x, y = _targets(forward)
    height, width = forward.shape[-2:]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return agrees & smooth & inside


def warp_error(
    video: Tensor, reference: Tensor, flow: Flow = dis_flow, *, per_frame: bool = False
) -> Tensor:
    """Warping error of Lai et al. 2018, with the *reference's* motion and visibility.

    ``sum M |W(v[t+1]) - v[t]|^2 / sum M`` over pixels and channels, mean over pairs; 0 for a pair
    where nothing is visible. A video cannot lower it by moving less than it should.

    Args:
        video: ``[frames, channels, height, width]`` or with a batch in front, at least two frames;
            uint8, or float in [0, 1].
        reference: The same shape; the video itself where there is no other.
        flow: Two frames to a flow, see `dis_flow`. The original used FlowNet2.
        per_frame: Return the value of every pair of neighbours.

    Returns:
        One value per clip: 0-D, or ``[batch]``; with ``per_frame`` ``[frames - 1]`` behind that.

    Raises:
        ValueError: Shapes differ, values are outside [0, 1], or there is one frame only.
    """
    return _warped(video, reference, flow, per_frame, torch.square)


def flicker_compensated(
    video: Tensor, reference: Tensor, flow: Flow = dis_flow, *, per_frame: bool = False
) -> Tensor:
    """`flicker` along the reference's motion: ``1 - sum M |W(v[t+1]) - v[t]| / sum M``.

    What moves as in the reference costs nothing, so that unlike `flicker` it does not reward
    stillness. Arguments, shapes and errors as for `warp_error`.
    """
    return 1 - _warped(video, reference, flow, per_frame, torch.abs)


def flicker(video: Tensor, *, per_frame: bool = False) -> Tensor:
    """VBench's temporal flickering: ``1 - mean |v[t+1] - v[t]|`` over pixels, channels and pairs.

    1 for a still, 0 for alternating black and white. Motion lowers it, so compare it with the
    reference's own value, or see `flicker_compensated`.

    Args:
        video: ``[frames, channels, height, width]`` or with a batch in front, at least two frames;
            uint8, or float in [0, 1].
        per_frame: Return the value of every pair of neighbours.

    Returns:
        One value per clip: 0-D, or ``[batch]``; with ``per_frame`` ``[frames - 1]`` behind that.

    Raises:
        ValueError: Values are outside [0, 1], or there is one frame only.
    """
    values = 1 - over_pairs(lambda now, after: (after - now).abs().mean(), video)
    return values if per_frame else values.mean(-1)


def tof(
    video: Tensor, reference: Tensor, flow: Flow = dis_flow, *, per_frame: bool = False
) -> Tensor:
    """Motion error tOF (Chu et al. 2020): mean distance between two flows, in pixels.

    The flows are the video's own and the reference's. TecoGAN's script estimates by Farneback and
    leaves out a margin and the first and last two frames; this takes all. Arguments, shapes and
    errors as for `warp_error`.
    """

    def distance(now: Tensor, after: Tensor, ref_now: Tensor, ref_after: Tensor) -> Tensor:
        return (flow(now, after) - flow(ref_now, ref_after)).double().norm(dim=0).mean()

    values = over_pairs(distance, video, reference)
    return values if per_frame else values.mean(-1)


def subject_consistency(
    video: Tensor, network: Callable[[Tensor], Tensor], *, per_frame: bool = False
) -> Tensor:
    """VBench's: mean over t > 0 of ``(max(0, cos(e[t-1], e[t])) + max(0, cos(e[0], e[t]))) / 2``.

    Args:
        video: ``[frames, channels, height, width]`` or with a batch in front, at least two frames;
            uint8, or float in [0, 1].
        network: Frames ``[n, channels, height, width]``, float in [0, 1], to vectors
            ``[n, features]``. VBench's is DINO ViT-B/16, see `gen_accel.eval.dino.Dino`.
        per_frame: Return the value of every frame but the first.

    Returns:
        One value per clip: 0-D, or ``[batch]``; with ``per_frame`` ``[frames - 1]`` behind that.

    Raises:
        ValueError: Values are outside [0, 1], or there is one frame only.
    """
    vectors = over_frames(lambda frame: network(frame.float()[None])[0].double(), video)
    if vectors.shape[-2] < 2:
        raise ValueError("a video of one frame: a metric over time needs at least two")
    unit = F.normalize(vectors, dim=-1)
    before = (unit[..., 1:, :] * unit[..., :-1, :]).sum(-1).clamp_min(0)
    first = (unit[..., 1:, :] * unit[..., :1, :]).sum(-1).clamp_min(0)
    values = (before + first) / 2
    return values if per_frame else values.mean(-1)


def _warped(
    video: Tensor, reference: Tensor, flow: Flow, per_frame: bool, penalty: Callable[[Any], Tensor]
) -> Tensor:
    def of_pair(now: Tensor, after: Tensor, ref_now: Tensor, ref_after: Tensor) -> Tensor:
        forward = flow(ref_now, ref_after)
        seen = visible(forward, flow(ref_after, ref_now)).to(now.device)
        error = penalty(warp(after, forward) - now).mean(0)
        return (error * seen).sum() / seen.sum().clamp_min(1)

    values = over_pairs(of_pair, video, reference)
    return values if per_frame else values.mean(-1)


def _targets(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel's flow leads, (x, y)."""
    height, width = flow.shape[-2:]
    x = torch.arange(width, dtype=flow.dtype, device=flow.device)
    y = torch.arange(height, dtype=flow.dtype, device=flow.device)
    return x + flow[0], y[:, None] + flow[1]


def _square(flow: Tensor) -> Tensor:
    return flow.square().sum(0)


METRICS = (
    Metric(
        "flicker", flicker, "", "higher", "1 - mean |v[t+1] - v[t]|, 1 for a still (VBench)"
    ),
    Metric(
        "flicker_compensated", flicker_compensated, "", "higher",
        "1 - mean |warped v[t+1] - v[t]| where the reference's motion is visible",
    ),
    Metric(
        "warp_error", warp_error, "", "lower",
        "mean (warped v[t+1] - v[t])^2 where the reference's motion is visible (Lai et al. 2018)",
    ),
    Metric("tof", tof, "px", "lower", "mean distance between the flows of video and reference"),
    Metric(
        "subject_consistency", subject_consistency, "", "higher",
        "cosine of each frame's vector to the frame before and to the first, mean (VBench)",
        network="dino",
    ),
)  # fmt: skip
