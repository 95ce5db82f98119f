import doctest
import logging
from types import SimpleNamespace

import pytest
import torch

from gen_accel.eval import guard as module
from gen_accel.eval.guard import BrokenVideo, Guard, Limits, StepGuard, check, defects
from helpers.clips import drift
from helpers.tiny import tiny_wan


def found(video, reference=None, **limits):
    return [(f.kind, f.first, f.last) for f in check(video, reference, Limits(**limits))]


def moving(frames=9, **kwargs):
    return drift(frames=frames, size=48, grain=16, **kwargs) / 255


def test_a_good_clip_has_no_findings():
    assert found(moving()) == [] and found((255 * moving()).round().byte()) == []


def test_black_frames():
    video = moving()
    video[3:6] *= 0.05
    assert found(video) == [("black", 3, 5)]
    video[4, :, :20] = 0.5
    assert found(video) == [("black", 3, 3), ("black", 5, 5)]
    assert found(torch.zeros(9, 3, 48, 48)) == [("black", 0, 8)]  # and not frozen as well


def test_frames_that_are_not_finite():
    video = moving()
    video[0, 0, 0, 0], video[4:6, :, :24] = torch.nan, torch.inf
    findings = check(video)
    assert [(f.kind, f.first, f.last) for f in findings] == [("nan", 0, 0), ("nan", 4, 5)]
    assert findings[1].value == pytest.approx(0.5)
    assert found(video.half()) == [("nan", 0, 0), ("nan", 4, 5)]


def test_frozen_frames():
    video = moving()
    video[3:7] = video[2]  # four still pairs
    assert found(video) == [("frozen", 3, 6)]
    assert found(video, pairs=5) == []
    video = moving()
    video[3:5] = video[2]  # two, as in animation drawn on threes
    assert found(video) == []


def test_flicker_is_a_jump_and_back():
    video = 0.25 + 0.5 * moving(shift=(0, 0))
    video = video + 0.0005 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    flash = video.clone()
    flash[4] += 0.06
    assert found(flash, still=0) == [("flicker", 4, 4)]
    strobe = video.clone()
    strobe[1::2] -= 0.06
    assert found(strobe, still=0) == [("flicker", 1, 7)]
    patches = video.clone()
    patches[1::2, :, :24], patches[::2, :, 24:] = (
        patches[1::2, :, :24] + 0.1,
        patches[::2, :, 24:] + 0.1,
    )
    assert abs(float(patches[1].mean() - patches[2].mean())) < 0.01  # global brightness is steady
    assert found(patches, still=0) == [("flicker", 1, 7)]


def test_cuts_fades_and_motion_do_not_flicker():
    cut = torch.cat([0.2 + 0 * moving()[:4], 0.8 + 0 * moving()[:5]])
    fade = torch.linspace(0.2, 0.9, 9).view(-1, 1, 1, 1).expand(9, 3, 48, 48)
    for video in (cut, fade, moving(shift=(4, 3))):
        assert not [f for f in found(video, pairs=99) if f[0] == "flicker"]


def test_what_the_reference_has_is_no_fault():
    still = moving(shift=(0, 0))
    assert found(still) == [("frozen", 1, 8)]
    assert found(still, still) == []
    assert found(still, moving()) == [("frozen", 1, 8)]


def test_a_stream_finds_what_the_whole_clip_shows():
    video = moving()
    video[3:6] = 0
    video[7] += 0.1
    video = video.clamp(0, 1)
    guard = Guard()
    for chunk in video.split(2):
        guard.update(chunk)
    assert guard.compute() == check(video) and len(guard.compute()) >= 2
    guard.reset()
    guard.update(moving())
    assert guard.compute() == []


def test_defects_is_the_share_of_broken_frames():
    video, reference = moving(frames=10), moving(frames=10)
    video[2:4] = 0
    video[5] = torch.nan
    values = defects(torch.stack([video, reference]), torch.stack([reference, reference]))
    assert values.tolist() == [pytest.approx(0.3), 0.0]
    assert defects(video, reference, per_frame=True).nonzero().flatten().tolist() == [2, 3, 5]


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="divide by 255"):
        check(255 * moving())
    with pytest.raises(ValueError, match="differ"):
        check(moving(), moving()[:5])
    with pytest.raises(ValueError, match="one clip, not a batch"):
        check(moving()[None])
    guard = Guard()
    guard.update(moving()[:4])
    with pytest.raises(ValueError, match="4 of the reference|every update"):
        guard.update(moving()[4:], moving()[4:])
    with pytest.raises(ValueError, match="action='halt'"):
        StepGuard(action="halt")
    with pytest.raises(ValueError, match="every=0"):
        StepGuard(every=0)


