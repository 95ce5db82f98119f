"""Object-WIPER: invariants on random weights, planted attention, and what it refuses."""

import inspect
from copy import deepcopy

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from gen_accel import ParoProcessor, SparseProcessor, apply
from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.pipelines.effects import EffectSetting, WordMaps, find_effects, outside, response
from gen_accel.pipelines.flow import VideoFlow
from gen_accel.pipelines.object_wiper import ObjectWiperPipeline
from gen_accel.pipelines.probe import Call as Seen
from gen_accel.pipelines.remover import Remover
from gen_accel.pipelines.surgery import Scaling, Surgery
from gen_accel.pipelines.value_store import Call, ValueStore, estimate
from gen_accel.pipelines.wipe_setting import WipeSetting
from helpers.tiny import tiny_flux, tiny_hunyuan, tiny_wan, tiny_wan22

MAKERS = [tiny_hunyuan, tiny_wan]
PLAIN = {
    "adaptive": False, "background_scale": 1.0, "foreground_scale": 1.0, "guidance_scale": 1.0,
}  # fmt: skip
PROMPT = "a red ball"


@pytest.fixture(params=MAKERS, ids=["hunyuan_video", "wan"])
def made(request):
    pipe, call = request.param()
    pipe.set_progress_bar_config(disable=True)
    options = {k: call[k] for k in ("max_sequence_length", "prompt_template") if k in call}
    return pipe, options


def clip(batch=1, frames=5, size=(32, 48)):
    video = torch.rand(batch, frames, 3, *size, generator=_seeded(0))
    mask = torch.zeros(batch, frames, *size, dtype=torch.bool)
    mask[:, :, 4:12, 20:30] = True
    return video, mask


def parts(made, batch=1, **options):
    pipe, arguments = made
    flow = VideoFlow(pipe, **arguments)
    latents = torch.randn(batch, _channels(pipe), 2, 4, 6, generator=_seeded(1))
    text = flow.text([PROMPT] * batch)
    grid = flow.layout(latents, text).grid
    object_ = torch.zeros(batch, *grid, dtype=torch.bool)
    object_[..., 0, 1] = True
    setting = WipeSetting(**{"steps": 3, "solver": "euler", **options})
    return flow, latents, text, object_, setting, torch.randn(latents.shape, generator=_seeded(2))


def _channels(pipe):
    return pipe.transformer.config.in_channels


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def there_and_back(made, object_is=None, **options):
    flow, latents, text, object_, setting, noise = parts(made, **options)
    object_ = torch.zeros_like(object_) if object_is == "nothing" else object_
    remover = Remover(flow, setting)
    inversion = remover.invert(latents, text, object_)
    nothing = torch.zeros_like(object_)
    return inversion, remover.remove(inversion, text, nothing, noise), latents, object_, noise


# -- there and back ----------------------------------------------------------------------------


def test_frozen_background_is_bit_equal(made):
    inversion, removal, latents, *_ = there_and_back(made, preserve="freeze")
    background = ~inversion.masks[0].repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]
    background = background.expand_as(latents)
    assert torch.equal(removal.latents[background], latents[background])
    assert not torch.equal(removal.latents, latents)
    assert float(torch.stack(removal.drift).max()) == 0.0


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_without_a_foreground_the_clip_comes_back(made, solver):
    errors = []
    for steps in (2, 8):
        _, removal, latents, *_ = there_and_back(
            made, "nothing", steps=steps, solver=solver, preserve="none", shift=1.0, **PLAIN
        )
        errors.append(float((removal.latents - latents).abs().max()))
    assert errors[1] < errors[0] / 2
    _, removal, latents, *_ = there_and_back(made, "nothing", preserve="freeze", **PLAIN)
    assert torch.equal(removal.latents, latents)


def test_values_are_those_of_the_same_interval_and_stage(made):
    """With every value the inversion's, Euler takes back exactly the velocity it added."""
    flow, latents, text, object_, setting, noise = parts(made, preserve="attn_kv", steps=2, **PLAIN)
    with torch.no_grad():
        inversion = Remover(flow, setting).invert(latents, text, torch.zeros_like(object_))
    held = {call for call, _ in inversion.store._kept}
    assert held == {Call(0, 0), Call(1, 0)}
    assert {layer for _, layer in inversion.store._kept} == set(range(flow.layers))
    midpoint = WipeSetting(steps=2, solver="midpoint", value_steps=1)
    assert midpoint.calls() == {Call(1, 0), Call(1, 1)}


