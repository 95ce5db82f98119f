import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_accel.eval import fidelity
from gen_accel.eval.fidelity import (
    PSNR_CAP,
    cosine,
    pixel_cosine,
    pixel_l1,
    pixel_l2,
    psnr,
    psnr_pooled,
    relative_l1,
    relative_l2,
    ssim,
)


def clips(*shape, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.rand(*shape, generator=generator)
    changed = (reference + noise * torch.randn(*shape, generator=generator)).clamp(0, 1)
    return changed, reference


def smooth(*shape, seed=0):
    """Pictures with flat areas, where moments cancel."""
    coarse = torch.rand(*shape[:-2], 3, 3, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(
        coarse.flatten(0, -4), size=shape[-2:], mode="bilinear", align_corners=False
    )
    return fine.view(shape)


@pytest.mark.parametrize("size", [(11, 11), (11, 37), (48, 33)])
@pytest.mark.parametrize("noise", [0.003, 0.1])
def test_ssim_agrees_with_scikit_image_and_torchmetrics(size, noise):
    metrics = pytest.importorskip("skimage.metrics")
    functional = pytest.importorskip("torchmetrics.functional.image")
    reference, generator = smooth(4, 3, *size), torch.Generator().manual_seed(1)
    video = (reference + noise * torch.randn(reference.shape, generator=generator)).clamp(0, 1)
    ours = float(ssim(video, reference))
    theirs = np.mean(
        [
            metrics.structural_similarity(
                a.double().numpy(),
                b.double().numpy(),
                channel_axis=0,
                data_range=1.0,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for a, b in zip(video, reference, strict=True)
        ]
    )
    assert ours == pytest.approx(theirs, abs=1e-4)
    _, full = functional.structural_similarity_index_measure(
        video.double(), reference.double(), data_range=1.0, return_full_image=True
    )
    inside = full[..., 5:-5, 5:-5]  # its own mean also counts windows over reflected edges
    assert ours == pytest.approx(float(inside.mean()), abs=1e-4)


def test_psnr_agrees_with_scikit_image_frame_by_frame():
    metrics = pytest.importorskip("skimage.metrics")
    video, reference = clips(5, 3, 16, 12)
    video[0] = (video[0] + 0.3).clamp(0, 1)  # frames differ: the mean is over dB, not over MSE
    theirs = [
        metrics.peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1.0)
        for a, b in zip(video, reference, strict=True)
    ]
    assert float(psnr(video, reference)) == pytest.approx(np.mean(theirs), abs=1e-4)


def test_psnr_of_a_known_error():
    reference = torch.full((3, 3, 8, 8), 0.5)
    assert float(psnr(reference + 0.1, reference)) == pytest.approx(20.0, abs=1e-4)
    assert float(psnr(reference, reference)) == PSNR_CAP
    half = reference.clone()
    half[0] += 0.1
    assert float(psnr(half, reference)) == pytest.approx((20 + 2 * PSNR_CAP) / 3, abs=1e-4)


def test_one_grey_level_is_48_decibels():
    level = torch.full((4, 3, 8, 8), 100, dtype=torch.uint8)
    for measure in (psnr, psnr_pooled):
        assert float(measure(level + 1, level)) == pytest.approx(48.131, abs=5e-4)


def test_pooled_psnr_agrees_with_torchmetrics():
    oracle = pytest.importorskip("torchmetrics.functional.image").peak_signal_noise_ratio
    video, reference = clips(5, 3, 16, 12)
    video[0] = (video[0] + 0.3).clamp(0, 1)
    wanted = float(oracle(video, reference, data_range=1.0))
    assert float(psnr_pooled(video, reference)) == pytest.approx(wanted, abs=1e-4)
    assert float(psnr_pooled(video, reference)) < float(psnr(video, reference)) - 0.1
    assert float(psnr_pooled(reference, reference)) == PSNR_CAP


def test_values_per_frame_are_those_of_the_frames():
    video, reference = clips(3, 4, 3, 16, 16)
    for measure in (psnr, ssim, pixel_cosine, pixel_l1, pixel_l2):
        values = measure(video, reference, per_frame=True)
        assert values.shape == (3, 4)
        alone = measure(video[1, 2:3], reference[1, 2:3])
        assert float(values[1, 2]) == pytest.approx(float(alone), abs=1e-12)


def test_pixel_distances_are_the_distances_of_the_pixels():
    video, reference = clips(2, 3, 3, 16, 16)
    for ours, plain in ((pixel_cosine, cosine), (pixel_l1, relative_l1), (pixel_l2, relative_l2)):
        wanted = [float(plain(v, r)) for v, r in zip(video, reference, strict=True)]
        assert ours(video, reference).tolist() == pytest.approx(wanted, abs=1e-12)


def test_black_has_no_direction_and_no_share():
    video = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    black = torch.zeros_like(video)
    for ours, plain, both, one in (
        (pixel_cosine, cosine, 1, 0),
        (pixel_l1, relative_l1, 0, 1),
        (pixel_l2, relative_l2, 0, 1),
    ):
        assert float(ours(black, black)) == float(plain(black, black)) == both
        assert float(ours(video, black)) == float(plain(video, black)) == one
        faded = torch.cat([black[:1], video[1:]])
        values = ours(faded, faded, per_frame=True)
        assert values.tolist() == pytest.approx([both] * 3, abs=1e-12)


def test_uint8_never_wraps_around():
    low, high = torch.zeros(1, 1, 16, 16, dtype=torch.uint8), torch.full((1, 1, 16, 16), 255)
    high = high.to(torch.uint8)
    assert float(psnr(low, high)) == float(psnr(high, low)) == pytest.approx(0.0, abs=1e-9)
    assert float(relative_l1(low, high)) == pytest.approx(1.0)
    one = torch.full_like(low, 1)
    assert float(psnr(low, one)) == pytest.approx(20 * math.log10(255), abs=1e-6)


def test_uint8_equals_its_float():
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randint(0, 256, (2, 2, 3, 16, 16), generator=generator).to(torch.uint8)
    for measure in (psnr, ssim, cosine, relative_l1, relative_l2):
        assert float(measure(a, b)) == pytest.approx(float(measure(a / 255, b)), abs=1e-6)


def test_one_value_per_clip():
    video, reference = clips(3, 4, 3, 16, 16)
    video[1] = reference[1]
    for measure in (psnr, ssim):
        values = measure(video, reference)
        assert values.shape == (3,)
        for i in range(3):
            assert float(values[i]) == pytest.approx(float(measure(video[i], reference[i])))
    assert float(psnr(video, reference)[1]) == PSNR_CAP
    assert float(ssim(video, reference)[1]) == pytest.approx(1.0)


def test_half_precision_inputs_are_measured_in_double():
    video, reference = clips(2, 3, 16, 16)
    video, reference = video.bfloat16(), reference.bfloat16()
    for measure in (psnr, ssim, cosine, relative_l2):
        assert float(measure(video, reference)) == float(
            measure(video.double(), reference.double())
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.01, 0.5))
def test_more_noise_is_never_better(seed, noise):
    less, reference = clips(2, 3, 16, 16, seed=seed, noise=noise)
    more = reference + 1.5 * (less - reference)
    more, less = (reference + (x - reference) * 0.5 for x in (more, less))
    more, less = more.clamp(0, 1), less.clamp(0, 1)
    assert float(psnr(more, reference)) <= float(psnr(less, reference)) + 1e-9
    assert float(relative_l2(more, reference)) >= float(relative_l2(less, reference)) - 1e-9
    assert float(ssim(less, reference)) <= 1


def test_tensor_distances():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert float(cosine(a, b)) == 0 and float(cosine(2 * a, a)) == pytest.approx(1)
    assert float(cosine(-a, a)) == pytest.approx(-1)
    assert float(relative_l1(a, b)) == pytest.approx(7 / 4)
    assert float(relative_l2(a, b)) == pytest.approx(5 / 4)
    big = torch.full((4, 5, 6), 1e30)
    assert float(relative_l2(big, 2 * big)) == pytest.approx(0.5)


def test_inputs_are_left_alone():
    video, reference = clips(2, 3, 16, 16)
    copies = video.clone(), reference.clone()
    for measure in (psnr, ssim, cosine, relative_l1, relative_l2):
        measure(video, reference)
    assert torch.equal(video, copies[0]) and torch.equal(reference, copies[1])


@pytest.mark.parametrize(
    ("video", "reference", "message"),
    [
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"unsqueeze\(0\)"),
        (torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16), "differ"),
        (torch.full((1, 3, 16, 16), 255.0), torch.zeros(1, 3, 16, 16), "divide by 255"),
        (torch.full((1, 3, 16, 16), -1.0), torch.zeros(1, 3, 16, 16), "-1 to"),
        (torch.full((1, 3, 16, 16), math.nan), torch.zeros(1, 3, 16, 16), "nan"),
        (torch.zeros(1, 3, 16, 16).int(), torch.zeros(1, 3, 16, 16).int(), "int32"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), r"\(0, 3, 16, 16\)"),
    ],
)
def test_bad_input_says_what_is_wrong(video, reference, message):
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=message):
            measure(video, reference)


def test_frames_below_the_window():
    with pytest.raises(ValueError, match="10x16.*11x11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(fidelity)
    assert result.attempted > 0 and result.failed == 0
