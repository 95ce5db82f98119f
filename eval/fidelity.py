"""How close a video stays to the one it should have been: PSNR, SSIM and plain tensor distances.

Fidelity is compared paired, clip by clip, on tensors before any codec (an MP4 alone costs several
decibels).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.eval.metric import Metric

PSNR_CAP = 100.0
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, ``10 log10(1 / MSE)`` per frame, averaged over frames.

    Args:
        video: ``[frames, channels, height, width]`` or with a batch in front; uint8, or float in
            [0, 1].
        reference: The same shape.

    Returns:
        One value per clip: 0-D, or ``[batch]``. A frame counts at most `PSNR_CAP` (100 dB), so
        that equal frames do not turn the mean into infinity.

    Raises:
        ValueError: Shapes differ, or values are not finite or outside [0, 1].

    Example:
        >>> import torch
        >>> grey = torch.full((2, 3, 8, 8), 0.5)
        >>> float(psnr(grey, grey)), round(float(psnr(grey + 0.1, grey)), 3)
        (100.0, 20.0)
    """
    video, reference = _pair(video, reference)
    mse = (video - reference).square().flatten(-3).mean(-1)
    return (-10 * torch.log10(mse.clamp_min(10 ** (-PSNR_CAP / 10)))).mean(-1)


def ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): Gaussian window 11x11, sigma 1.5, K = 0.01, 0.03.

    Computed per channel with population moments, on windows that lie wholly inside the frame, then
    averaged over positions, channels and frames: scikit-image's value. torchmetrics also averages
    over the windows that hang over the edge, on reflected pixels, and so differs in the third
    decimal.

    Args:
        video: As for `psnr`; frames of at least 11x11 pixels.
        reference: The same shape.

    Returns:
        One value per clip, at most 1: 0-D, or ``[batch]``.

    Raises:
        ValueError: As for `psnr`, or frames are smaller than the window.
    """
    video, reference = _pair(video, reference)
    if min(video.shape[-2:]) < _WINDOW:
        raise ValueError(
            f"frames of {video.shape[-2]}x{video.shape[-1]} pixels: SSIM needs at least "
            f"{_WINDOW}x{_WINDOW}; resize first"
        )
    # Frame by frame: the five filtered maps of a whole clip would be five clips in float64.
    frames = [
        _ssim_frame(a, b)
        for a, b in zip(video.flatten(0, -4), reference.flatten(0, -4), strict=True)
    ]
    return torch.stack(frames).view(video.shape[:-3]).mean(-1)


def cosine(value: Tensor, reference: Tensor) -> Tensor:
    """Cosine of the angle between two tensors of any shape, all elements taken as one vector."""
    a, b = _flat(value, reference)
    return a @ b / (a.norm() * b.norm()).clamp_min(torch.finfo(a.dtype).tiny)


def relative_l1(value: Tensor, reference: Tensor) -> Tensor:
    """``sum |value - reference| / sum |reference|`` over all elements."""
    a, b = _flat(value, reference)
    return (a - b).abs().sum() / b.abs().sum().clamp_min(torch.finfo(a.dtype).tiny)


def relative_l2(value: Tensor, reference: Tensor) -> Tensor:
    """``|value - reference| / |reference|``, Euclidean norms over all elements."""
    a, b = _flat(value, reference)
    return (a - b).norm() / b.norm().clamp_min(torch.finfo(a.dtype).tiny)


def _ssim_frame(a: Tensor, b: Tensor) -> Tensor:
    mean_a, mean_b, aa, bb, ab = _blur(torch.stack([a, b, a * a, b * b, a * b]))
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    variances = (aa - mean_a**2) + (bb - mean_b**2)
    contrast = (2 * (ab - mean_a * mean_b) + c2) / (variances + c2)
    return (luminance * contrast).mean()


def _blur(images: Tensor) -> Tensor:
    """Separable Gaussian over the last two axes, without padding."""
    offsets = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    window = window / window.sum()
    maps = images.flatten(0, -3).unsqueeze(1)
    maps = F.conv2d(F.conv2d(maps, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return maps.view(*images.shape[:-2], *maps.shape[-2:])


def _pair(video: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if video.ndim not in (4, 5) or 0 in video.shape:
        raise ValueError(
            f"shape {tuple(video.shape)}: expected [frames, channels, height, width], or a batch "
            "of those; unsqueeze(0) makes an image a clip of one frame"
        )
    a, b = _double(video, reference)
    for values in (a, b):
        low, high = float(values.min()), float(values.max())
        # Written so that NaN fails too. The margin is for decoders that overshoot by rounding.
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"values from {low:g} to {high:g}: floats must lie in [0, 1]; divide by 255 or "
                "pass uint8"
            )
    return a, b


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
    converted = []
    for tensor in (value, reference):
        if tensor.device.type == "mps":
            tensor = tensor.cpu()  # no float64 there
        if tensor.dtype == torch.uint8:
            converted.append(tensor.double() / 255)
        elif tensor.is_floating_point():
            converted.append(tensor.double())
        else:
            raise ValueError(f"dtype {tensor.dtype}: expected uint8 or a float dtype")
    return converted[0], converted[1].to(converted[0].device)


METRICS = (
    Metric(
        "psnr",
        psnr,
        "dB",
        "higher",
        "10 log10(1 / MSE) of each frame, at most 100 dB, mean over frames",
    ),
    Metric(
        "ssim",
        ssim,
        "",
        "higher",
        "structural similarity, Gaussian window 11x11 within the frame, mean over frames",
    ),
)