def test_re_initialisation_touches_the_foreground_only(made):
    flow, latents, text, object_, setting, noise = parts(made, preserve="none", **PLAIN)
    seen = []
    velocity = flow.velocity
    with torch.no_grad():
        inversion = Remover(flow, setting).invert(latents, text, object_)
        flow.velocity = lambda x, *rest: seen.append(x) or velocity(x, *rest)
        Remover(flow, setting).remove(inversion, text, torch.zeros_like(object_), noise)
    fresh = object_.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None].expand_as(latents)
    assert torch.equal(seen[0][fresh], noise[fresh])
    assert torch.equal(seen[0][~fresh], inversion.nodes[-1][~fresh])


def test_factors_of_one_change_nothing(made):
    scaled = there_and_back(made, **{**PLAIN, "preserve": "attn_v"})[1].latents
    bias = there_and_back(made, **{**PLAIN, "preserve": "attn_v", "scaling": "bias"})[1].latents
    other = there_and_back(made, **{**PLAIN, "foreground_scale": 3.0})[1].latents
    assert torch.equal(scaled, bias)
    assert not torch.equal(scaled, other)


def test_the_adaptive_mask_never_shrinks(made):
    inversion, *_, object_, _ = there_and_back(made, steps=4)
    last = object_
    for mask in inversion.masks:
        assert not (last & ~mask).any()
        last = mask


# -- planted attention -------------------------------------------------------------------------


def planted(batch=2, tokens=12, heads=2, dim=8):
    q, k, v = torch.randn(3, batch, tokens, heads, dim, generator=_seeded(3)).unbind(0)
    queries = torch.zeros(batch, tokens, dtype=torch.bool)
    queries[0, :5], queries[1, 3:9] = True, True
    keys = torch.zeros_like(queries)
    keys[0, 5:7], keys[1, :2] = True, True
    return q, k, v, queries, keys


