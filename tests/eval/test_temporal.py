import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gen_accel.eval.temporal import (
    dis_flow,
    flicker,
    flicker_compensated,
    subject_consistency,
    tof,
    visible,
    warp,
    warp_error,
)
from helpers.clips import drift, exact_flow

SHIFT = (2, -1)


def still_flow(first, second):
    return torch.zeros(2, *first.shape[1:])


def alternating(frames=6, size=16):
    video = torch.zeros(frames, 3, size, size, dtype=torch.uint8)
    video[1::2] = 255
    return video


def test_flicker_of_a_still_and_of_a_strobe():
    assert float(flicker(drift(shift=(0, 0)))) == 1.0
    assert float(flicker(alternating())) == 0.0  # uint8 differences must not wrap around


def test_flicker_agrees_with_opencv():
    import cv2

    video = drift()
    frames = video.permute(0, 2, 3, 1).numpy()
    differences = [cv2.absdiff(a, b).mean() for a, b in zip(frames, frames[1:])]
    assert float(flicker(video)) == pytest.approx((255 - np.mean(differences)) / 255, abs=1e-9)
    ours = flicker(video, per_frame=True)
    np.testing.assert_allclose(ours.numpy(), 1 - np.array(differences) / 255, atol=1e-9)


def test_warp_samples_where_the_flow_points():
    frame = torch.arange(24.0, dtype=torch.float64).view(1, 4, 6)
    moved = warp(frame, torch.tensor([1.0, 2.0])[:, None, None].expand(2, 4, 6))
    assert torch.allclose(moved[0, 0, :5], frame[0, 2, 1:])
    assert torch.allclose(moved[0, 3, 5], frame[0, 3, 5])  # the edge is repeated
    half = warp(frame, torch.tensor([0.5, 0.0])[:, None, None].expand(2, 4, 6))
    assert torch.allclose(half[0, 0, 0], torch.tensor(0.5, dtype=torch.float64))


