import math

import numpy as np
import pytest
import scipy.stats

from gen_accel.eval.verdict import Limit, judge, overall, rank, ratio_interval, sparsest, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 31, 200])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.9, 0.975, 0.999])
def test_t_quantile_against_scipy(freedom, share):
    assert t_quantile(share, freedom) == pytest.approx(
        scipy.stats.t.ppf(share, freedom), rel=1e-9, abs=1e-9
    )


def test_limits_read_as_they_are_written():
    limit = Limit.parse(" psnr>=25 ")
    assert (limit.metric, limit.kind, limit.bound) == ("psnr", "value", 25)
    assert limit.margin(27) == 2 and limit.margin(24) == -1
    limit = Limit.parse("clip_drop<=0.5")
    assert (limit.metric, limit.kind) == ("clip_score", "drop")
    assert limit.margin(29.8, 30) == pytest.approx(0.3)
    limit = Limit.parse("flicker<=1.1x")  # of what is missing to a still
    assert limit.margin(0.97, 0.98) == pytest.approx(1.1 * 0.02 - 0.03)
    limit = Limit.parse("warp_error<=2x")
    assert limit.margin(0.3, 0.1) == pytest.approx(-0.1)
    limit = Limit.parse("relative_l1 <= 0.2")
    assert limit.margin(0.05) == pytest.approx(0.15)
    assert Limit.parse("clip_temp_drop<=0.01").metric == "clip_temp"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnr", "METRIC>=NUMBER"),
        ("psnr=25", "METRIC>=NUMBER"),
        ("psnr>=1e", "not a number"),
        ("psrn>=25", "did you mean"),
        ("psnr<=25", "higher is better"),
        ("relative_l1>=0.1", "lower is better"),
        ("psnr_drop<=1", "compares with the dense clip already; write psnr>=NUMBER"),
        ("ssim<=1.1x", "already"),
        ("clip_drop>=1", "write <="),
        ("clip_drop<=1x", "not both"),
        ("clip<=1.1x", "clip_drop"),
        ("clip_drop<=-1", "positive"),
        ("flicker<=0x", "positive"),
        ("fvd_toy<=3", "no value for a single clip"),
        ("miou>=0.5", "no value for a single clip"),
        ("background_psnr>=3", "no value for a single clip"),
    ],
)
def test_limits_without_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Limit.parse(text)


def test_a_mean_with_its_interval_against_scipy():
    values = [26.0, 27.5, 25.2, 29.0]
    found = judge(Limit.parse("psnr>=25"), values)
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.worst, found.worst_clip, found.n) == (25.2, 2, 4)


@pytest.mark.parametrize(
    ("bound", "state"), [(20, "pass"), (26.5, "back off"), (27.5, "back off"), (40, "fail")]
)
def test_the_interval_decides(bound, state):
    assert judge(Limit.parse(f"psnr>={bound}"), [26.0, 27.5, 25.2, 29.0]).state == state


def test_pairs_cancel_what_a_prompt_does_to_both():
    """Clips spread over ten points, the drop is half a point everywhere: it is seen at once."""
    dense = [20.0, 24.0, 27.0, 30.0]
    sparse = [d - 0.5 - 0.01 * i for i, d in enumerate(dense)]
    assert judge(Limit.parse("clip_drop<=0.6"), sparse, dense).state == "pass"
    assert judge(Limit.parse("clip_drop<=0.4"), sparse, dense).state == "fail"
    found = judge(Limit.parse("clip_drop<=0.6"), sparse, dense)
    difference = np.subtract(dense, sparse)
    assert found.mean == pytest.approx(difference.mean())
    assert found.worst == pytest.approx(0.53) and found.worst_clip == 3
    interval = scipy.stats.t.interval(0.95, 3, difference.mean(), scipy.stats.sem(difference))
    assert (found.low, found.high) == pytest.approx(interval)