def attend(q, k, v, bias=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else bias[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


@pytest.mark.parametrize(
    ("kind", "change"),
    [("key", lambda x: 0.5 * x), ("bias", lambda x: x + torch.tensor(0.5).log())],
)
def test_only_chosen_pairs_are_scaled(kind, change):
    q, k, v, queries, keys = planted()
    surgery = Surgery(slice(0, 12), scaling=Scaling(queries, keys, 0.5, kind))
    surgery.measure = frozenset({0})
    out = surgery(attend, q, k, v, layer=0, mask=None)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    pairs = (queries[:, :, None] & keys[:, None])[:, None]
    weights = torch.where(pairs, change(logits), logits).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", weights, v))
    before, after = surgery.moved[0]
    for b in range(2):
        share = (weights[b] * keys[b]).sum(-1)[:, queries[b]].mean()
        torch.testing.assert_close(after[b], share)
        share = (logits.softmax(-1)[b] * keys[b]).sum(-1)[:, queries[b]].mean()
        torch.testing.assert_close(before[b], share)


def test_scaled_keys_are_not_suppressed_keys():
    """A factor towards 0 makes a row uniform over these keys; a bias really lowers their share."""
    q = torch.ones(1, 1, 1, 4)
    k = torch.cat([torch.zeros(1, 9, 1, 4), torch.full((1, 1, 1, 4), -1.5)], 1)
    queries, keys = torch.ones(1, 10, dtype=torch.bool), torch.zeros(1, 10, dtype=torch.bool)
    keys[:, 9] = True
    share = {}
    for kind in ("key", "bias"):
        surgery = Surgery(slice(0, 10), scaling=Scaling(queries, keys, 0.01, kind))
        surgery.measure = frozenset({0})
        surgery(attend, q.expand(1, 10, 1, 4), k, torch.zeros_like(k), layer=0, mask=None)
        share[kind] = [float(x) for x in surgery.moved[0]]
    assert share["key"][1] > 4 * share["key"][0]
    assert share["bias"][1] < share["bias"][0] / 50


def test_stored_values_replace_the_background_only():
    q, k, v, *_ = planted()
    video, store, call = slice(2, 10), ValueStore(keys=True), Call(4, 1)
    Surgery(video, store, call, save=True)(attend, q, k, v, layer=3, mask=None)
    rows = torch.zeros(2, 8, dtype=torch.bool)
    rows[0, :3], rows[1, 5:] = True, True
    new_k, new_v = torch.randn(2, *k.shape, generator=_seeded(4)).unbind(0)
    seen = []

    def watch(q, k, v):
        seen.append((k, v))
        return attend(q, k, v)

    surgery = Surgery(video, store, call, load=rows, load_keys=True)
    surgery(watch, q, new_k, new_v, layer=3, mask=None)
    whole = torch.zeros(2, 12, dtype=torch.bool)
    whole[:, video] = rows
    for got, old, new in zip(seen[0], (k, v), (new_k, new_v)):
        assert torch.equal(got, torch.where(whole[:, :, None, None], old, new))
    with pytest.raises(KeyError, match="same steps"):
        Surgery(video, store, Call(5, 1), load=rows)(watch, q, k, v, layer=3, mask=None)


def test_planted_words_and_responses_are_read():
    grid = TokenGrid(1, 3, 4)
    q, k = torch.randn(2, 1, 15, 2, 8, generator=_seeded(5)).unbind(0)
    call = Seen(q, k, TokenLayout(grid, text_after=3))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    maps = WordMaps([[(1,), (0, 2)]]).read(call)
    rows = logits[:, :, 12:, :12].softmax(-1).mean(1)
    torch.testing.assert_close(maps[0, 0], 12 * rows[0, 1])
    torch.testing.assert_close(maps[0, 1], 12 * rows[0, [0, 2]].mean(0))
    region = torch.zeros(1, 12, 1)
    region[0, 2:5] = 1
    share = response(region)(call)
    weights = logits[:, :, :12, :12].softmax(-1)
    torch.testing.assert_close(share[0, 0], weights[0, :, :, 2:5].sum(-1).mean(0))


def test_an_even_response_is_no_effect():
    share = torch.tensor(
        [[0.9, 0.8, 0.5, 0.45, 0.02, 0.01, 0.02], [0.9, 0.8, 0.1, 0.1, 0.09, 0.1, 0.1]]
    )
    object_ = torch.zeros(2, 7, dtype=torch.bool)
    object_[:, :2] = True
    found = outside(share, object_, "otsu", 1.0, 3.0)
    assert found[0].tolist() == [False, False, True, True, False, False, False]
    assert not found[1].any()


# -- the pipeline ------------------------------------------------------------------------------


def wipe(made, batch=1, seed=0, of=None, **options):
    pipe, arguments = made
    wiper = ObjectWiperPipeline.from_pipe(pipe)
    wiper.set_progress_bar_config(disable=True)
    video, mask = clip(batch, **(of or {}))
    call = {"steps": 2, "solver": "euler", "generator": _seeded(seed), **arguments, **options}
    return wiper(video, mask, PROMPT, "nothing here", ("red", "ball"), **call)


def test_a_seed_gives_one_result(made):
    first, again, other = wipe(made), wipe(made), wipe(made, seed=1)
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)
    assert first.frames.shape == (1, 5, 3, 32, 48)
    assert first.effect_mask.shape == first.foreground_mask.shape == (1, 5, 32, 48)
    assert not (first.effect_mask & clip()[1]).any()
    assert (first.foreground_mask | ~clip()[1]).all()
    held = first.diagnostics
    assert held.masks.shape[:2] == (2, 1)
    assert held.drift.shape == (2, 1)
    assert held.moved["removal"].shape == (2, 1, 2)


def test_clips_of_a_batch_do_not_see_each_other(made):
    wiper = ObjectWiperPipeline.from_pipe(made[0])
    wiper.set_progress_bar_config(disable=True)
    video, mask = clip(2)
    mask[1] = mask[1].roll(8, -1)
    prompts, targets, queries = (
        [PROMPT, "one long snake"],
        ["nothing", "sand"],
        [("ball",), "snake"],
    )
    options = {"steps": 2, "solver": "euler", **made[1]}
    noise = [_seeded(i) for i in range(2)]
    both = wiper(video, mask, prompts, targets, queries, generator=noise, **options)
    for i in range(2):
        alone = wiper(
            video[i], mask[i], prompts[i], targets[i], queries[i], generator=[_seeded(i)], **options
        )
        torch.testing.assert_close(both.frames[i : i + 1], alone.frames, atol=2e-5, rtol=0)


@pytest.mark.parametrize("preserve", ["none", "attn_v", "attn_kv", "latent", "freeze"])
def test_every_preserve_runs_with_guidance(made, preserve):
    out = wipe(made, preserve=preserve, true_cfg_scale=2.0, negative_prompt="bad")
    assert out.frames.isfinite().all()
    kept = {"none": 0, "latent": 0, "attn_v": 1, "attn_kv": 2, "freeze": 2}[preserve]
    pipe = made[0]
    config = pipe.transformer.config
    flow = VideoFlow(pipe, **made[1])
    size = estimate(
        2, flow.layers, 2 * 2 * 3, config.num_attention_heads * config.attention_head_dim, 4, False
    )
    assert out.diagnostics.cache_bytes == kept * size


@pytest.mark.parametrize("policy", [ParoProcessor, SparseProcessor])
def test_works_on_accelerated_transformers(made, policy):
    pipe, _ = made
    size = {"frames": 9, "size": (64, 96)}  # two blocks
    dense = wipe(made, of=size)
    with apply(pipe, policy(density=1.0, dense_steps=0.0, min_tokens=0, block=16)) as handle:
        sparse = wipe(made, of=size)
        assert handle.stats()["transformer"].sparse > 0
    torch.testing.assert_close(sparse.frames, dense.frames, atol=1e-4, rtol=0)
    assert torch.equal(wipe(made, of=size).frames, dense.frames)


def test_processors_are_told_the_noise_levels_of_both_ways(made):
    pipe, _ = made
    told = []
    with apply(pipe, ParoProcessor(min_tokens=0, block=16)) as handle:
        engine = handle.components[0].engine
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, given: told.append(
                (engine.context.sigma, float(given["timestep"][0]) / 1000)
            ),
            with_kwargs=True,
        )
        wipe(made, of={"frames": 9, "size": (64, 96)}, solver="euler", steps=4)
    hook.remove()
    believed, true = zip(*told)
    assert believed == pytest.approx(true, abs=1e-3) and max(true) == 1 and min(true) == 0


