"""How close a video stays to the one it should have been: PSNR, SSIM and plain tensor distances.

Fidelity is compared paired, clip by clip, on tensors before any codec (an MP4 alone costs several
decibels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen_accel.eval.clips import check, over_frames
from gen_accel.eval.metric import Metric

PSNR_CAP = 100.0
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03
_TINY = torch.finfo(torch.float64).tiny


def psnr(video: Tensor, reference: Tensor, *, per_frame: bool = False) -> Tensor:
    """Peak signal-to-noise ratio in dB, ``10 log10(1 / MSE)`` per frame, averaged over frames.

    Args:
        video: ``[frames, channels, height, width]`` or with a batch in front; uint8, or float in
            [0, 1].
        reference: The same shape.
        per_frame: Return the value of every frame.

    Returns:
        One value per clip: 0-D, or ``[batch]``; with ``per_frame`` ``[frames]`` behind that. A
        frame counts at most `PSNR_CAP` (100 dB), so that equal frames do not turn the mean into
        infinity.

    Raises:
        ValueError: Shapes differ, or values are not finite or outside [0, 1].

    Example:
        >>> import torch
        >>> grey = torch.full((2, 3, 8, 8), 0.5)
        >>> float(psnr(grey, grey)), round(float(psnr(grey + 0.1, grey)), 3)
        (100.0, 20.0)
    """
    values = decibels(over_frames(_mse, video, reference))
    return values if per_frame else values.mean(-1)


def psnr_pooled(video: Tensor, reference: Tensor) -> Tensor:
    """``10 log10(1 / MSE)`` with one MSE for the clip: its worst frames decide, not its best.

    Never above `psnr`; the two differ by decibels where damage is uneven in time. Arguments, cap
    and errors as there.
    """
    return decibels(over_frames(_mse, video, reference).mean(-1))


def decibels(mse: Tensor) -> Tensor:
    """Mean squared errors of values in [0, 1] as dB, at most `PSNR_CAP`."""
    return -10 * torch.log10(mse.clamp_min(10 ** (-PSNR_CAP / 10)))


def ssim(video: Tensor, reference: Tensor, *, per_frame: bool = False) -> Tensor:
    """Structural similarity (Wang et al. 2004): Gaussian window 11x11, sigma 1.5, K = 0.01, 0.03.

    Computed per channel with population moments, on windows that lie wholly inside the frame, then
    averaged over positions, channels and frames: scikit-image's value. torchmetrics also averages
    over the windows that hang over the edge, on reflected pixels, and so differs in the third
    decimal.

    Args:
        video: As for `psnr`; frames of at least 11x11 pixels.
        reference: The same shape.
        per_frame: Return the value of every frame.

    Returns:
        One value per clip, at most 1: 0-D, or ``[batch]``; with ``per_frame`` ``[frames]`` behind.

    Raises:
        ValueError: As for `psnr`, or frames are smaller than the window.
    """
    check(video, reference)
    if min(video.shape[-2:]) < _WINDOW:
        raise ValueError(
            f"frames of {video.shape[-2]}x{video.shape[-1]} pixels: SSIM needs at least "
            f"{_WINDOW}x{_WINDOW}; resize first"
        )
    values = over_frames(_ssim_frame, video, reference)
    return values if per_frame else values.mean(-1)


def pixel_cosine(video: Tensor, reference: Tensor, *, per_frame: bool = False) -> Tensor:
    """`cosine` of each clip's pixels in [0, 1], or of each frame's, see `psnr`."""
    dot, video2, reference2, *_ = _sums(video, reference, per_frame)
    return _angle(dot, video2.sqrt(), reference2.sqrt())


def pixel_l1(video: Tensor, reference: Tensor, *, per_frame: bool = False) -> Tensor:
    """`relative_l1` of each clip's pixels in [0, 1], or of each frame's, see `psnr`."""
    _, _, _, difference, size, _ = _sums(video, reference, per_frame)
    return _share(difference, size)


def pixel_l2(video: Tensor, reference: Tensor, *, per_frame: bool = False) -> Tensor:
    """`relative_l2` of each clip's pixels in [0, 1], or of each frame's, see `psnr`."""
    _, _, reference2, _, _, difference2 = _sums(video, reference, per_frame)
    return _share(difference2.sqrt(), reference2.sqrt())


def cosine(value: Tensor, reference: Tensor) -> Tensor:
    """Cosine of the angle between two tensors of any shape, all elements taken as one vector.

    Zeros have no direction: 1 where both tensors are zero, as two black frames are equal, and 0
    where one is.
    """
    a, b = _flat(value, reference)
    return _angle(a @ b, a.norm(), b.norm())


def relative_l1(value: Tensor, reference: Tensor) -> Tensor:
    """``sum |value - reference| / sum |reference|`` over all elements.

    Of a reference of zeros, such as a black frame, nothing is a share: 0 where the value is zero,
    too, and else 1, its share of itself.
    """
    a, b = _flat(value, reference)
    return _share((a - b).abs().sum(), b.abs().sum())


def relative_l2(value: Tensor, reference: Tensor) -> Tensor:
    """``|value - reference| / |reference|``, Euclidean norms; zeros as for `relative_l1`."""
    a, b = _flat(value, reference)
    return _share((a - b).norm(), b.norm())


def _angle(dot: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a == 0) & (b == 0), 1.0, dot / (a * b).clamp_min(_TINY))


def _share(difference: Tensor, size: Tensor) -> Tensor:
    return torch.where(size == 0, (difference > 0).to(size.dtype), difference / size)


def _mse(frame: Tensor, reference: Tensor) -> Tensor:
    return (frame - reference).square().mean()


def _sums(video: Tensor, reference: Tensor, per_frame: bool) -> tuple[Tensor, ...]:
    """ab, aa, bb, |a - b|, |b|, (a - b)^2, summed over the pixels of each frame or clip."""

    def of_frame(a: Tensor, b: Tensor) -> Tensor:
        terms = (a * b, a * a, b * b, (a - b).abs(), b.abs(), (a - b).square())
        return torch.stack([term.sum() for term in terms])

    sums = over_frames(of_frame, video, reference)
    return (sums if per_frame else sums.sum(-2)).unbind(-1)


def _ssim_frame(a: Tensor, b: Tensor) -> Tensor:
    mean_a, mean_b, aa, bb, ab = _blur(torch.stack([a, b, a * a, b * b, a * b]))
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    variances = (aa - mean_a**2) + (bb - mean_b**2)
    contrast = (2 * (ab - mean_a * mean_b) + c2) / (variances + c2)
    return (luminance * contrast).mean()


def _blur(images: Tensor) -> Tensor:
    """Separable Gaussian over the last two axes, without padding."""
    # As products with band matrices: ten times as fast on a CPU as float64 convolutions.
    return _band(images, images.shape[-2]) @ images @ _band(images, images.shape[-1]).mT


def _band(images: Tensor, size: int) -> Tensor:
    """The window at every place it fits, ``[size - 10, size]``."""
    offsets = torch.arange(_WINDOW, device=images.device)
    window = torch.exp(-(offsets - _WINDOW // 2).to(images.dtype).square() / (2 * _SIGMA**2))
    rows = size - _WINDOW + 1
    places = torch.arange(rows, device=images.device)[:, None] + offsets
    band = images.new_zeros(rows, size)
    return band.scatter_(1, places, (window / window.sum()).expand(rows, -1))


def _flat(value: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _double(value, reference)
    return a.flatten(), b.flatten()


def _double(value: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64: float32 moments lose SSIM's fourth decimal in flat areas."""
    if value.shape != reference.shape:
        raise ValueError(
            f"shapes {tuple(value.shape)} and {tuple(reference.shape)} differ; a measure of "
            "fidelity compares equal shapes"
        )
    a, b = (x.cpu() if x.device.type == "mps" else x for x in (value, reference))  # no float64
    for tensor in (a, b):
        if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
            raise ValueError(f"dtype {tensor.dtype}: expected uint8 or a float dtype")
    a, b = (x.double() / 255 if x.dtype == torch.uint8 else x.double() for x in (a, b))
    return a, b.to(a.device)


METRICS = (
    Metric("psnr", psnr, "dB", "higher", "10 log10(1 / MSE) per frame, at most 100 dB, mean"),
    Metric("psnr_pooled", psnr_pooled, "dB", "higher", "10 log10(1 / MSE), one MSE per clip"),
    Metric("ssim", ssim, "", "higher", "structural similarity, Gaussian 11x11 inside the frame"),
    Metric("cosine", pixel_cosine, "", "higher", "cosine between the pixels of two clips"),
    Metric("relative_l1", pixel_l1, "", "lower", "sum |video - reference| / sum |reference|"),
    Metric("relative_l2", pixel_l2, "", "lower", "|video - reference| / |reference|"),
)
