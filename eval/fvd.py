"""Fréchet video distance: how far the features of two sets of clips lie apart."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from gen_accel.eval.features import FeatureNetwork
from gen_accel.eval.metric import Metric

ENOUGH = 256  # clips; with fewer, the estimate is mostly its bias


class FewClipsWarning(UserWarning):
    """A Fréchet distance from too few clips."""


class Moments:
    """Mean and covariance of features, updated batch by batch in constant memory.

    The covariance is kept as a triangular factor: squaring the features, as sums of products do,
    would lose half of the digits that the distance needs.

    Example:
        >>> import torch
        >>> x = torch.arange(12.0).view(6, 2)
        >>> streamed = Moments().update(x[:2]).update(x[2:])
        >>> torch.allclose(streamed.covariance(), torch.cov(x.T.double()))
        True
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0)
        self._factor = torch.empty(0)  # factor^T factor = sum of the centred outer products

    def update(self, features: Tensor) -> Moments:
        """Take in ``[n, features]``; returns itself.

        Raises:
            ValueError: Another shape than before, or values that are not finite.
        """
        features = _matrix(features)
        other = Moments()
        other.count, other.mean = len(features), features.mean(0)
        other._factor = features - other.mean
        return self.merge(other)

    def merge(self, other: Moments) -> Moments:
        """Take in what another one has seen; returns itself."""
        if not other.count:
            return self
        if not self.count:
            self.mean, parts = other.mean, [other._factor]
        else:
            if self.mean.shape != other.mean.shape:
                raise ValueError(
                    f"{len(other.mean)} features after {len(self.mean)}; moments belong to one "
                    "network"
                )
            n, m = self.count, other.count
            apart = other.mean - self.mean
            parts = [self._factor, other._factor, apart[None] * (n * m / (n + m)) ** 0.5]
            self.mean = self.mean + apart * (m / (n + m))
        self.count += other.count
        stacked = torch.cat(parts)
        if len(stacked) > stacked.shape[1]:
            stacked = torch.linalg.qr(stacked, mode="r").R
        self._factor = stacked
        return self

    def factor(self) -> Tensor:
        """``A`` with ``A^T A`` the covariance (division by n - 1), ``[rows, features]``.

        Raises:
            ValueError: Fewer than two clips were seen.
        """
        if self.count < 2:
            raise ValueError(
                f"{self.count} clip(s): a covariance needs at least 2, a useful distance {ENOUGH}"
            )
        return self._factor / (self.count - 1) ** 0.5

    def covariance(self) -> Tensor:
        """``[features, features]``, float64."""
        a = self.factor()
        return a.T @ a


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> Tensor:
    """Squared Fréchet distance of two Gaussians fitted to features.

    ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``, covariances with n - 1. With factors
    ``A^T A = S_a``, ``B^T B = S_b`` the last trace is the sum of the singular values of ``A B^T``,
    which needs no matrix root and is exact for singular covariances too.

    Args:
        a: Features ``[n, features]``, or their `Moments`.
        b: Features ``[m, features]``, or their `Moments`.

    Returns:
        0-D, float64, not below 0.

    Raises:
        ValueError: Fewer than two clips on a side, different networks, or values not finite.

    Example:
        >>> import torch
        >>> x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
        >>> round(float(frechet_distance(x, x + 2)), 6)
        20.0
    """
    a, b = (x if isinstance(x, Moments) else Moments().update(x) for x in (a, b))
    fa, fb = a.factor(), b.factor()
    if fa.shape[1] != fb.shape[1]:
        raise ValueError(
            f"{fa.shape[1]} and {fb.shape[1]} features; a distance compares one network's"
        )
    roots = torch.linalg.svdvals(fa @ fb.T).sum()
    traces = fa.square().sum() + fb.square().sum()
    return ((a.mean - b.mean).square().sum() + traces - 2 * roots).clamp_min(0)


def fvd_features(video: Tensor, reference: Tensor, network: FeatureNetwork) -> Tensor:
    """Features of clips and of their references, ``[batch, 2, features]``.

    `fvd_pool` of them is the Fréchet video distance. Clips of another length, size or frame rate
    give another metric, so both sides must agree.

    Args:
        video: ``[frames, channels, height, width]`` or with a batch in front; uint8, or float in
            [0, 1].
        reference: The same shape.
        network: See `gen_accel.eval.features`.

    Raises:
        ValueError: Shapes differ, or the network refuses the clips.
    """
    if video.shape != reference.shape:
        raise ValueError(
            f"shapes {tuple(video.shape)} and {tuple(reference.shape)} differ; FVD compares clips "
            "of one length and size"
        )
    return torch.stack([network(video), network(reference)], dim=-2)


def fvd_pool(features: Tensor) -> Tensor:
    """Fréchet distance between the two sides of ``[clips, 2, features]``.

    Warns under 256 clips: drawn from one and the same standard normal of 400 features, two sets of
    64 clips lie about 540 apart, of 256 clips 300, of 2048 clips 40.

    Raises:
        ValueError: Fewer than two clips.
    """
    if len(features) < ENOUGH:
        warnings.warn(
            f"FVD from {len(features)} clips is mostly bias: use {ENOUGH} or more, and compare "
            "only with the same number; for fewer clips trust paired metrics",
            FewClipsWarning,
            stacklevel=2,
        )
    return frechet_distance(features[:, 0], features[:, 1])


def _matrix(features: Tensor) -> Tensor:
    features = features.detach().cpu().double()
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"shape {tuple(features.shape)}: expected [clips, features]")
    if not bool(features.isfinite().all()):
        raise ValueError("features hold NaN or infinite values; look for broken clips first")
    return features


def _metric(name: str, network: str, what: str) -> Metric:
    return Metric(
        name,
        fvd_features,
        "",
        "lower",
        f"Fréchet distance between clips and references as sets: {what}",
        network=network,
        pool=fvd_pool,
        axes=2,
    )


METRICS = (
    _metric("fvd", "i3d", "I3D logits (Kinetics-400, StyleGAN-V's protocol)"),
    _metric("fvd_videomae", "videomae", "VideoMAE features (mean over patches)"),
    _metric("fvd_toy", "fvd-toy", "features of our own fvd-toy encoder, not comparable with FVD"),
)
