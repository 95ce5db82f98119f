"""Small clips and stand-in networks for the tests of metrics."""

import torch
import torch.nn.functional as F


def drift(frames=5, size=32, shift=(2, 1), seed=0, grain=4):
    """A smooth texture that moves by whole pixels (x, y): uint8 ``[frames, 3, size, size]``."""
    margin = (frames - 1) * max(map(abs, shift))
    room = size + margin
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, room // grain + 2, room // grain + 2, generator=generator)
    texture = F.interpolate(coarse, size=(room, room), mode="bicubic", align_corners=True)[0]
    texture = (texture.clamp(0, 1) * 255).round().to(torch.uint8)
    left, top = (margin if s > 0 else 0 for s in shift)
    views = []
    for t in range(frames):
        x, y = left - shift[0] * t, top - shift[1] * t
        views.append(texture[:, y : y + size, x : x + size])
    return torch.stack(views)


def exact_flow(video, shift):
    """The flow of `drift`: looks up which frames it was given."""
    known = video.double() / 255

    def flow(first, second):
        i, j = (int((known - f).abs().amax((1, 2, 3)).argmin()) for f in (first, second))
        step = (j - i) * torch.tensor(shift, dtype=first.dtype)
        return step[:, None, None].expand(2, *first.shape[1:])

    return flow


def patch_tokens(frames):
    """Patch tokens ``[n, 4, 4, 5]`` without weights: colours and roughness of each patch."""
    colour = F.adaptive_avg_pool2d(frames, 4)
    rough = F.adaptive_avg_pool2d(frames.square(), 4) - colour.square()
    return torch.cat([colour - 0.5, 3 * rough[:, :2] + 0.1], 1).permute(0, 2, 3, 1)
