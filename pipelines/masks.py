"""Masks on pixels and on tokens: packing, thresholds, components.

Token masks are bool ``[batch, frames, height, width]`` on the transformer's token grid.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.layout import TokenGrid


def pack_mask(mask: Tensor, grid: TokenGrid, temporal: int) -> Tensor:
    """A pixel mask on the token grid: a token is set when any of its pixels is.

    The VAE packs the first frame alone and then ``temporal`` frames into each latent frame; taking
    one frame of each would lose what moves fast.

    Args:
        mask: bool ``[batch, frames, height, width]``.
        grid: Token grid.
        temporal: Frames per latent frame of the VAE.

    Returns:
        bool ``[batch, *grid]``.

    Raises:
        ValueError: The mask's frames or sides do not divide into the grid.
    """
    _, frames, height, width = mask.shape
    latent = (frames - 1) // temporal + 1
    if (frames - 1) % temporal or latent % grid.frames:
        raise ValueError(
            f"mask of {frames} frames: the grid {grid} with {temporal} frames per latent frame "
            f"needs k*{temporal}+1; cut or repeat frames"
        )
    if height % grid.height or width % grid.width:
        raise ValueError(f"mask of {height}x{width} pixels does not divide into the grid {grid}")
    padded = F.pad(mask.float(), (0, 0, 0, 0, temporal - 1, 0))  # the first frame stands alone
    window = (temporal * (latent // grid.frames), height // grid.height, width // grid.width)
    return F.max_pool3d(padded[:, None], window)[:, 0] > 0


def unpack_mask(mask: Tensor, frames: int, height: int, width: int, temporal: int) -> Tensor:
    """The pixels of a token mask, bool ``[batch, frames, height, width]``."""
    latent = (frames - 1) // temporal + 1
    mask = mask.repeat_interleave(latent // mask.shape[1] * temporal, dim=1)[:, temporal - 1 :]
    mask = mask.repeat_interleave(height // mask.shape[2], dim=2)
    return mask.repeat_interleave(width // mask.shape[3], dim=3)


def otsu(values: Tensor, clip: float = 0.995) -> tuple[Tensor, Tensor]:
    """Otsu's threshold of each row, and how well it separates.

    Values above the ``clip`` quantile are lowered to it first: one attention sink would otherwise
    be a class of its own.

    Args:
        values: ``[..., n]``.
        clip: Quantile, 1 clips nothing.

    Returns:
        Thresholds and separabilities ``[...]``: values above the threshold are the upper class,
        none where all are equal; separability is the share of the variance that lies between the
        classes, in [0, 1].
    """
    top = values.float().quantile(clip, dim=-1, keepdim=True)
    ordered = values.float().minimum(top).sort(dim=-1).values.double()
    n = ordered.shape[-1]
    below = torch.arange(1, n, device=values.device, dtype=torch.float64)
    total = ordered.mean(-1, keepdim=True)
    mean_below = ordered.cumsum(-1)[..., :-1] / below
    between = below / (n - below) * (mean_below - total).square()
    # Only a cut between two different values separates them.
    between = between.masked_fill(ordered[..., 1:] <= ordered[..., :-1], 0.0)
    best, cut = between.max(-1)
    variance = ordered.var(-1, correction=0)
    separability = torch.where(variance > 0, best / variance.clamp(min=1e-300), 0.0)
    middle = (ordered.gather(-1, cut[..., None]) + ordered.gather(-1, cut[..., None] + 1)) / 2
    threshold = torch.where(best > 0, middle[..., 0], torch.inf)
    return threshold.to(values), separability.to(values)


def dilate(mask: Tensor, radius: int = 1, *, frames: bool = False) -> Tensor:
    """Grow a mask by a square of tokens; with ``frames`` over neighbouring frames as well."""
    if radius == 0:
        return mask
    reach = (radius if frames else 0, radius, radius)
    kernel = tuple(2 * r + 1 for r in reach)
    return F.max_pool3d(mask[:, None].float(), kernel, stride=1, padding=reach)[:, 0] > 0


def touching(mask: Tensor, seeds: Tensor) -> Tensor:
    """The components of a mask (neighbours in space and time, 26 of them) that hold a seed."""
    found = [_reached(*clip) for clip in zip(_planes(mask), _planes(seeds))]
    return torch.from_numpy(np.stack(found)).to(mask.device)


def _reached(mask: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Components of each frame, taken over from frame to frame until nothing is added.

    Growing by a pixel at a time would take as many passes over the clip as it is wide.
    """
    import cv2

    labels = [cv2.connectedComponents(frame, connectivity=8)[1] for frame in mask]
    near, found, square = seeds & mask, np.zeros_like(mask), np.ones((3, 3), np.uint8)
    frames = range(len(mask))
    changed = True
    while changed:
        changed = False
        for i in (*frames, *reversed(frames)):
            hit = labels[i][near[i] > found[i]]
            if not len(hit):
                continue
            changed = True
            chosen = np.zeros(labels[i].max() + 1, np.uint8)
            chosen[hit] = 1
            found[i] |= chosen[labels[i]]
            reach = cv2.dilate(found[i], square)
            for j in {i - 1, i + 1} & {*frames}:
                near[j] |= reach & mask[j]
    return found.astype(bool)


def _planes(mask: Tensor) -> np.ndarray:
    return mask.cpu().numpy().astype(np.uint8)
