"""Words, sinks, maps, points and masks of RefAM, each where the answer is known."""

import pytest
import torch

from gen_accel.cli.bench.ground_checks import plant
from gen_accel.eval.grounding import average_precision
from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.pipelines.masks import otsu, touching
from gen_accel.pipelines.probe import Call
from gen_accel.pipelines.refam.expression import default_magnets, make_prompt, word_lists
from gen_accel.pipelines.refam.heatmap import (
    aggregate,
    find_point,
    flood_fill,
    normalise,
    otsu_mask,
    to_pixels,
    word_shares,
)
from gen_accel.pipelines.refam.reading import Reading
from gen_accel.pipelines.refam.sam import best_mask
from gen_accel.pipelines.refam.sinks import SinkRule, find_sinks, merge_heads


def roles(expression, **options):
    return {w.text: w.role for w in make_prompt(expression, **options).words}


def test_words_of_place_and_of_meaning_stay():
    found = roles("the dog's ball to the left of the other one, without a shadow")
    content = [w for w, role in found.items() if role == "content"]
    assert content == ["dog's", "ball", "left", "other", "without", "shadow"]
    assert roles("left of the square", spatial=False)["left"] == "stop"
    # A noun that names nothing is what is asked for when there is nothing else.
    assert roles("the object") == {"the": "stop", "object": "content"}


@pytest.mark.parametrize("place", ["last", "first"])
def test_offsets_of_every_word(place):
    prompt = make_prompt(
        " the  red circle ", magnets=("a", "of", "pink"), caption="a scene.", place=place
    )
    for word in prompt.words:
        assert prompt.text[word.start : word.end] == word.text
    tail = {"last": "the red circle a of pink", "first": "a of pink the red circle"}
    assert prompt.text == "a scene. " + tail[place]
    assert [w.text for w in prompt.of("magnet")] == ["a", "of", "pink"]


@pytest.mark.parametrize(
    ("expression", "head"),
    [
        ("the red circle left of the square", "circle"),
        ("left dog", "dog"),
        ("a man in a blue shirt", "man"),
        ("the circle", "circle"),
    ],
)
def test_head_noun(expression, head):
    assert [w.text for w in make_prompt(expression).words if w.head] == [head]


def test_magnets_avoid_the_colour_that_is_asked_for():
    assert default_magnets("the red ball")[-1] == "pink"
    assert default_magnets("the Pink ball")[-1] == "cyan"
    lists = word_lists()
    assert not set(lists["stop"]) & {*lists["spatial"], "other", "no", "not", "without"}
    assert set(lists["magnets"]) <= set(lists["stop"])


def planted_reading(magnets, noise=0.3, seed=0):
    """Image-to-text scores of one word that likes an object, and of magnets that like the rest."""
    generator = torch.Generator().manual_seed(seed)
    grid = TokenGrid(1, 16, 16)
    target = torch.zeros(16, 16)
    target[4:9, 5:10] = 1
    target = target.flatten()
    word = target + 1.5 * torch.randn(256, generator=generator)
    others = [2 - 2 * target + noise * torch.randn(256, generator=generator)
              for _ in range(magnets)]  # fmt: skip
    filler = torch.randn(256, generator=generator) * noise
    texts = torch.stack([word, filler, *others], -1)
    image = torch.randn(256, 1500, generator=generator)
    joint = torch.cat([image + 2, texts], -1).softmax(-1)[:, 1500:]
    columns = torch.cat([joint, joint.sum(-1, keepdim=True)], -1)[None, None]
    rows = texts.T.softmax(-1)[None, None]
    sinks = torch.zeros(1, 256 + texts.shape[1], dtype=torch.bool)
    return Reading(((0, 0),), columns, rows, sinks, sinks.float(), grid), target > 0


def precision(reading, target, direction):
    heat = word_shares(reading, [[0]], direction=direction)[0]
    return float(average_precision(heat.view(1, 1, -1), target.view(1, 1, -1)))


