import doctest

import pytest
import torch

from gen_accel.eval import metric as module
from gen_accel.eval.metrics import METRICS, get
from helpers.clips import drift, patch_tokens

NETWORKS = {
    "lpips": lambda a, b: (a - b).abs().mean((1, 2, 3)),
    "dino": lambda frames: frames.flatten(1) - 0.5,
    "dino-tokens": patch_tokens,
}
CLIPS = [
    name
    for name, metric in METRICS.items()
    if metric.network in (None, *NETWORKS) and "video" in metric.needs
]
MASKS = [name for name, metric in METRICS.items() if "prediction" in metric.needs]


def inputs(name, seed=0, frames=4, size=32):
    """What a metric needs, as keywords."""
    metric = METRICS[name]
    reference = drift(frames=frames, size=size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 60, reference.shape, generator=generator)
    video = (reference.int() + noise).clamp(0, 255).to(torch.uint8)
    mask = torch.zeros(frames, size, size, dtype=torch.bool)
    mask[:, 9:20, 5 + seed : 17 + seed] = True
    target = mask.roll(3, 2)
    heat = name in ("pointing", "average_precision")
    given = {
        "video": video,
        "reference": reference,
        "mask": mask,
        "network": NETWORKS.get(metric.network),
        "prediction": reference[:, 0] / 255 if heat else mask,
        "target": target,
    }
    return {key: given[key] for key in metric.needs}


def stacked(*many):
    return {
        key: torch.stack([one[key] for one in many]) if isinstance(value, torch.Tensor) else value
        for key, value in many[0].items()
    }


@pytest.mark.parametrize("name", CLIPS + MASKS)
def test_a_stream_a_batch_and_single_clips_agree(name):
    metric, many = METRICS[name], [inputs(name, seed) for seed in range(3)]
    single = torch.cat([metric.clips(**one) for one in many])
    assert torch.allclose(metric.clips(**stacked(*many)), single, atol=1e-12)
    running = metric.accumulator()
    running.update(**many[0])
    running.update(**stacked(*many[1:]))
    assert torch.allclose(running.values, single, atol=1e-12)
    assert running.compute() == pytest.approx(metric(**stacked(*many)))
    assert isinstance(running.compute(), float)
    running.reset()
    running.update(**many[1])
    assert running.compute() == pytest.approx(metric(**many[1]))


@pytest.mark.parametrize("name", CLIPS)
def test_uint8_equals_its_float(name):
    given = inputs(name)
    floats = {
        k: v / 255 if isinstance(v, torch.Tensor) and v.dtype == torch.uint8 else v
        for k, v in given.items()
    }
    assert METRICS[name](**floats) == pytest.approx(METRICS[name](**given), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", CLIPS + MASKS)
def test_inputs_are_left_alone(name):
    given = inputs(name)
    tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
    copies = {k: v.clone() for k, v in tensors.items()}
    METRICS[name](**given)
    assert all(torch.equal(tensors[k], copies[k]) for k in tensors)


@pytest.mark.parametrize("name", [n for n in CLIPS + MASKS if METRICS[n].per_frame])
def test_values_per_frame(name):
    metric, given = METRICS[name], inputs(name)
    values = metric.per_frame(**given)
    assert values.shape in ((3,), (4,))
    if name not in ("cosine", "relative_l1", "relative_l2"):  # those pool their sums
        assert float(values.mean()) == pytest.approx(metric(**given))
    batch = metric.per_frame(**stacked(given, given))
    assert torch.allclose(batch, values.expand_as(batch))


@pytest.mark.parametrize("name", [n for n in CLIPS if "reference" in METRICS[n].needs])
def test_a_video_of_other_shape_is_refused(name):
    given = inputs(name)
    given["video"] = given["video"][:-1]
    with pytest.raises(ValueError, match="differ") as error:
        METRICS[name](**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CLIPS)
def test_values_out_of_range_are_refused(name):
    changes = [lambda v: v.float(), lambda v: v / 255 * torch.nan]
    for change in changes[: 1 if name == "defects" else 2]:  # a detector of NaN takes NaN
        given = inputs(name)
        given["video"] = change(given["video"])
        with pytest.raises(ValueError, match="divide by 255") as error:
            METRICS[name](**given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_explains_itself(name):
    metric = METRICS[name]
    assert metric.name == name and "\n" not in metric.definition and metric.definition
    assert metric.better in ("higher", "lower")
    assert ("network" in metric.needs) == (metric.network is not None)
    known = {"video", "reference", "mask", "prompt", "network", "prediction", "target"}
    assert metric.needs and set(metric.needs) <= known


def test_an_unknown_metric():
    with pytest.raises(ValueError, match="'sssim'; did you mean 'ssim'"):
        get("sssim")
    with pytest.raises(ValueError, match="choose from psnr"):
        get("xyz")


def test_nothing_to_compute():
    with pytest.raises(ValueError, match="psnr: no clip yet"):
        METRICS["psnr"].accumulator().compute()


def test_the_state_keeps_values_and_not_clips():
    running = METRICS["psnr"].accumulator()
    for seed in range(3):
        running.update(drift(seed=seed), drift(seed=seed + 1))
    assert running.values.shape == (3,) and running.values.dtype == torch.float64


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
