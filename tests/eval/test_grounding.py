import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_accel.eval import grounding
from gen_accel.eval.grounding import (
    average_precision,
    boundary_accuracy,
    iou,
    j_and_f,
    pointing,
    region_similarity,
)
from gen_accel.eval.metrics import METRICS


def mask(*rows):
    return torch.tensor([[c == "#" for c in row] for row in rows])[None]


def box(top, left, height, width, size=40):
    image = torch.zeros(1, size, size, dtype=torch.bool)
    image[:, top : top + height, left : left + width] = True
    return image


def random_masks(seed, count=6, size=24):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.avg_pool2d(
        torch.randn(2, count, size + 6, size + 6, generator=generator), 7, stride=1
    )
    return smooth > 0.05


HALF = mask("##..", "##..", "....", "....")
SHIFTED = mask(".##.", ".##.", "....", "....")
NOTHING = torch.zeros_like(HALF)


def test_iou_on_hand_made_masks():
    assert float(iou(HALF, HALF)) == 1
    assert float(iou(HALF, SHIFTED)) == pytest.approx(2 / 6)
    assert float(iou(HALF, NOTHING)) == 0
    assert float(iou(NOTHING, NOTHING)) == 1


def test_overall_mean_and_generalised_iou_differ_as_they_should():
    small, large = box(0, 0, 2, 2), box(0, 0, 20, 20)
    prediction = torch.stack([small, box(0, 0, 20, 10), small, torch.zeros_like(small)])
    target = torch.stack([small, large, torch.zeros_like(small), torch.zeros_like(small)])
    # intersections 4, 200, 0, 0; unions 4, 400, 4, 0
    assert METRICS["oiou"](prediction, target) == pytest.approx(204 / 408)
    assert METRICS["miou"](prediction, target) == pytest.approx((1 + 0.5) / 2)
    assert METRICS["giou"](prediction, target) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    running = METRICS["oiou"].accumulator()
    for p, t in zip(prediction, target, strict=True):  # a sum of ratios would give another number
        running.update(p, t)
    assert running.compute() == pytest.approx(204 / 408)


def test_miou_needs_a_target():
    with pytest.raises(ValueError, match="no sample has a target"):
        METRICS["miou"](HALF, NOTHING)


def test_iou_agrees_with_torchmetrics():
    jaccard = pytest.importorskip("torchmetrics.functional.classification").binary_jaccard_index
    prediction, target = random_masks(0)
    assert METRICS["oiou"](prediction[:, None], target[:, None]) == pytest.approx(
        float(jaccard(prediction.int(), target.int())), abs=1e-6
    )
    per_frame = region_similarity(prediction, target, per_frame=True)
    for ours, p, t in zip(per_frame, prediction, target, strict=True):
        assert float(ours) == pytest.approx(float(jaccard(p.int(), t.int())), abs=1e-6)
    assert float(region_similarity(prediction, target)) == pytest.approx(float(per_frame.mean()))


def davis_f(prediction, target):
    """DAVIS' boundary measure with scipy and scikit-image, for one frame."""
    ndimage = pytest.importorskip("scipy.ndimage")
    disk = pytest.importorskip("skimage.morphology").disk

    def boundary(m):
        edge = np.zeros_like(m)
        for y in range(m.shape[0]):
            for x in range(m.shape[1]):
                neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
                inside = [n for n in neighbours if n[0] < m.shape[0] and n[1] < m.shape[1]]
                edge[y, x] = any(m[n] != m[y, x] for n in inside)
        return edge

    radius = int(np.ceil(0.008 * np.linalg.norm(prediction.shape)))
    p, t = boundary(prediction), boundary(target)
    if not p.any() and not t.any():
        return 1.0
    if not p.any() or not t.any():
        return 0.0
    precision = (p & ndimage.binary_dilation(t, disk(radius))).sum() / p.sum()
    recall = (t & ndimage.binary_dilation(p, disk(radius))).sum() / t.sum()
    return 2 * precision * recall / max(precision + recall, 1e-12)