def test_custom_pipeline_shim(tmp_path):
    from pathlib import Path

    pipe, call = tiny_hunyuan()
    pipe.save_pretrained(tmp_path)
    shim = Path(__file__).parents[2] / "pipelines" / "gen_accel_object_wiper.py"
    wiper = diffusers.DiffusionPipeline.from_pretrained(
        str(tmp_path), custom_pipeline=str(shim), trust_remote_code=True
    )
    assert type(wiper) is ObjectWiperPipeline
    template = {"prompt_template": call["prompt_template"]}
    out = wipe((wiper, template))
    torch.testing.assert_close(out.frames, wipe((pipe, template)).frames, atol=1e-4, rtol=0)


def test_what_the_stock_pipeline_returns_can_be_wiped(made):
    """README's sequence: frames of the pipeline, as arrays, with the channels last."""
    video, mask = clip()
    (wiper := ObjectWiperPipeline.from_pipe(made[0])).set_progress_bar_config(disable=True)
    arrays = video[0].movedim(1, -1).numpy()
    out = wiper(
        arrays, mask[0].numpy(), PROMPT, "nothing here", ("red", "ball"), steps=2, solver="euler",
        generator=_seeded(0), **made[1],
    )  # fmt: skip
    assert torch.equal(out.frames, wipe(made).frames)


def test_parts_that_are_swapped_take_part(made):
    pipe, arguments = made
    wiper = ObjectWiperPipeline.from_pipe(pipe)
    size = {"frames": 9, "size": (64, 96)}
    before = wipe((wiper, arguments), of=size)
    wiper = ObjectWiperPipeline.from_pipe(pipe)
    wiper.set_progress_bar_config(disable=True)
    wiper.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    call = (*clip(**size), PROMPT, "nothing here", ("red", "ball"))
    options = {"steps": 2, "solver": "euler", **arguments}
    policy = SparseProcessor(density=0.5, dense_steps=0.0, min_tokens=0, block=16)
    with apply(wiper, policy) as handle:
        out = wiper(*call, generator=_seeded(0), **options)
        assert handle.stats()["transformer"].sparse > 0
    assert out.diagnostics.sigmas == [0, 0.5, 1] != before.diagnostics.sigmas
    plain = wiper(*call, generator=_seeded(0), **options)
    wiper.transformer = deepcopy(pipe.transformer)
    with torch.no_grad():
        for weight in wiper.transformer.parameters():
            weight.mul_(1.5)
    assert not torch.equal(wiper(*call, generator=_seeded(0), **options).frames, plain.frames)