def test_magnets_help_the_renormalised_direction_alone():
    """The brief's check: the gain is in image-to-text over text, none in text-to-image."""
    gain = {}
    for direction in ("text", "joint", "rows"):
        bare, target = planted_reading(0)
        more, _ = planted_reading(2)
        gain[direction] = precision(more, target, direction) - precision(bare, target, direction)
    assert gain["text"] > 0.05 and gain["rows"] == 0
    assert abs(gain["joint"]) < gain["text"] / 2


def test_dropping_a_token_renormalises_over_the_rest():
    reading, _ = planted_reading(2)
    shares = word_shares(reading, [[0], [1], [2], [3]])
    torch.testing.assert_close(shares.sum(0), torch.ones(256))
    dropped = word_shares(reading, [[0]], drop=[2, 3])
    torch.testing.assert_close(dropped[0], shares[0] / (shares[0] + shares[1]))
    over = word_shares(reading, [[0]], over=[0, 1])
    torch.testing.assert_close(over, dropped)
    joint = word_shares(reading, [[0]], direction="joint", drop=[2])
    columns = reading.columns[0, 0]
    torch.testing.assert_close(joint[0], columns[:, 0] / (1 - columns[:, 2]))
    assert word_shares(reading, [[0]], direction="rows", drop=[7])[0, 7] == 0


def test_sub_tokens_are_merged():
    reading, _ = planted_reading(2)
    both = word_shares(reading, [[0, 1]])[0]
    torch.testing.assert_close(both, word_shares(reading, [[0], [1]]).mean(0))


def test_maps_are_clipped_stretched_and_joined():
    maps = torch.rand(3, 1000)
    maps[0, 3] = 1e6
    maps[2] = 4.0
    flat = normalise(maps)
    assert flat[0].median() > 0.3 and flat[2].abs().max() == 0
    torch.testing.assert_close(aggregate(flat, 1, "head"), (flat[0] + 2 * flat[1] + flat[2]) / 4)
    assert aggregate(flat, 0, "product").max() < 1e-1  # one word nowhere: nothing has all of them


def test_points_lie_in_the_largest_component_of_the_clearest_frame():
    heat = torch.full((3, 12, 12), 0.1)
    heat[1, 2:6, 2:6] = 0.9
    heat[1, 10, 10] = 1.0
    heat[2, 0, 0] = 0.5
    frame, row, column = find_point(heat)
    assert frame == 1 and 2 <= row < 6 and 2 <= column < 6
    assert find_point(heat, robust=False) == (1, 10, 10)
    assert find_point(torch.zeros(2, 4, 4))[0] in (0, 1)


def test_masks_hold_the_point_and_hang_together():
    heat = torch.rand(2, 16, 16) * 0.1
    heat[:, 2:6, 2:6] += 0.9
    heat[:, 12:14, 12:14] += 0.9
    mask = otsu_mask(heat, (0, 3, 3))
    assert mask[:, 2:6, 2:6].all() and int(mask.sum()) == 32
    video = torch.full((2, 3, 16, 16), 0.5)
    video[:, 0, 4:9, 4:9] = 1.0
    filled = flood_fill(video, (1, 5, 5))
    assert int(filled.sum()) == 50 and filled[:, 4:9, 4:9].all()


def test_masks_are_otsus_upper_class_on_small_clips():
    heat = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) ** 3
    threshold, _ = otsu(heat.flatten())
    seed = torch.zeros(heat.shape, dtype=torch.bool)
    seed[1, 4, 5] = True
    wanted = touching(((heat > threshold) | seed)[None], seed[None])[0]
    assert torch.equal(otsu_mask(heat, (1, 4, 5)), wanted) and wanted.sum() > 9


