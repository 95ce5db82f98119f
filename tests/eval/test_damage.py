import pytest
import torch

from gen_accel.eval.damage import (
    DAMAGE_WORLD,
    KINDS,
    STRENGTHS,
    concordance,
    damage,
    damage_series,
    world_samples,
)
from gen_accel.eval.metric import Metric
from gen_accel.eval.metrics import METRICS


@pytest.fixture(scope="module")
def samples():
    from dataclasses import replace

    return list(world_samples(3, replace(DAMAGE_WORLD, size=32)))


@pytest.mark.parametrize("kind", KINDS)
def test_stronger_damage_is_further_from_the_clip(samples, kind):
    for sample in samples:
        errors = [
            float((damage(sample, kind, k) - sample.video).square().mean()) for k in STRENGTHS
        ]
        assert errors == sorted(errors) and errors[0] > 0 and errors[-1] > 2 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_a_clip_the_same_each_time_and_not_in_place(samples, kind):
    before = samples[0].video.clone()
    once, again = damage(samples[0], kind, 3), damage(samples[0], kind, 3)
    assert torch.equal(once, again) and torch.equal(samples[0].video, before)
    assert once.shape == before.shape and 0 <= float(once.min()) <= float(once.max()) <= 1
    assert torch.equal(damage(samples[0], kind, 0), before)


def test_what_each_kind_does(samples):
    sample = samples[0]
    shuffled = damage(sample, "shuffle", 5)
    found = [(sample.video - f).abs().amax((1, 2, 3)).argmin() for f in shuffled]
    order = torch.stack(found)
    assert sorted(order.tolist()) == list(range(17))  # every frame is still there
    assert (order != torch.arange(17)).sum() == 16 and (order - torch.arange(17)).abs().max() == 1
    noise = damage(sample, "noise", 2) - sample.video
    inside = (sample.video > 0.1) & (sample.video < 0.9)
    assert float(noise[inside].std()) == pytest.approx(0.02, rel=0.05)
    gone = damage(sample, "object loss", 5)
    assert torch.allclose(gone, sample.without) and bool(sample.mask.any())
    strobe = (damage(sample, "flicker", 4) - sample.video)[inside]
    assert strobe.abs().median() == pytest.approx(0.08, abs=1e-6)
    blurred = damage(sample, "blur", 5)
    assert float(blurred.mean()) == pytest.approx(float(sample.video.mean()), abs=0.02)
    assert float(blurred.std()) < float(sample.video.std())


def test_temporal_metrics_rank_shuffle_and_flicker(samples):
    names = ("flicker", "flicker_compensated", "warp_error")
    series = damage_series(samples[:2], [METRICS[n] for n in (*names, "psnr")])
    for name in names:
        for kind in ("shuffle", "flicker"):
            assert concordance(series[name, kind]) > 0.95, (name, kind)
        # ... and do not see that an object is gone, which is why they are not alone.
        assert concordance(series[name, "object loss"]) < 0.7
    for kind in KINDS:
        assert concordance(series["psnr", kind]) > 0.99


def states(metric, columns):
    """States whose clips have these values."""
    made = []
    for column in columns:
        state = metric.accumulator()
        for value in column:
            state.update(torch.tensor(float(value)))
        made.append(state)
    return made


def test_concordance_counts_pairs_in_order():
    lower = Metric("x", lambda video: video, "", "lower", "a number")
    higher = Metric("x", lambda video: video, "", "higher", "a number")
    assert concordance(states(lower, [[0, 0], [1, 2], [2, 3]])) == 1
    assert concordance(states(higher, [[0, 0], [1, 2], [2, 3]])) == 0
    assert concordance(states(lower, [[1, 1]] * 3)) == 0.5
    assert concordance(states(lower, [[0], [2], [1]])) == pytest.approx(2 / 3)
    pooled = Metric("x", lambda video: video, "", "lower", "", pool=torch.max, axes=0)
    assert concordance(states(pooled, [[0], [1]])) == 1


def test_a_metric_of_sets_is_judged_on_its_one_number():
    spread = Metric(
        "spread", lambda video: video[None], "", "lower", "a number", axes=1,
        pool=lambda rows: rows.max() - rows.min(),
    )  # fmt: skip
    columns = [[5, 5], [4, 5], [1, 5]]
    assert concordance(states(spread, columns)) == 1


def test_bad_damage(samples):
    with pytest.raises(ValueError, match="'rust'.*kinds are noise, blur"):
        damage(samples[0], "rust", 1)
    with pytest.raises(ValueError, match="strength 6.*0 to 5"):
        damage(samples[0], "noise", 6)
