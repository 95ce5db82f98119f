import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from gen_accel import AttentionPlan, ParoProcessor, apply, calibrate
from gen_accel.calibration import step_groups
from helpers import tiny

STEPS = 10


@pytest.mark.parametrize(
    "steps, dense, groups, expected",
    [
        (10, 2, 1, [None, None, 0, 0, 0, 0, 0, 0, 0, 0]),
        (10, 2, 4, [None, None, 0, 0, 1, 1, 2, 2, 3, 3]),
        (10, 2, "paper", [None, None, 0, 1, 2, 3, 3, 3, 3, 3]),
        (6, 0, "paper", [0, 1, 2, 3, 3, 3]),
        (7, 6, "paper", [None] * 6 + [0]),
        (4, 1, 9, [None, 0, 1, 2]),
        (3, 3, 2, [None] * 3),
    ],
)
def test_step_groups(steps, dense, groups, expected):
    assert step_groups(steps, dense, groups) == expected


def make(build, **changes):
    pipe, call = build()
    prompt = call.pop("prompt")
    call.update(num_inference_steps=STEPS, progress=False, block=16, **changes)
    return pipe, prompt, call


def test_a_plan_is_made_saved_and_used(tmp_path):
    pipe, prompt, call = make(tiny.tiny_wan)
    plan = calibrate(pipe, [prompt, "a dog"], density=0.3, groups=4, **call)
    assert all(type(p) is WanAttnProcessor for p in pipe.transformer.attn_processors.values())
    component = plan.components["transformer"]
    assert sorted(component.layers) == [0, 1]
    assert len(component.sigmas) == 4
    assert list(component.sigmas) == sorted(component.sigmas, reverse=True)
    masks = component.layers[0].masks
    assert masks.shape == (4, 2, 7, 7)
    assert masks[0].float().mean() == pytest.approx(0.3, abs=0.01)
    assert not torch.equal(masks[0], masks[3]), "early and late steps differ"
    assert plan.info["prompts"] == 2 and plan.info["steps"] == STEPS
    assert plan.info["seconds"] > 0 and 0.3 < plan.mass_kept() < 1

    path = plan.save(tmp_path / "plan.safetensors")
    _, run = tiny.tiny_wan()
    # Keyed by noise level: the plan holds for another number of steps.
    for steps in (STEPS, 7):
        with apply(pipe, ParoProcessor(plan=AttentionPlan.load(path), min_tokens=0)) as handle:
            assert tiny.run(pipe, **{**run, "num_inference_steps": steps}).isfinite().all()
            stats = handle.stats()["transformer"]
            assert stats.sparse == 4 * (steps - 2) and "calibrate" not in stats.seconds


def test_the_papers_groups():
    pipe, prompt, call = make(tiny.tiny_hunyuan)
    plan = calibrate(pipe, prompt, groups="paper", **call)
    assert len(plan.components["transformer"].sigmas) == 4  # steps 2, 3, 4 and the second half


def test_two_transformers_share_the_schedule():
    pipe, prompt, call = make(tiny.tiny_wan22)
    plan = calibrate(pipe, prompt, groups=2, **{**call, "dense_steps": 0.0})
    parts = plan.components
    assert set(parts) == {"transformer", "transformer_2"}
    assert all(len(part.layers) == 2 for part in parts.values())


def test_prompts_may_be_whole_calls():
    pipe, prompt, call = make(tiny.tiny_wan_i2v)
    image = call.pop("image")
    plan = calibrate(pipe, [{"prompt": prompt, "image": image}], groups=1, **call)
    assert str(plan.grid) == "5x4x6"


def test_raster_is_an_ablation():
    pipe, prompt, call = make(tiny.tiny_flux)
    plan = calibrate(pipe, prompt, groups=1, order="raster", **call)
    assert {o for p in plan.components["transformer"].layers.values() for o in p.orders.heads} == {
        0
    }


@pytest.mark.parametrize(
    "prompts, changes, message",
    [
        ([], {}, "give one or two prompts"),
        (["a"], dict(density=0.0), "density=0.0"),
        (["a"], dict(groups=0), "groups=0"),
        (["a"], dict(groups="some"), "groups='some'"),
        (
            ["a"],
            dict(dense_steps=1.0),
            "nothing to calibrate: every attention call stays dense .first 100% of the steps",
        ),
    ],
)
def test_bad_input(prompts, changes, message):
    pipe, _, call = make(tiny.tiny_wan)
    with pytest.raises(ValueError, match=message):
        calibrate(pipe, prompts, **{**call, **changes})
    assert all(type(p) is WanAttnProcessor for p in pipe.transformer.attn_processors.values())


@pytest.mark.parametrize("own", [dict(num_frames=9), dict(num_inference_steps=3)], ids=str)
def test_runs_that_no_plan_can_be_for_together(own):
    pipe, prompt, call = make(tiny.tiny_wan)
    with pytest.raises(ValueError, match="a plan is for one grid and number of steps"):
        calibrate(pipe, [{"prompt": prompt}, {"prompt": prompt, **own}], **call)


def test_nan_in_the_model_is_named():
    pipe, prompt, call = make(tiny.tiny_wan)
    torch.nn.init.constant_(pipe.transformer.blocks[1].attn1.to_q.bias, float("nan"))
    with pytest.raises(ValueError, match="layer .: its queries or keys contain NaN"):
        calibrate(pipe, prompt, **call)
