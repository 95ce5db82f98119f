"""From attention to an answer: word maps, heatmap, point, mask. Everything read-only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.layout import TokenGrid
from gen_accel.pipelines.masks import otsu, touching
from gen_accel.pipelines.refam.reading import Reading

DIRECTIONS = ("text", "joint", "rows")
AGGREGATIONS = ("mean", "head", "product")
_CLIP = 0.995
_SAMPLE = 2**20  # pixels that a threshold is taken of


def word_shares(
    reading: Reading,
    words: Sequence[Sequence[int]],
    *,
    direction: str = "text",
    drop: Sequence[int] = (),
    over: Sequence[int] | None = None,
) -> Tensor:
    """The map of each word, mean over its tokens, blocks and heads.

    Args:
        reading: One sample.
        words: Prompt tokens of each word.
        direction: ``"text"``: image-to-text, renormalised over text; ``"joint"``: image-to-text as
            the block computes it; ``"rows"``: text-to-image.
        drop: Tokens whose attention does not count: they leave the sum that shares are parts of.
            Prompt tokens, and for ``"rows"`` video tokens.
        over: Prompt tokens to renormalise over (``"text"``); None: all text but what was dropped.

    Returns:
        ``[words, video]``; ``"text"`` and ``"joint"`` are shares in [0, 1].
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r}: choose {', '.join(map(repr, DIRECTIONS))}")
    gone = list(drop)
    if direction == "rows":
        if reading.rows is None:
            raise ValueError("direction='rows' was not read; read(rows=True)")
        maps = torch.stack([reading.rows[0][:, list(w)].mean(1) for w in words], 1).mean(0)
        maps[:, gone] = 0
        return maps
    columns = reading.columns[0]
    own = torch.stack([columns[..., list(w)].mean(-1) for w in words])  # [words, pairs, video]
    if direction == "joint":
        total = 1 - columns[..., gone].sum(-1)
    elif over is not None:
        total = columns[..., [t for t in over if t not in gone]].sum(-1)
    else:
        kept = [t for t in range(columns.shape[-1] - 1) if t not in gone]
        rest = (columns[..., -1] - columns[..., :-1].sum(-1)).clamp(min=0)
        total = rest + columns[..., kept].sum(-1)
    return (own / total.clamp(min=torch.finfo(total.dtype).tiny)).mean(1)


def normalise(maps: Tensor) -> Tensor:
    """Each map clipped at its 99.5th percentile and stretched to [0, 1]; flat maps become 0."""
    top = maps.quantile(_CLIP, dim=-1, keepdim=True)
    low = maps.amin(-1, keepdim=True)
    span = top - low
    return torch.where(span > 0, (maps.minimum(top) - low) / span.clamp(min=1e-30), 0.0)


def aggregate(maps: Tensor, head: int, how: str = "mean") -> Tensor:
    """One heatmap ``[video]`` of normalised word maps ``[words, video]``.

    Args:
        maps: From `normalise`.
        head: Which word is the head noun.
        how: ``"mean"``; ``"head"``, the head noun counts twice; ``"product"``, the geometric mean.
    """
    if how not in AGGREGATIONS:
        raise ValueError(f"aggregation={how!r}: choose {', '.join(map(repr, AGGREGATIONS))}")
    if how == "product":
        return maps.clamp(min=1e-6).log().mean(0).exp()
    weight = maps.new_ones(len(maps), 1)
    if how == "head":
        weight[head] = 2
    return (maps * weight).sum(0) / weight.sum()


def blur(heatmap: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``[..., height, width]``; 0 does nothing."""
    if not sigma:
        return heatmap
    radius = max(1, round(2 * sigma))
    x = torch.arange(-radius, radius + 1, device=heatmap.device)
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    kernel /= kernel.sum()
    flat = heatmap.reshape(-1, 1, *heatmap.shape[-2:])
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), "replicate"), kernel.view(1, 1, 1, -1))
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), "replicate"), kernel.view(1, 1, -1, 1))
    return flat.view(heatmap.shape)


def to_pixels(
    heatmap: Tensor, grid: TokenGrid, frames: Sequence[int], size: tuple[int, int], sigma: float
) -> Tensor:
    """A map ``[video]`` (or maps ``[n, video]``) on the pixels, ``[..., frames, height, width]``.

    Args:
        heatmap: On tokens.
        grid: Token grid.
        frames: Token frame of each frame.
        size: Height and width in pixels.
        sigma: Blur in tokens.
    """
    tokens = blur(heatmap.unflatten(-1, grid).float(), sigma)
    flat = F.interpolate(
        tokens.reshape(-1, 1, *grid[1:]), size=size, mode="bilinear", align_corners=False
    )
    return flat.view(*tokens.shape[:-2], *size)[..., list(frames), :, :]


def find_point(heatmap: Tensor, *, robust: bool = True) -> tuple[int, int, int]:
    """Frame, row and column of the answer in ``[frames, height, width]``.

    The anchor frame is the one with the highest peak over its mean. There the peak is taken, with
    ``robust`` inside the largest component above half of it, so that one bright pixel does not win.
    """
    peaks = heatmap.flatten(1).amax(1)
    ratio = peaks / heatmap.flatten(1).mean(1).clamp(min=1e-12)
    # A frame whose own peak is faint may have a high ratio and mean nothing.
    frame = int(ratio.where(peaks >= 0.8 * peaks.max(), ratio.new_tensor(-1.0)).argmax())
    plane = heatmap[frame]
    if robust and bool(plane.max() > 0):
        plane = plane.where(_largest(plane > 0.5 * plane.max()), plane.new_tensor(-1.0))
    row, column = divmod(int(plane.argmax()), plane.shape[1])
    return frame, row, column


def otsu_mask(heatmap: Tensor, point: tuple[int, int, int]) -> Tensor:
    """Otsu's upper class of the clip, cut to the component that holds the point.

    The threshold of more than two million pixels is that of an even sample of about a million.
    """
    # Sorting 81 frames of 480x832 takes seconds. An odd stride meets every place within a token.
    stride = 1 + 2 * (heatmap.numel() // _SAMPLE // 2)
    threshold, _ = otsu(heatmap.flatten()[::stride])
    above = heatmap > threshold
    seed = torch.zeros_like(above)
    seed[point] = True
    above |= seed
    return touching(above[None], seed[None])[0]


def flood_fill(video: Tensor, point: tuple[int, int, int], tolerance: float = 0.12) -> Tensor:
    """Pixels of the point's colour that hang together with it, in space and time.

    For flat-coloured pictures: it stands in for a perfect segmenter.

    Args:
        video: ``[frames, 3, height, width]`` in [0, 1].
        point: Frame, row, column.
        tolerance: Largest difference of a channel.
    """
    frame, row, column = point
    seed_colour = video[frame, :, row, column]
    like = (video - seed_colour[:, None, None]).abs().amax(1) <= tolerance
    seed = torch.zeros_like(like)
    seed[point] = True
    return touching(like[None], seed[None])[0]


def _largest(mask: Tensor) -> Tensor:
    """The largest component (8 neighbours) of a plane."""
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.cpu().numpy().astype("uint8"), connectivity=8
    )
    if count < 2:
        return mask
    best = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    return torch.from_numpy(labels == best).to(mask.device)