def test_warp_agrees_with_opencv():
    import cv2

    generator = torch.Generator().manual_seed(0)
    frame = torch.rand(3, 17, 23, generator=generator)
    flow = 4 * torch.randn(2, 17, 23, generator=generator)
    x, y = np.meshgrid(np.arange(23), np.arange(17))
    wanted = cv2.remap(
        frame.permute(1, 2, 0).numpy(),
        (x + flow[0].numpy()).astype(np.float32),
        (y + flow[1].numpy()).astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    ours = warp(frame, flow).permute(1, 2, 0).numpy()
    # cv2 interpolates in steps of 1/32 pixel.
    np.testing.assert_allclose(ours, wanted, atol=0.05)
    assert np.abs(ours - wanted).mean() < 5e-3


def test_an_integer_translation_has_no_warp_error():
    video = drift(shift=SHIFT)
    flow = exact_flow(video, SHIFT)
    assert float(warp_error(video, video, flow)) < 1e-12
    assert float(flicker_compensated(video, video, flow)) == pytest.approx(1, abs=1e-6)
    # Under a wrong flow, or with the motion left in, there is an error.
    assert float(warp_error(video, video, still_flow)) > 1e-4
    assert float(flicker(video)) < 0.99


def test_without_motion_warp_error_is_the_mean_squared_difference():
    video = drift()
    frames = video.double() / 255
    wanted = (frames[1:] - frames[:-1]).square().mean((1, 2, 3))
    ours = warp_error(video, video, still_flow, per_frame=True)
    assert torch.allclose(ours, wanted, atol=1e-12)
    absolute = (frames[1:] - frames[:-1]).abs().mean()
    assert float(flicker_compensated(video, video, still_flow)) == pytest.approx(1 - absolute)


def test_warp_error_takes_the_motion_of_the_reference():
    reference = drift(shift=SHIFT)
    flow = exact_flow(reference, SHIFT)
    frozen = reference[:1].expand_as(reference)
    assert float(flicker(frozen)) == 1.0
    assert float(warp_error(frozen, reference, flow)) > 1e-4  # it should have moved


def by_hand(forward, backward):
    """Lai et al.'s mask, pixel by pixel, for whole-pixel flows; forward is the first frame's."""
    _, height, width = forward.shape
    seen = torch.zeros(height, width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            u, v = forward[:, y, x].tolist()
            back = backward[
                :, min(max(y + round(v), 0), height - 1), min(max(x + round(u), 0), width - 1)
            ]
            size, other = u * u + v * v, float(back.square().sum())
            disagree = (u + float(back[0])) ** 2 + (v + float(back[1])) ** 2
            steep = 0.0
            if x + 1 < width:
                steep += float((forward[:, y, x + 1] - forward[:, y, x]).square().sum())
            if y + 1 < height:
                steep += float((forward[:, y + 1, x] - forward[:, y, x]).square().sum())
            inside = 0 <= x + u <= width - 1 and 0 <= y + v <= height - 1
            seen[y, x] = (
                disagree <= 0.01 * (size + other) + 0.5 and steep <= 0.01 * size + 0.002 and inside
            )
    return seen


def test_visibility_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    forward = torch.zeros(2, 12, 14, dtype=torch.float64)
    forward[0, 3:8, 4:9] = 3
    backward = -warp(forward, -forward).round()
    backward += torch.randint(-1, 2, backward.shape, generator=generator) * (
        torch.rand(12, 14, generator=generator) < 0.2
    )
    ours = visible(forward, backward)
    assert torch.equal(ours, by_hand(forward, backward))
    assert ours.any() and not ours.all()


def test_what_is_hidden_does_not_count():
    """A square passes over a background: the pixels it covers next have nowhere to go."""
    now, after = torch.full((2, 3, 20, 20), 0.3)
    now[:, 5:10, 5:10], after[:, 5:10, 8:13] = 0.9, 0.9
    forward, backward = torch.zeros(2, 2, 20, 20)
    forward[0, 5:10, 5:10], backward[0, 5:10, 8:13] = 3, -3

    def flow(first, second):
        return forward if bool((first == now).all()) else backward

    video = torch.stack([now, after]).double()
    assert float(warp_error(video, video, flow)) < 1e-12
    assert not visible(forward, backward)[5:10, 10:13].any()
    noisy = video.clone()
    noisy[1] += 0.05
    assert float(warp_error(noisy, video, flow)) == pytest.approx(0.05**2, rel=1e-6)


def test_where_nothing_is_visible_the_pair_counts_zero():
    video = drift(frames=3)

    def away(first, second):
        return torch.full((2, *first.shape[1:]), 1e3)

    assert float(warp_error(video, video, away)) == 0


@pytest.mark.parametrize("size", [12, 32, 64])
def test_dis_finds_a_translation(size):
    video = drift(size=size, shift=SHIFT, seed=3)
    flow = dis_flow(video[0] / 255, video[1] / 255)
    inner = flow[:, size // 4 : -size // 4, size // 4 : -size // 4].mean((1, 2))
    assert inner.tolist() == pytest.approx(SHIFT, abs=0.3)
    if size > 12:
        with_flow = float(warp_error(video, video))
        assert with_flow < 0.1 * float(warp_error(video, video, still_flow))


def test_dis_of_small_frames():
    with pytest.raises(ValueError, match="8x16.*12x12"):
        dis_flow(torch.rand(3, 8, 16), torch.rand(3, 8, 16))


def test_tof_is_the_distance_between_two_motions():
    video, reference = drift(shift=(3, 4)), drift(shift=(0, 0))

    def flow(first, second):
        moves = bool((first != second).any())
        step = torch.tensor((3.0, 4.0) if moves else (0.0, 0.0))
        return step[:, None, None].expand(2, *first.shape[1:])

    assert float(tof(video, reference, flow)) == pytest.approx(5)
    assert float(tof(video, video)) == 0
    assert float(tof(drift(size=64, shift=(3, 0)), drift(size=64, shift=(1, 0)))) == pytest.approx(
        2, abs=0.3
    )


def test_subject_consistency_by_hand():
    angles = [0.0, 0.3, 2.0, 0.3]
    vectors = torch.tensor([[math.cos(a), math.sin(a)] for a in angles]).double()
    video = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 4, 4) / 4

    def network(frames):
        return vectors[(frames[:, 0, 0, 0] * 4).round().long()] * 7  # length must not matter

    def cosine(a, b):
        return max(0.0, float(F.cosine_similarity(vectors[a], vectors[b], dim=0)))

    wanted = [(cosine(t - 1, t) + cosine(0, t)) / 2 for t in (1, 2, 3)]
    assert subject_consistency(video, network, per_frame=True).tolist() == pytest.approx(wanted)
    assert float(subject_consistency(video, network)) == pytest.approx(np.mean(wanted))
    assert cosine(0, 2) == 0  # an obtuse angle counts zero, not less


def test_one_frame_is_not_a_video():
    frame = drift(frames=1)
    for measure in (
        lambda: flicker(frame),
        lambda: warp_error(frame, frame),
        lambda: tof(frame, frame),
        lambda: subject_consistency(frame, lambda x: x.mean((2, 3))),
    ):
        with pytest.raises(ValueError, match="one frame.*at least two"):
            measure()