def test_a_scheduler_that_shifts_by_size_needs_a_shift(made):
    wiper = ObjectWiperPipeline.from_pipe(made[0])
    wiper.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting has no shift of its own: pass shif"):
        wipe((wiper, made[1]))
    shifted = wipe((wiper, made[1]), shift=3.0)
    assert torch.equal(shifted.frames, wipe(made, shift=3.0).frames)


def test_a_list_of_words_is_for_all_clips(made):
    pipe, arguments = made
    pipe = ObjectWiperPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    video, mask = clip(2)

    def words(query):
        out = pipe(video, mask, PROMPT, "sand", query, steps=1, solver="euler",
                   generator=_seeded(0), **arguments)  # fmt: skip
        return out.effects.words

    both = words(("red", "ball"))
    assert torch.equal(words(["red", "ball"]), both)
    assert torch.equal(words([("red", "ball"), ["red", "ball"]]), both)
    assert not torch.equal(words(["red"]), both)
    with pytest.raises(ValueError, match="query lists 3 and there are 2 clips"):
        words([("red",), ("ball",), ("ball",)])
    for wrong in (3, None, [("red",), 3], [("red",), [3]]):
        with pytest.raises(TypeError, match="words of the prompt"):
            words(wrong)


def test_one_generator_for_each_clip_and_five_items(made):
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"generator lists {count} and there are 1 clips"):
            wipe(made, generator=[_seeded(i) for i in range(count)])
    items = wipe(made, return_dict=False, find_effects=False)
    assert len(items) == 5 and items[3] is None and items[4].sigmas[0] == 0


# -- refusals ----------------------------------------------------------------------------------