# ---- during generation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan():
    pipe, call = tiny_wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "num_inference_steps": 6}


def poisoned(pipe, from_call, value):
    """A hook that spoils what the transformer returns."""
    calls = []

    def hook(_, __, output):
        calls.append(None)
        if len(calls) >= from_call:
            first = output[0] if isinstance(output, tuple) else output.sample
            first.fill_(value)

    return calls, pipe.transformer.register_forward_hook(hook)


def test_a_healthy_run_has_no_findings(wan):
    pipe, call = wan
    guard = StepGuard()
    pipe(**call, callback_on_step_end=guard)
    assert guard.findings == []


def test_nan_is_found_at_its_step_and_stops_the_run(wan, caplog):
    pipe, call = wan
    passes = 2 if call.get("guidance_scale", 5) > 1 else 1
    for action in ("stop", "record", "raise"):
        guard = StepGuard(action=action)
        calls, handle = poisoned(pipe, 2 * passes + 1, torch.nan)
        try:
            with caplog.at_level(logging.WARNING):
                if action == "raise":
                    with pytest.raises(BrokenVideo, match="step 3 of 6: latents are not finite"):
                        pipe(**call, callback_on_step_end=guard)
                else:
                    pipe(**call, callback_on_step_end=guard)
        finally:
            handle.remove()
        assert guard.findings[0] == (2, "latents are not finite (1 of them)")
        assert len(calls) == passes * (6 if action == "record" else 3)
    assert "step 3 of 6: latents are not finite" in caplog.text


def test_the_preview_is_where_the_velocity_leads():
    """A flow from noise to a known clip: two latents of it tell the clip."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    clean, noise = moving()[None].movedim(1, 2), torch.randn(1, 3, 9, 48, 48)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    seen = []
    guard = StepGuard(decode=lambda z: seen.append(z) or z[0].movedim(0, 1).clamp(0, 1), every=1)
    latents = noise
    for step, t in enumerate(scheduler.timesteps):
        latents = scheduler.step(noise - clean, t, latents, return_dict=False)[0]
        tensors = {"latents": latents}
        assert guard(SimpleNamespace(scheduler=scheduler), step, t, tensors) is tensors
    assert len(seen) == 6  # from half of the steps on
    assert all(torch.allclose(z, clean, atol=1e-4) for z in seen)
    assert guard.findings == []


def test_the_preview_finds_black_before_the_last_step():
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise = torch.randn(1, 3, 9, 24, 24)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    pipe = SimpleNamespace(scheduler=scheduler, _interrupt=False)
    guard = StepGuard(
        decode=lambda z: z[0].movedim(0, 1).clamp(0, 1), every=2, start=0.6, action="stop"
    )
    latents = noise
    for step, t in enumerate(scheduler.timesteps):
        if pipe._interrupt:
            continue
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]  # to zero
        guard(pipe, step, t, {"latents": latents})
    assert guard.findings == [(5, "frames 0 to 8: black (1, limit 0.98)")]


def test_no_preview_of_a_scheduler_that_is_no_flow():
    scheduler = SimpleNamespace(timesteps=range(4), sigmas=torch.tensor([14.0, 3.0, 1.0, 0.3, 0]))
    guard = StepGuard(decode=lambda z: pytest.fail("decoded"), every=1, start=0)
    for step in range(4):
        guard(SimpleNamespace(scheduler=scheduler), step, 0, {"latents": torch.randn(1, 4, 8)})


def test_collapsed_latents():
    scheduler = SimpleNamespace(timesteps=range(4))
    guard = StepGuard()
    guard(SimpleNamespace(scheduler=scheduler), 1, 0, {"latents": torch.full((1, 4, 3, 8, 8), 0.7)})
    assert guard.findings[0][1].startswith("latents have collapsed (deviation")


def test_a_pipeline_that_cannot_be_stopped():
    with pytest.raises(ValueError, match="SimpleNamespace cannot be interrupted.*'raise'"):
        StepGuard(action="stop")(SimpleNamespace(), 0, 0, {"latents": torch.zeros(1)})


def test_latents_have_to_be_among_the_tensors():
    with pytest.raises(ValueError, match="StepGuard needs 'latents'.*callback_on_step_end_tensor"):
        StepGuard()(SimpleNamespace(), 0, 0, {"prompt_embeds": torch.zeros(1)})


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
