"""Pictures, clips and masks of every kind read as the same tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from gen_accel.pipelines.frames import to_clips, to_frames, to_masks

BYTES = torch.randint(0, 256, (5, 3, 8, 12), dtype=torch.uint8, generator=torch.manual_seed(0))
FRAMES = BYTES.float() / 255
HWC = BYTES.movedim(1, -1).numpy()
PIL = [Image.fromarray(frame) for frame in HWC]
MASK = torch.zeros(5, 8, 12, dtype=torch.bool)
MASK[:, 2:4, 3:9] = True
MASK[3:, 5] = True


@pytest.mark.parametrize(
    "video",
    [
        BYTES,
        FRAMES,
        FRAMES.numpy(),
        FRAMES.double(),
        FRAMES.movedim(1, -1),
        HWC,
        HWC[::-1][::-1],
        FRAMES.movedim(1, -1).numpy().astype(np.float64),
        list(FRAMES),
        list(HWC),
        list(FRAMES.numpy()),
        PIL,
        tuple(PIL),
        [image.convert("RGBA") for image in PIL],
    ],
)
def test_frames_of_every_kind(video):
    assert torch.equal(to_frames(video), FRAMES)
    assert torch.equal(to_clips(video), FRAMES[None])
    assert torch.equal(to_clips([video, video]), torch.stack([FRAMES, FRAMES]))


def test_half_precision_is_read_and_its_rounding_cut_off():
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(to_frames(FRAMES.to(dtype)), FRAMES.to(dtype).float())
    assert to_frames(torch.full((1, 3, 8, 8), 1.0005)).max() == 1


def test_channels_of_doubtful_places():
    small = torch.rand(2, 3, 5, 3)
    assert torch.equal(to_frames(small), small)
    assert torch.equal(to_frames(small.numpy()), small.movedim(-1, 1))
    grey = FRAMES[:, :1]
    assert torch.equal(to_frames(grey), grey.expand(-1, 3, -1, -1))
    assert torch.equal(to_frames(grey[:, 0].numpy()), grey.expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "without frames"),
        ("in.mp4", "a video of str"),
        (None, "a video of NoneType"),
        (torch.rand(8, 12), r"a video of \(8, 12\)"),
        (["a", "b"], "str: give numbers"),
        ([FRAMES[0], FRAMES[0, :, 1:]], "different sizes"),
        ([FRAMES, FRAMES[1:]], "clips of different frames"),
        (torch.full((2, 3, 4, 4), float("nan")), r"outside \[0, 1\]"),
        (torch.rand(0, 3, 4, 4), "without frames"),
        (torch.rand(2, 3, 0, 4), "no pixels"),
    ],
)
def test_what_is_no_video(video, message):
    with pytest.raises(ValueError, match=message):
        to_clips(video)


GREY = [Image.fromarray(m.numpy().astype(np.uint8) * 255) for m in MASK]


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        MASK.numpy(),
        MASK.to(torch.bfloat16),
        MASK[:, None],
        MASK[..., None].numpy(),
        MASK[:, None].expand(-1, 3, -1, -1),
        list(MASK),
        list(MASK.numpy()),
        GREY,
        [image.convert("1") for image in GREY],
        [image.convert("RGB") for image in GREY],
    ],
)
def test_masks_of_every_kind(mask):
    assert torch.equal(to_masks(mask, 1, 5, (8, 12)), MASK[None])
    assert torch.equal(to_masks([mask, mask], 2, 5, (8, 12)), torch.stack([MASK, MASK]))


@pytest.mark.parametrize("mask", [MASK[0], MASK[:1], GREY[0], [GREY[0]]])
def test_one_mask_for_all_frames(mask):
    assert torch.equal(to_masks(mask, 2, 5, (8, 12)), MASK[:1].expand(2, 5, 8, 12))
    clips = to_masks([[GREY[0]], [GREY[4]]], 2, 5, (8, 12))
    assert torch.equal(clips, MASK[[0, 4], None].expand(2, 5, 8, 12))


def test_masks_that_do_not_fit_are_named_as_they_are():
    with pytest.raises(ValueError, match=r"mask of shape \(4, 1, 8, 12\) for 1 clips of 5 frames"):
        to_masks(MASK[:4, None], 1, 5, (8, 12))
    with pytest.raises(ValueError, match="of 5 frames of 8x8"):
        to_masks(MASK, 1, 5, (8, 8))
    with pytest.raises(ValueError, match="masks of different shapes"):
        to_masks([MASK[0], MASK[1, 1:]], 1, 5, (8, 12))
