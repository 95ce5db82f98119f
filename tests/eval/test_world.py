import dataclasses
import json

import numpy as np
import pytest

from gen_accel.eval.world.caption import TIERS, describe, expressions, relation, vocabulary
from gen_accel.eval.world.files import write_clip
from gen_accel.eval.world.gate import GATE_WORLD
from gen_accel.eval.world.read import read
from gen_accel.eval.world.render import VISIBLE, draw, render
from gen_accel.eval.world.scene import (
    BACKGROUNDS,
    COLOURS,
    EFFECTS,
    FULL,
    SHAPES,
    TOY,
    Backdrop,
    Scene,
    Thing,
    held_out,
    sample_scene,
)

ALL_FRAMES = np.arange(9)


def one(effect=None, **changes):
    thing = Thing("circle", "red", "medium", effect, "linear", "right", (0.3, 0.4), 0.05)
    return Scene((dataclasses.replace(thing, **changes),), Backdrop("gradient", 5))


def test_a_seed_is_a_clip_and_splits_differ():
    a, b = (render(sample_scene(3, FULL)) for _ in range(2))
    assert np.array_equal(a.video, b.video) and a.scene == b.scene
    assert sample_scene(3, FULL, "train") != sample_scene(3, FULL, "test")
    with pytest.raises(ValueError, match="train"):
        sample_scene(3, FULL, "dev")


def test_frames_do_not_depend_on_which_others_are_drawn():
    scene = sample_scene(8, dataclasses.replace(FULL, pan=1.0))
    assert np.allclose(draw(scene, np.array([4])), draw(scene, ALL_FRAMES)[4:5], atol=1e-6)


@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_backdrops_are_muted_and_in_range(kind):
    if kind == "photo":
        pytest.importorskip("skimage")
    frames = draw(Scene((), Backdrop(kind, 7, (0.02, 0.01))), ALL_FRAMES)
    assert frames.shape == (9, 32, 32, 3) and frames.dtype == np.float32
    assert frames.min() >= 0 and frames.max() <= 1
    assert np.ptp(frames, axis=-1).max() < 0.5, "chroma has to tell objects from scenery"
    assert (np.ptp(frames, axis=0).max() > 0.001) == (kind != "plain"), "only flat ones hide a pan"


@pytest.mark.parametrize("effect", EFFECTS)
def test_effect_mask_is_what_the_twin_shows(effect):
    clip = render(one(effect))
    changed = np.abs(clip.video - clip.clean).max(axis=-1) > VISIBLE
    mask = clip.effects[effect][0]
    assert mask.any() and not (mask & clip.target).any()
    assert not (mask & ~changed).any(), "nothing is in the mask that did not change"
    missed = changed & ~mask & ~clip.target
    rim = np.abs(render(one()).video - render(one()).clean).max(axis=-1) > 0
    assert not (missed & ~rim).any(), "everything that changed off the object is in the mask"
    assert all(not clip.effects[k].any() for k in EFFECTS if k != effect)


def test_an_object_without_effect_changes_nothing_else():
    clip = render(one())
    assert not clip.target_effect.any() and clip.target.any()


def test_a_neighbours_shadow_must_stay():
    other = Thing("square", "blue", "medium", "shadow", start=(0.7, 0.75))
    scene = Scene((*one("shadow").things, other), Backdrop("plain", 1))
    clip, alone = render(scene), render(Scene((other,), Backdrop("plain", 1)))
    assert np.array_equal(clip.clean, alone.video)
    assert clip.effects["shadow"][1].any()
    assert not (clip.target_effect & clip.effects["shadow"][1]).any()


def test_a_decoy_belongs_to_nothing():
    scene = dataclasses.replace(one("shadow"), decoy=(0.7, 0.85, 0.12, 0.08))
    clip, bare = render(scene), render(one("shadow"))
    patch = np.abs(clip.video - bare.video).max(axis=-1) > 0.05
    assert patch.any() and not (patch & clip.target_effect).any()
    assert np.allclose(clip.video[patch], clip.clean[patch])


def test_paths():
    t = np.arange(-3, 40)
    bounce = Thing("cross", "pink", "large", None, "bounce", "up", (0.5, 0.4), 0.07)
    y = bounce.centres(t)[:, 1]
    assert y.min() >= 0.21 - 1e-9 and y.max() <= 0.79 + 1e-9 and (np.diff(y) > 0).any()
    for seed in range(60):
        for thing in sample_scene(seed, TOY, "val").things:
            c = thing.centres(ALL_FRAMES)
            assert c.min() > thing.radius - 1e-6 and c.max() < 1 - thing.radius + 1e-6