def test_a_ratio_is_that_of_the_means():
    dense, sparse = [0.98, 0.96, 0.99], [0.977, 0.950, 0.990]
    found = judge(Limit.parse("flicker<=1.1x"), sparse, dense)
    assert found.mean == pytest.approx((0.023 + 0.050 + 0.010) / (0.02 + 0.04 + 0.01))
    assert found.low < found.mean < found.high and found.worst_clip == 1
    assert found.worst == pytest.approx(0.050 / 0.04)
    # The interval and the verdict agree about where the limit is.
    assert (found.high <= 1.1) == (found.state == "pass")


def test_the_interval_of_a_ratio():
    above, below = [2.3, 5.0, 1.1, 3.3], [2.0, 4.0, 1.0, 3.0]
    ratio, half = ratio_interval(above, below)
    assert ratio == pytest.approx(1.17)
    # Against the bootstrap's idea of its error, with t instead of the normal quantile.
    rng = np.random.default_rng(0)
    large, small = rng.normal(3, 0.5, 400), rng.normal(0, 0.2, 400)
    pairs = large, 1.2 * large + small
    resampled = [pairs[1][i].sum() / pairs[0][i].sum() for i in rng.integers(400, size=(2000, 400))]
    found, half = ratio_interval(pairs[1], pairs[0])
    assert half == pytest.approx(1.96 * np.std(resampled), rel=0.1) and abs(found - 1.2) < half
    # What is twice as much in every clip is known exactly, however much clips differ.
    assert ratio_interval([2.0, 8.0, 20.0], [1.0, 4.0, 10.0]) == pytest.approx((2, 0))
    same = judge(Limit.parse("flicker<=1.1x"), [0.9, 0.5, 0.99], [0.9, 0.5, 0.99])
    assert same.state == "pass" and same.high == pytest.approx(1)
    still = judge(Limit.parse("flicker<=1.1x"), [1.0, 0.9, 1.0], [1.0, 1.0, 1.0])
    assert still.state == "fail" and still.mean == math.inf
    still = judge(Limit.parse("flicker<=1.1x"), [1.0, 1.0], [1.0, 1.0])
    assert still.state == "pass" and still.mean == 1


def test_nothing_finite_fails_and_one_clip_is_no_sample():
    found = judge(Limit.parse("psnr>=25"), [30.0, math.nan, 30.0])
    assert found.state == "fail" and found.worst_clip == 1 and "no finite" in found.note
    with pytest.raises(ValueError, match="at least 2"):
        judge(Limit.parse("psnr>=25"), [30.0])
    with pytest.raises(ValueError, match="dense value"):
        judge(Limit.parse("clip_drop<=1"), [30.0, 30.0])
    same = judge(Limit.parse("psnr>=30"), [30.0, 30.0])
    assert same.state == "pass" and same.low == same.high == 30


def test_order_of_settings():
    def found(*values):
        return [judge(Limit.parse("psnr>=25"), [v, v + 0.1, v - 0.1]) for v in values]

    verdicts = {"broken": found(10), "good": found(30), "sparser": found(27), "near": found(24)}
    density = {"broken": 0.02, "good": 0.5, "sparser": 0.3, "near": 0.1}
    assert rank(verdicts, density) == ["sparser", "good", "near", "broken"]
    assert overall(["pass", "fail", "back off"]) == "fail" and overall(["pass"]) == "pass"


@pytest.mark.parametrize("limit", [0.05, 0.12, 0.3, 0.8, 1.0, 1.1])
def test_the_search_finds_the_sparsest_and_tries_few(limit):
    ladder = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    tried = []

    def passes(density):
        tried.append(density)
        return density >= limit

    expected = min((d for d in ladder if d >= limit), default=None)
    assert sparsest(ladder[::-1], passes) == expected
    assert len(tried) == len(set(tried)) <= 5
    for bad in ([], [0.0, 0.5], [1.5]):
        with pytest.raises(ValueError, match="densities"):
            sparsest(bad, passes)