def test_a_real_video_gets_its_mask():
    """81 frames of 480x832: more than torch.quantile takes, wide to grow a pixel at a time."""
    tokens = 0.1 * torch.rand(21, 30, 52, generator=torch.Generator().manual_seed(0))
    tokens[:, 10:20, 15:30] += 0.8
    tokens[5:, 2:5, 40:50] += 0.8
    frames = [-(-frame // 4) for frame in range(81)]
    heat = to_pixels(tokens.flatten(), TokenGrid(21, 30, 52), frames, (480, 832), 0.0)
    mask = otsu_mask(heat, (9, 240, 360))
    assert mask[:, 170:310, 250:470].all()
    assert not mask[:, :140].any() and not mask[:, :, 500:].any()


def test_tokens_come_back_as_pixels_and_frames():
    heat = torch.zeros(2, 4, 4)
    heat[1, 1, 2] = 1
    out = to_pixels(heat.flatten(), TokenGrid(2, 4, 4), [0, 1, 1], (16, 16), 0.0)
    assert out.shape == (3, 16, 16) and out[0].max() == 0 and torch.equal(out[1], out[2])
    frame, row, column = find_point(out)
    assert (row // 4, column // 4) == (1, 2)


def test_the_whole_object_wins_over_a_part():
    heat = torch.zeros(8, 8)
    heat[2:6, 2:6] = 1
    whole, part, everything = heat > 0, heat > 0, torch.ones(8, 8, dtype=torch.bool)
    part = part.clone()
    part[2:4] = False
    masks = torch.stack([part, whole, everything, torch.zeros_like(whole)])
    assert torch.equal(best_mask(masks, torch.tensor([0.95, 0.9, 0.9, 1.0]), heat), whole)


def objects_call(seed, large):
    """Queries and keys of two objects whose tokens look at their own object, and a background."""
    generator = torch.Generator().manual_seed(seed)
    grid = TokenGrid(2, 12, 12)
    layout = TokenLayout(grid, text_after=10)
    owner = torch.zeros(2, 12, 12, dtype=torch.long)
    owner[:, 1 : 7 if large else 3, 1 : 7 if large else 3] = 1
    owner[:, 8:10, 8:10] = 2
    owner = torch.cat([owner.flatten(), torch.randint(0, 3, (10,), generator=generator)])
    means = 3 * torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=-1)
    q, k = (means[owner] + 0.5 * torch.randn(3, len(owner), 16, generator=generator)
            for _ in range(2))  # fmt: skip
    return Call(q.movedim(0, 1)[None], k.movedim(0, 1)[None], layout)


def found_in(calls, rule):
    got = [call.incoming(128) for call in calls]
    merged = [merge_heads(g.mass, g.uniformity) for g in got]
    mass, uniformity = (torch.stack(x) for x in zip(*merged))
    return find_sinks(mass, uniformity, torch.tensor([calls[0].k.shape[1]]), rule)[0]


@pytest.mark.parametrize("kappa", [5.0, 10.0, 20.0])
def test_planted_sinks_are_found_and_large_objects_are_not(kappa):
    rule = SinkRule(kappa=kappa)
    for seed in range(5):
        calls = [objects_call(10 * seed + layer, large=True) for layer in range(4)]
        assert not found_in(calls, rule).any()
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(298, generator=generator)[: 1 + seed % 3]
        got = found_in([plant(call, places) for call in calls], rule)
        assert got.nonzero().flatten().tolist() == sorted(places.tolist())


def test_planting_gives_every_query_the_same_share():
    got = plant(objects_call(0, large=False), torch.tensor([17]), share=0.2).incoming(None)
    torch.testing.assert_close(got.mass[..., 17], torch.full((1, 3), 0.2), atol=1e-4, rtol=1e-3)
    assert got.uniformity[..., 17].max() < 1e-2


def test_sinks_last_several_layers():
    mass = torch.full((5, 1, 100), 0.001)
    uniformity = torch.full((5, 1, 100), 0.5)
    mass[1:4, 0, 7] = 0.5
    mass[[0, 2, 4], 0, 8] = 0.5  # not in a row
    mass[:, 0, 9] = 0.5
    uniformity[:, 0, 9] = 3.0  # an object, not a sink
    keys = torch.tensor([100])
    assert find_sinks(mass, uniformity, keys, SinkRule())[0].nonzero().tolist() == [[7]]
    with pytest.raises(ValueError, match="kappa=1: give a number above 1"):
        SinkRule(kappa=1)