@pytest.mark.parametrize("size", [24, 150, 260])  # disks of radius 1, 2 and 3
def test_boundary_accuracy_agrees_with_scipy(size):
    prediction, target = random_masks(1, count=2, size=size)
    target[1] = prediction[1].roll((1, 2), (0, 1))
    ours = boundary_accuracy(prediction, target, per_frame=True)
    wanted = [davis_f(p.numpy(), t.numpy()) for p, t in zip(prediction, target, strict=True)]
    assert ours.tolist() == pytest.approx(wanted, abs=1e-9)
    assert min(wanted) > 0 and max(wanted) < 1


def test_boundary_accuracy_on_hand_made_masks():
    square = box(10, 10, 12, 12)
    assert float(boundary_accuracy(square, square)) == 1
    assert float(boundary_accuracy(square, box(11, 10, 12, 12))) > 0.95  # within a pixel
    assert float(boundary_accuracy(box(2, 2, 5, 5), box(30, 30, 5, 5))) == 0
    empty = torch.zeros_like(square)
    assert float(boundary_accuracy(empty, empty)) == 1
    assert float(boundary_accuracy(square, empty)) == float(boundary_accuracy(empty, square)) == 0
    # The same area apart from a comb on one side: J hardly moves, F does.
    comb = square.clone()
    comb[:, 5:10, 10:22:2] = True
    assert float(region_similarity(comb, square)) > 0.8
    assert float(boundary_accuracy(comb, square)) < 0.75


def test_j_and_f_is_the_mean_of_both():
    prediction, target = random_masks(2)
    both = (region_similarity(prediction, target) + boundary_accuracy(prediction, target)) / 2
    assert float(j_and_f(prediction, target)) == pytest.approx(float(both))
    assert j_and_f(prediction, target, per_frame=True).shape == (6,)


def test_pointing():
    heat = torch.zeros(1, 4, 4)
    heat[0, 0, 1] = 1
    assert float(pointing(heat, HALF)) == 1
    heat[0, 3, 3] = 1  # a tie with a pixel outside
    assert float(pointing(heat, HALF)) == 0.5
    assert float(pointing(torch.zeros(1, 4, 4), HALF)) == pytest.approx(4 / 16)  # chance
    heats = torch.stack([heat, -heat])
    assert pointing(heats, HALF[None].expand(2, 1, 4, 4)).tolist() == pytest.approx([0.5, 3 / 14])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.sampled_from([2, 5, 1000]))
def test_average_precision_agrees_with_torchmetrics(seed, levels):
    oracle = pytest.importorskip("torchmetrics.functional.classification").binary_average_precision
    generator = torch.Generator().manual_seed(seed)
    heat = torch.randint(0, levels, (2, 3, 5, 6), generator=generator) / levels  # with ties
    target = torch.rand(2, 3, 5, 6, generator=generator) < 0.3
    target[:, 0, 0, 0] = True
    ours = average_precision(heat, target)
    for i in range(2):
        wanted = float(oracle(heat[i].flatten(), target[i].flatten().int()))
        assert float(ours[i]) == pytest.approx(wanted, abs=1e-5)


def test_average_precision_by_hand():
    label = torch.tensor([[[True, False, True, False]]])
    heat = torch.tensor([[[4.0, 3.0, 2.0, 1.0]]])
    assert float(average_precision(heat, label)) == pytest.approx(5 / 6)


def test_average_precision_of_perfect_constant_and_reversed_maps():
    assert float(average_precision(HALF.float(), HALF)) == 1
    assert float(average_precision(torch.ones(1, 4, 4), HALF)) == pytest.approx(0.25)
    assert float(average_precision(-HALF.float(), HALF)) == pytest.approx(0.25)


def test_bad_input_is_one_line():
    region = [iou, region_similarity, boundary_accuracy, j_and_f, grounding.areas]
    for measure in region:
        with pytest.raises(ValueError, match="prediction of dtype torch.float32"):
            measure(HALF.float(), HALF)
        with pytest.raises(ValueError, match="target of dtype torch.int64"):
            measure(HALF, HALF.long())
        with pytest.raises(ValueError, match="shapes"):
            measure(HALF, HALF[:, :3])
        with pytest.raises(ValueError, match="unsqueeze"):
            measure(HALF[0], HALF[0])
    for measure in (pointing, average_precision):
        with pytest.raises(ValueError, match="without a pixel"):
            measure(HALF.float(), NOTHING)
        with pytest.raises(ValueError, match="finite"):
            measure(HALF.float() / 0, HALF)
        with pytest.raises(ValueError, match="floats"):
            measure(HALF, HALF)