REFUSED = [
    ({"mask": torch.zeros(5, 32, 48)}, "is empty"),
    ({"mask": torch.ones(5, 32, 48)}, "covers everything"),
    ({"mask": torch.ones(4, 32, 48)}, "one mask for all frames"),
    ({"query": ("cube",)}, "not in the prompt"),
    ({"query": ()}, "query is empty"),
    ({"video": torch.rand(6, 3, 32, 48)}, "cut to 5"),
    ({"video": torch.rand(5, 3, 40, 48)}, "sides must divide by 16"),
    ({"video": torch.rand(5, 2, 32, 48)}, r"\[frames, 3"),
    ({"video": 255 * torch.rand(5, 3, 32, 48)}, "divide by 255"),
    ({"preserve": "all"}, "choose one of none, attn_v"),
    ({"solver": "heun"}, "choose one of euler, midpoint"),
    ({"scaling": "query"}, "choose one of key, bias"),
    ({"foreground_scale": 0}, "foreground_scale=0: give a number above 0"),
    ({"colour": 1}, "no such option"),
    ({"cache_limit": 1e-6}, "preserve='latent'"),
    ({"prompt": [PROMPT, PROMPT]}, "prompt lists 2 and there are 1"),
    ({"effects": EffectSetting(word_layers=(99,))}, "has layers 0 to"),
    ({"output_type": "gif"}, "choose pt, np or pil"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_bad_input_is_one_clear_line(made, change, message):
    pipe, arguments = made
    wiper = ObjectWiperPipeline.from_pipe(pipe)
    wiper.set_progress_bar_config(disable=True)
    video, mask = clip()
    given = {
        "video": video[0], "mask": mask[0], "prompt": PROMPT, "target_prompt": "sand",
        "query": ("ball",), "steps": 1, "solver": "euler", **arguments, **change,
    }  # fmt: skip
    if "video" in change:
        frames, height = change["video"].shape[0], change["video"].shape[2]
        given["mask"] = torch.zeros(frames, height, 48)
        given["mask"][:, 4:12, 20:30] = 1
    with pytest.raises(ValueError, match=message) as error:
        wiper(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_layers": (99,)}, "has layers 0 to"),
        ({"effects": EffectSetting(response_layers=(99,))}, "has layers 0 to"),
        ({"cache_limit": 1e-9}, "are allowed: preserve='latent'"),
    ],
)
def test_nothing_runs_before_a_refusal(made, change, message):
    hook = made[0].transformer.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        wipe(made, **change)
    hook.remove()


def test_a_refusal_names_what_fits(made):
    needed = wipe(made, steps=4).diagnostics.cache_bytes / 2**30
    with pytest.raises(ValueError) as error:
        wipe(made, steps=4, cache_limit=0.6 * needed)
    assert "value_steps=2 (of 4) fits, " in str(error.value)
    out = wipe(made, steps=4, cache_limit=0.6 * needed, value_steps=2)
    assert 0 < out.diagnostics.cache_bytes <= 0.6 * needed * 2**30
    layers = VideoFlow(made[0], **made[1]).layers
    fit = int(0.6 * layers)
    assert f"value_layers of {fit} layers (of {layers}) fit, " in str(error.value)
    wipe(made, steps=4, cache_limit=0.6 * needed, value_layers=tuple(range(fit)))
    with pytest.raises(
        ValueError, match=f"allowed: value_steps=1 with 1 value_layers .of {layers}"
    ):
        wipe(made, steps=4, cache_limit=1.01 * needed / 4 / layers)


def test_a_cache_of_diffusers_is_refused_first(made):
    transformer = made[0].transformer
    transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        wipe(made)
    transformer.disable_cache()
    assert wipe(made).frames.isfinite().all()


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (WipeSetting, {"steps": 0}, ValueError, "steps=0: give a number at least 1"),
        (WipeSetting, {"steps": 2.5}, TypeError, "steps=2.5: give a whole number"),
        (WipeSetting, {"value_steps": -1}, ValueError, "value_steps=-1: give a number at least 1"),
        (WipeSetting, {"shift": 0}, ValueError, "shift=0: give a number above 0"),
        (WipeSetting, {"growth": float("nan")}, ValueError, "growth=nan"),
        (WipeSetting, {"guidance_scale": float("inf")}, ValueError, "that is finite"),
        (WipeSetting, {"adaptive": "no"}, TypeError, "adaptive='no': give True or False"),
        (WipeSetting, {"value_layers": 3}, TypeError, "value_layers=3: give a list of layers"),
        (WipeSetting, {"effects": {"clip": 1}}, TypeError, "give an EffectSetting"),
        (EffectSetting, {"clip": 2}, ValueError, "clip=2: give a number at least 0 and at most 1"),
        (EffectSetting, {"grow": -1}, ValueError, "grow=-1: give a number at least 0"),
        (EffectSetting, {"contrast": "big"}, TypeError, "contrast='big': give a number"),
        (EffectSetting, {"sigma": 1}, ValueError, "sigma=1: give a number at least 0 and below 1"),
    ],
)
def test_settings_are_checked_where_they_enter(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_text_is_as_long_as_the_pipelines_call_makes_it():
    pipe = tiny_wan()[0]
    wanted = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
    assert VideoFlow(pipe).text(["a"])["encoder_hidden_states"].shape[1] == wanted
    assert VideoFlow(pipe, max_sequence_length=9).text(["a"])["encoder_hidden_states"].shape[1] == 9


def test_other_pipelines_are_refused():
    with pytest.raises(ValueError, match="HunyuanVideo or Wan|text-to-video"):
        ObjectWiperPipeline.from_pipe(tiny_flux()[0])(
            *clip(), PROMPT, "sand", ("ball",), steps=1, solver="euler"
        )
    with pytest.raises(ValueError, match="Wan 2.1"):
        VideoFlow(tiny_wan22()[0])


def test_effects_are_found_on_the_grid(made):
    flow, latents, text, object_, _, noise = parts(made, batch=2)
    with torch.no_grad():
        found = find_effects(
            flow, latents, text, [[(0, 1)], [(1,), (2,)]], object_, EffectSetting(), noise
        )
    assert found.mask.shape == object_.shape == found.response.shape == found.words.shape
    assert not (found.mask & object_).any()
    assert float(found.response.max()) <= 1 + 1e-5