def test_objects_keep_apart_and_training_avoids_held_out():
    for seed in range(80):
        scene = sample_scene(seed, FULL, "train")
        assert not any(held_out(t) for t in scene.things)
        masks = render(scene).objects
        assert not (masks.sum(axis=0) > 1).any()
    combos = [Thing(s, c, "small", e) for s in SHAPES for c in COLOURS for e in (None, *EFFECTS)]
    assert 0.05 < np.mean([held_out(t) for t in combos]) < 0.15


def test_distribution():
    scenes = [sample_scene(s, FULL, "train") for s in range(500)]
    assert 0.12 < np.mean([not s.things for s in scenes]) < 0.22
    effects = [t.effect for s in scenes for t in s.things]
    assert 0.4 < np.mean([e is not None for e in effects]) < 0.6
    assert {len(s.things) for s in scenes} == {0, 1, 2, 3, 4}
    assert not any(t.effect == "trail" for s in scenes for t in s.things if t.motion == "still")


def test_captions_name_effects_iff_present_and_spans_point_at_words():
    known = set(vocabulary())
    for seed in range(120):
        scene = sample_scene(seed, FULL)
        caption = describe(scene)
        assert set(caption.text.split()) <= known
        for i, thing in enumerate(scene.things):
            assert caption.words("colour", i) == [thing.colour]
            assert caption.words("shape", i) == [thing.shape]
            assert caption.words("effect", i) == ([thing.effect] if thing.effect else [])
            assert caption.words("object", i)[0].endswith(f"{thing.colour} {thing.shape}")
            assert len(caption.words("motion", i)) == 1
        named = sum(word in EFFECTS for word in caption.text.split())
        assert named == sum(t.effect is not None for t in scene.things)
        assert not describe(scene, clip=False).words("motion")


def test_expressions_have_one_answer_or_none():
    seen = set()
    for seed in range(150):
        scene = sample_scene(seed, FULL)
        known = set(vocabulary())
        for e in expressions(scene):
            seen.add((e.tier, e.thing is None))
            assert set(e.text.split()) <= known
            match = []
            for i, t in enumerate(scene.things):
                moving = t.direction if t.motion == "linear" else None
                facts = {t.colour, t.shape}
                if e.tier == "colour":
                    match += [i] * (t.colour in e.text)
                elif e.tier == "shape":
                    match += [i] * (t.shape in e.text)
                elif e.tier == "colour+shape":
                    match += [i] * (facts <= set(e.text.split()))
                elif e.tier == "motion" and "moving" in e.text:
                    match += [i] * (e.text.endswith(f"moving {moving}"))
            if e.tier != "relation" and not e.text.endswith(("bouncing", "still")):
                assert match == ([] if e.thing is None else [e.thing]), (e, scene.things)
    assert {t for t, none in seen if not none} == set(TIERS)
    assert {t for t, none in seen if none} == set(TIERS) - {"relation"}


def test_relation():
    left, right = (
        Thing("circle", c, "small", start=(x, 0.5)) for c, x in (("red", 0.2), ("blue", 0.8))
    )
    assert relation(left, right, 9) == "left of" and relation(right, left, 9) == "right of"
    assert relation(left, dataclasses.replace(left, start=(0.25, 0.5)), 9) is None


def test_reader_reads_the_truth():
    right, total = 0, 0
    for seed in range(60):
        scene = sample_scene(seed, GATE_WORLD, "val")
        noise = np.random.default_rng(seed).normal(0, 0.02, (9, 32, 32, 3))
        seen = read(np.clip(draw(scene, ALL_FRAMES) + noise, 0, 1))
        total += 1
        if not scene.things:
            right += seen.empty and not seen.effect
            continue
        t = scene.things[0]
        truth = (t.colour, t.shape, t.direction or "still", t.effect is not None)
        right += (seen.colour, seen.shape, seen.motion, seen.effect) == truth
    assert right / total > 0.97
    with pytest.raises(ValueError, match="T, S, S, 3"):
        read(np.zeros((9, 32, 32)))


def test_files(tmp_path):
    clip = render(sample_scene(3, FULL))
    files = write_clip(clip, tmp_path, zoom=2)
    assert all(f.stat().st_size > 0 for f in files)
    words = json.loads((tmp_path / "clip.json").read_text())
    for span in words["spans"]:
        assert words["caption"][span["start"] : span["end"]] == span["text"]
    import imageio.v3 as iio

    strip = iio.imread(tmp_path / "object_0.png")
    assert np.array_equal(strip[::2, : 2 * 32 : 2, 0] > 127, clip.objects[0, 0])
    mask = iio.imread(tmp_path / "object_0.mp4")[:, ::2, ::2].mean(-1) > 127
    assert np.mean(mask != clip.objects[0].astype(bool)) < 0.005
    video = iio.imread(tmp_path / "clip.mp4")
    assert video.shape[0] == 9
    assert np.abs(video[:, ::2, ::2] / 255 - clip.video).mean() < 0.05
