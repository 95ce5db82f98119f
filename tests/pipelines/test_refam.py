"""RefAM end to end on tiny random pipelines and on the trained toy."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from PIL import Image

from gen_accel import RefAMPipeline, SpaAttnProcessor, SparseProcessor, apply
from gen_accel.eval.toys import load_toy
from gen_accel.eval.world.render import render
from gen_accel.eval.world.scene import TOY, sample_scene
from gen_accel.pipelines.refam import pipeline as module
from gen_accel.pipelines.refam.backbone import Backbone
from gen_accel.pipelines.refam.expression import make_prompt
from gen_accel.pipelines.refam.heatmap import word_shares
from gen_accel.pipelines.refam.pipeline import choose, ground_video
from gen_accel.pipelines.refam.reading import read
from gen_accel.pipelines.refam.sinks import SinkRule
from helpers import tiny

ROOM = {"max_sequence_length": 128}
HUNYUAN = {**ROOM, "prompt_template": {"template": "{}", "crop_start": 0}}
CASES = {
    "flux": (tiny.tiny_flux, ROOM, 1),
    "hunyuan": (tiny.tiny_hunyuan, HUNYUAN, 9),
    "wan": (tiny.tiny_wan, ROOM, 9),
}


def picture(height=64, width=96, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(frames):
    return [picture(seed=i) for i in range(frames)]


@pytest.fixture(scope="module")
def toy():
    return load_toy("hunyuan-video")


@pytest.fixture(scope="module")
def scene():
    return render(sample_scene(3, TOY.__class__(**{**vars(TOY), "counts": (0, 0.5, 0.5)}), "val"))


@pytest.mark.parametrize("direction", ["text", "joint", "rows"])
@pytest.mark.parametrize("case", CASES)
def test_every_family_answers(case, direction):
    make, options, frames = CASES[case]
    refam = RefAMPipeline.from_pipe(make()[0])
    given = {"image": picture()} if frames == 1 else {"video": clip(frames)}
    out = refam(expression="the red ball", direction=direction, seed=1, draws=2, **given, **options)
    assert out.heatmap.shape == out.mask.shape == (frames, 64, 96)
    assert out.mask.dtype == torch.bool and out.mask[out.point]
    assert float(out.heatmap.min()) >= 0 and float(out.heatmap.max()) <= 1 + 1e-6
    assert list(out.words) == ["red", "ball"]
    assert out.words["ball"].shape == out.heatmap.shape
    assert out.magnets[-1] == "pink" and out.prompt.endswith("is pink")
    assert out.variation > 0 and out.score >= 1 and 0 < out.stop_share < 1
    again = refam(expression="the red ball", direction=direction, seed=1, draws=2, **given,
                  **options)  # fmt: skip
    assert torch.equal(again.heatmap, out.heatmap)


@pytest.mark.parametrize("case", ["hunyuan", "wan"])
def test_a_picture_is_a_video_of_one_frame(case):
    make, options, _ = CASES[case]
    refam = RefAMPipeline.from_pipe(make()[0])
    one = refam(image=picture(), expression="the ball", **options)
    same = refam(video=[picture()], expression="the ball", **options)
    assert one.heatmap.shape == (1, 64, 96) and torch.equal(one.heatmap, same.heatmap)


def test_frames_and_sizes_that_do_not_fit_come_back_as_they_were():
    make, options, _ = CASES["hunyuan"]
    video = [picture(70, 90, seed=i) for i in range(6)]
    out = RefAMPipeline.from_pipe(make()[0])(video=video, expression="the ball", **options)
    assert out.heatmap.shape == (6, 70, 90)


def test_what_the_pipeline_is_made_of_stays():
    pipe, call = tiny.tiny_hunyuan()
    handle = apply(pipe, SpaAttnProcessor(dense_steps=1.0, min_tokens=0, block=16))
    before = tiny.run(pipe, **call)
    refam = RefAMPipeline.from_pipe(pipe)
    refam(video=clip(5), expression="the ball", **HUNYUAN)
    assert torch.equal(tiny.run(pipe, **call), before)
    assert refam.transformer is pipe.transformer and handle.components


def test_the_answer_does_not_depend_on_what_ran_before():
    maps = []
    for stopped in (False, True):
        pipe, _ = tiny.tiny_hunyuan()
        apply(pipe, SparseProcessor(density=0.3, dense_steps=0.5, min_tokens=0, block=16))
        if stopped:  # a run that was interrupted in its first step, a dense one
            pipe.scheduler.set_timesteps(4)
            pipe.scheduler.set_begin_index(0)
        refam = RefAMPipeline.from_pipe(pipe)
        out = refam(video=clip(9), expression="the ball", layers=[-1], **HUNYUAN)
        maps.append(out.heatmap)
    assert torch.equal(maps[0], maps[1])


def test_a_reading_is_a_run_of_its_own():
    pipe, call = tiny.tiny_hunyuan()
    handle = apply(pipe, SpaAttnProcessor(dense_steps=1.0, min_tokens=0, block=16))
    tiny.run(pipe, **call)
    whole = handle.stats()["transformer"]
    before = sum(whole.dense.values())
    RefAMPipeline.from_pipe(pipe)(video=clip(9), expression="the ball", **HUNYUAN)
    assert sum(whole.dense.values()) == before
    assert 0 < sum(handle.stats()["transformer"].dense.values()) < before


@pytest.mark.parametrize("case", CASES)
def test_parts_that_are_swapped_take_part(case):
    make, options, frames = CASES[case]
    refam = RefAMPipeline.from_pipe(make()[0])
    given = {"video": clip(frames), "expression": "the ball", **options}
    before = refam(**given).heatmap
    # A scheduler's noise levels are not read, so it may shift as it likes.
    refam.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert torch.equal(refam(**given).heatmap, before)
    refam.transformer = deepcopy(refam.transformer)
    with torch.no_grad():
        for weight in refam.transformer.parameters():
            weight.mul_(1.5)
    assert not torch.equal(refam(**given).heatmap, before)


def test_a_cache_of_diffusers_is_refused_first():
    pipe, _ = tiny.tiny_flux()
    refam = RefAMPipeline.from_pipe(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        refam(image=picture(), expression="the ball", **ROOM)


def test_offloading_changes_nothing():
    pipe, _ = tiny.tiny_hunyuan()
    refam = RefAMPipeline.from_pipe(pipe)
    given = {"video": clip(9), "expression": "the red ball", **HUNYUAN}
    plain = refam(**given).heatmap
    refam.enable_model_cpu_offload(device="cpu:0")
    assert [type(m.hook).__name__ for m in refam._all_hooks] == ["CpuOffload"] * 4
    for _ in range(2):  # hooks are as before when it has answered
        assert torch.equal(refam(**given).heatmap, plain)


def test_save_and_load(tmp_path):
    pipe, _ = tiny.tiny_hunyuan()
    refam = RefAMPipeline.from_pipe(pipe)
    out = refam(video=clip(5), expression="the ball", **HUNYUAN)
    refam.save_pretrained(tmp_path)
    loaded = RefAMPipeline.from_pretrained(tmp_path)
    again = loaded(video=clip(5), expression="the ball", **HUNYUAN)
    torch.testing.assert_close(again.heatmap, out.heatmap, atol=1e-4, rtol=1e-3)


def test_custom_pipeline_from_a_local_path(tmp_path):
    from pathlib import Path

    from diffusers import DiffusionPipeline

    pipe, _ = tiny.tiny_hunyuan()
    pipe.save_pretrained(tmp_path)
    shim = Path(module.__file__).parents[1] / "gen_accel_refam.py"
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(shim), trust_remote_code=True
    )
    assert isinstance(loaded, RefAMPipeline)
    assert loaded(video=clip(5), expression="the ball", **HUNYUAN).mask.any()


def test_the_toy_finds_colours(toy, scene):
    refam = RefAMPipeline.from_pipe(toy)
    for thing, truth in zip(scene.scene.things, scene.objects):
        out = refam(video=scene.video, expression=f"the {thing.colour} object")
        assert truth[out.point]
        inside = out.heatmap[torch.from_numpy(truth)].mean()
        assert inside > 2 * out.heatmap[~torch.from_numpy(truth)].mean()


def test_the_mask_for_object_wiper(toy, scene):
    colour = scene.scene.things[0].colour
    read = torch.from_numpy(scene.video).movedim(-1, 1).mul(255).round().byte()  # as files are
    mask = ground_video(toy, read, f"the {colour} object")
    assert mask.shape == scene.objects[0].shape and mask.dtype == torch.bool
    both = mask & torch.from_numpy(scene.objects[0])
    assert both.sum() > 0.5 * scene.objects[0].sum()


def test_captions_are_read_and_do_not_answer(toy, scene):
    refam = RefAMPipeline.from_pipe(toy)
    colour = scene.scene.things[0].colour
    given = refam(video=scene.video, expression=f"the {colour} object", caption="two objects")
    assert given.prompt.startswith("two objects. the ") and list(given.words) == [colour]

    def captioner(frames):
        assert frames.shape == (9, 3, 32, 32)
        return "two objects"

    made = refam(video=scene.video, expression=f"the {colour} object", caption=captioner)
    assert torch.equal(made.heatmap, given.heatmap)


def test_choices_by_model_and_by_name(toy):
    frozen = choose(toy.transformer)
    assert frozen.source == "validation" and 0 < frozen.sigma < 1
    assert frozen.direction == "joint"
    assert choose(toy.transformer, direction="rows").direction == "rows"
    pipe, _ = tiny.tiny_flux(layers=7)
    other = choose(pipe.transformer)
    assert (
        other.direction == "text"
        and other.source == "middle third"
        and list(other.heads) == [2, 3, 4]
    )
    assert list(choose(pipe.transformer, [0, -1]).heads) == [0, 8]
    for layers in ([1, 2], "middle"):  # noise level and blur are the model's all the same
        given = choose(toy.transformer, layers)
        assert (given.sigma, given.blur) == (frozen.sigma, frozen.blur) != (0.5, 1.0)
    assert (other.sigma, other.blur) == (0.5, 1.0)


def test_the_head_noun_counts_twice(monkeypatch):
    heads = []
    plain = module.aggregate
    monkeypatch.setattr(
        module, "aggregate", lambda m, h, how: (heads.append(h), plain(m, h, how))[1]
    )
    refam = RefAMPipeline.from_pipe(tiny.tiny_flux()[0])
    refam(image=picture(), expression="the red ball", aggregation="head", **ROOM)
    assert set(heads) == {1}, "ball, not red"


def test_sinks_in_the_video_are_no_tokens_of_the_text():
    backbone = Backbone(tiny.tiny_flux()[0], **ROOM)
    latents = backbone.encode(torch.rand(1, 1, 3, 64, 96))
    prompt = make_prompt("the red ball", magnets=("is",))
    reading = read(backbone, latents, [prompt.text], heads={0: None}, joint=False)
    sinks = reading.sinks.clone()
    sinks[:, :4] = True
    clean, sunk = (
        module.answer(backbone, r, prompt, direction="rows")
        for r in (reading, replace(reading, sinks=sinks))
    )
    assert len(sunk.sinks) == 4 and not torch.equal(sunk.maps, clean.maps)
    assert sunk.stop_share == clean.stop_share


def test_one_words_attention_decides(toy, scene, monkeypatch):
    """What is read is the content word: another colour gives another map."""
    refam = RefAMPipeline.from_pipe(toy)
    first, second = scene.scene.things[:2]
    a, b = (refam(video=scene.video, expression=f"the {t.colour} object") for t in (first, second))
    one, two = (torch.from_numpy(m) for m in scene.objects[:2])
    assert a.heatmap[one].mean() > b.heatmap[one].mean()
    assert b.heatmap[two].mean() > a.heatmap[two].mean()


def test_shares_of_text_need_text_alone(toy, scene):
    backbone = Backbone(toy)
    latents = backbone.encode(torch.from_numpy(scene.video).movedim(-1, 1)[None])
    whole, cheap = (
        word_shares(
            read(backbone, latents, ["the red object"], heads={0: None, 3: (1,)}, joint=joint),
            [[1], [0, 2]],
            drop=[3],
        )
        for joint in (True, False)
    )
    torch.testing.assert_close(whole, cheap, atol=1e-5, rtol=1e-3)


class Fake:
    """A segmenter that knows the truth and two wrong masks."""

    def __init__(self, objects):
        self.objects = objects
        self.asked = []
        self.frame = 0

    def masks(self, image, points):
        self.asked.append(points)
        truth = torch.from_numpy(self.objects[0, self.frame])
        part = truth.clone()
        part[:, : truth.shape[1] // 2] = False
        return torch.stack([torch.ones_like(truth), truth, part]), torch.tensor([0.7, 0.8, 0.9])

    def track(self, video, frame, mask):
        assert video.shape == (9, 3, 32, 32)
        out = torch.zeros(len(video), *mask.shape, dtype=torch.bool)
        out[frame] = mask
        return out


def test_a_segmenter_is_asked_once_and_carried(toy, scene, monkeypatch):
    refam = RefAMPipeline.from_pipe(toy)
    colour = scene.scene.things[0].colour
    plain = refam(video=scene.video, expression=f"the {colour} object")
    fake = Fake(scene.objects)
    fake.frame = plain.point[0]
    monkeypatch.delattr(module, "otsu_mask")  # nobody needs the other mask
    out = refam(video=scene.video, expression=f"the {colour} object", sam=fake)
    assert fake.asked == [[plain.point[1:]]]
    # The whole object, although a part has the higher quality.
    assert torch.equal(out.mask[plain.point[0]], torch.from_numpy(scene.objects[0, fake.frame]))
    per_frame = Fake(scene.objects)
    refam(video=scene.video, expression=f"the {colour} object", sam=per_frame, per_frame=True)
    assert len(per_frame.asked) == 9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"expression": " ?! "}, "holds no word"),
        ({"expression": "is it of the"}, "stop words only"),
        ({"expression": "red " * 200}, "tokens and max_sequence_length=128; shorten"),
        ({"image": np.zeros((8, 8, 2))}, "a picture of shape"),
        ({"image": Image.new("RGBA", (16, 16), (0, 0, 0, 10))}, "transparency"),
        ({"image": np.full((8, 8, 3), 7.0)}, "outside \\[0, 1\\]"),
        ({"image": None}, "give image= or video="),
        ({"video": []}, "give image= or video="),
        ({"image": None, "video": []}, "without frames"),
        ({"layers": [99]}, "the model has blocks 0 to 3"),
        ({"layers": "all"}, "layers='all'"),
        ({"sigma": 1.0}, "sigma=1.0: give a number above 0 and below 1"),
        ({"sinks": "hide"}, "sinks='hide'"),
        ({"direction": "up"}, "direction='up'"),
        ({"magnets": "the of"}, "magnets='the of'"),
        ({"draws": 0}, "draws=0"),
        ({"aggregation": "max"}, "aggregation='max'"),
    ],
)
def test_bad_input_is_one_line(wrong, message):
    refam = RefAMPipeline.from_pipe(tiny.tiny_flux()[0])
    call = {"image": picture(), "expression": "the ball", **ROOM, **wrong}
    with pytest.raises(ValueError, match=message) as error:
        refam(**call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigma": "abc"}, "sigma='abc': give a number"),
        ({"layers": 3}, "layers=3: give a list of layers"),
        ({"draws": "two"}, "draws='two': give a whole number"),
        ({"magnets": ["a", 3]}, "give 'default' or a list of words"),
        ({"blur": "much"}, "blur='much': give a number"),
        ({"sink_rule": 3}, "sink_rule=3: give a SinkRule"),
        ({"sink_rule": {"run": "long"}}, "run='long': give a whole number"),
        ({"expression": 3}, "expression=3: give a text"),
    ],
)
def test_arguments_of_another_type_are_named(wrong, message):
    refam = RefAMPipeline.from_pipe(tiny.tiny_flux()[0])
    with pytest.raises(TypeError, match=message):
        refam(**{"image": picture(), "expression": "the ball", **ROOM, **wrong})


def test_a_sink_rule_may_be_given_by_its_fields(monkeypatch):
    refam = RefAMPipeline.from_pipe(tiny.tiny_flux()[0])
    given = {"image": picture(), "expression": "the ball", **ROOM}
    rules = []
    monkeypatch.setattr(module, "read", lambda *a, rule, **k: rules.append(rule) or read(*a, **k))
    refam(sink_rule={"kappa": 5}, **given)
    assert rules == [SinkRule(kappa=5)]
    with pytest.raises(ValueError, match="its fields are kappa, uniformity, run"):
        refam(sink_rule={"kapa": 5}, **given)


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="RefAM reads FLUX.1, HunyuanVideo and Wan"):
        RefAMPipeline.from_pipe(tiny.tiny_cosmos()[0])
    with pytest.raises(ValueError, match="use Wan 2.1"):
        RefAMPipeline.from_pipe(tiny.tiny_wan22()[0])


def test_flux_takes_no_clips():
    refam = RefAMPipeline.from_pipe(tiny.tiny_flux()[0])
    with pytest.raises(ValueError, match="FLUX takes single images"):
        refam(video=clip(2), expression="the ball", **ROOM)


def test_grey_and_opaque_pictures_are_fine():
    refam = RefAMPipeline.from_pipe(tiny.tiny_flux()[0])
    grey = picture()[..., 0]
    maps = [
        refam(image=x, expression="the ball", **ROOM).heatmap
        for x in (grey, np.repeat(grey[..., None], 3, 2), Image.fromarray(grey).convert("RGBA"))
    ]
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])
