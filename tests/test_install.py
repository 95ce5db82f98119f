import copy
import gc
import inspect
import logging
import weakref

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from gen_accel import (
    AttentionPlan,
    GnaProcessor,
    ParoProcessor,
    SparseProcessor,
    apply,
    calibrate,
)
from gen_accel.engine import Engine
from gen_accel.layout import ForwardContext, TokenGrid, TokenLayout
from gen_accel.plan import PlanError
from gen_accel.planner import calibrated
from gen_accel.planner.base import Lists
from helpers import tiny
from helpers.tiny import PIPES

STEPS = 5  # with dense_steps=0.2 the first one is dense


def paro(**changes):
    return ParoProcessor(**{"min_tokens": 0, "block": 16, **changes})


def setup(build, steps=STEPS, **options):
    pipe, call = build(**options)
    return pipe, {**call, "num_inference_steps": steps}


def forwards(pipe, call):
    """Keyword arguments of every forward of the transformer in a run."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    tiny.run(pipe, **call)
    hook.remove()
    return seen


@pytest.mark.parametrize("build", PIPES, ids=lambda b: b.__name__)
def test_the_one_line(build):
    pipe, call = setup(build)
    dense = tiny.run(pipe, **call)
    handle = pipe.set_attn_processor(paro(density=0.3))
    sparse = tiny.run(pipe, **call)
    assert not torch.equal(sparse, dense) and sparse.isfinite().all()
    stats = list(handle.stats().values())
    assert sum(s.sparse for s in stats) > 0
    assert all(0 < s.mean_density < 0.8 for s in stats if s.sparse)
    handle.remove()
    assert torch.equal(tiny.run(pipe, **call), dense), "remove() leaves the pipeline as it was"


@pytest.mark.parametrize("build", PIPES, ids=lambda b: b.__name__)
@pytest.mark.parametrize("settings", [dict(dense_steps=1.0), dict(density=1.0)], ids=str)
def test_all_dense_and_all_kept_equal_the_stock_pipeline(build, settings):
    pipe, call = setup(build)
    dense = tiny.run(pipe, **call)
    with apply(pipe, paro(**settings)) as handle:
        out = tiny.run(pipe, **call)
        kinds = sum(s.sparse for s in handle.stats().values())
    assert (kinds > 0) == ("density" in settings)
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=1e-4)


def test_the_method_is_added_to_the_base_class_only_once():
    assert "set_attn_processor" in vars(DiffusionPipeline)
    assert WanPipeline.set_attn_processor is DiffusionPipeline.set_attn_processor


def test_schedule_and_reuse():
    pipe, call = setup(tiny.tiny_wan, steps=10)
    handle = apply(pipe, paro(dense_steps=0.2, dense_last_steps=0.1, dense_layers=(1,)))
    assert handle.plan is None
    tiny.run(pipe, **call)
    first = handle.stats()["transformer"]
    # Two branches a step, two layers: 2 dense steps, 7 sparse, 1 dense.
    assert first.dense == {
        "first 20% of the steps": 8,
        "dense layer": 14,
        "last 10% of the steps": 4,
    }
    assert first.sparse == 14
    assert {step for step, _ in first.density} == set(range(2, 9))
    assert first.seconds["calibrate"] > 0
    plan = handle.plan
    assert plan is not None and set(plan.components["transformer"].layers) == {0}

    tiny.run(pipe, **call)
    second = handle.stats()["transformer"]
    assert second.sparse == first.sparse and "calibrate" not in second.seconds
    assert handle.plan.components["transformer"] is plan.components["transformer"]


def test_without_dense_steps_the_first_step_calibrates():
    pipe, call = setup(tiny.tiny_wan)
    handle = apply(pipe, paro(dense_steps=0))
    tiny.run(pipe, **call)
    stats = handle.stats()["transformer"]
    assert stats.dense == {"calibrating": 4} and stats.sparse == 16


def test_another_grid_calibrates_again_and_says_so(caplog):
    caplog.set_level(logging.INFO, "gen_accel")
    pipe, call = setup(tiny.tiny_wan)
    handle = apply(pipe, paro())
    tiny.run(pipe, **call)
    assert str(handle.plan.grid) == "5x4x6"
    tiny.run(pipe, **{**call, "num_frames": 9})
    assert str(handle.plan.grid) == "3x4x6"
    assert "grid 3x4x6 instead of 5x4x6, calibrating again" in caplog.text
    tiny.run(pipe, **call)
    assert "calibrate" not in handle.stats()["transformer"].seconds, "the first plan was kept"


def test_a_saved_plan_gives_the_same_run(tmp_path):
    pipe, call = setup(tiny.tiny_hunyuan)
    handle = apply(pipe, paro())
    tiny.run(pipe, **call)
    expected = tiny.run(pipe, **call)
    path = handle.plan.save(tmp_path / "plan.safetensors")
    for plan in (path, str(path), AttentionPlan.load(path)):
        with apply(pipe, paro(plan=plan)) as loaded:
            assert torch.equal(tiny.run(pipe, **call), expected)
            assert "calibrate" not in loaded.stats()["transformer"].seconds


def test_plans_for_something_else_are_refused(tmp_path):
    pipe, call = setup(tiny.tiny_wan)
    handle = apply(pipe, paro())
    tiny.run(pipe, **call)
    plan = handle.plan
    handle.remove()
    with apply(pipe, paro(plan=plan)), pytest.raises(PlanError, match="for grid 5x4x6, this run"):
        tiny.run(pipe, **{**call, "num_frames": 9})
    other, _ = tiny.tiny_wan(heads=4)
    with pytest.raises(PlanError, match="made for WanTransformer3DModel/2x2x24"):
        apply(other, paro(plan=plan))
    assert all(type(p) is WanAttnProcessor for p in other.transformer.attn_processors.values())


def test_a_refused_plan_leaves_the_processors_that_were_there():
    pipe, call = setup(tiny.tiny_wan)
    other, other_call = setup(tiny.tiny_wan, heads=4)
    with apply(other, paro()) as handle:
        tiny.run(other, **other_call)
        plan = handle.plan
    kept = apply(pipe, paro())
    with pytest.raises(PlanError):
        apply(pipe, paro(plan=plan))
    tiny.run(pipe, **call)
    assert kept.stats()["transformer"].sparse == 16


def test_another_pipeline_with_the_same_scheduler_goes_on():
    pipe, call = setup(tiny.tiny_wan)
    handle = apply(pipe, paro())
    pipe = WanPipeline(**pipe.components)
    gc.collect()  # the pipeline it was put on is gone
    tiny.run(pipe, **call)
    stats = handle.stats()["transformer"]
    assert stats.dense == {"first 20% of the steps": 4} and stats.sparse == 16


@pytest.mark.parametrize("ran", [False, True])
def test_another_pipeline_with_a_scheduler_of_its_own_is_noticed(ran, caplog):
    pipe, call = setup(tiny.tiny_wan)
    handle = apply(pipe, GnaProcessor(min_tokens=0, dense_steps=0.4, window=3))
    if ran:
        tiny.run(pipe, **call)
        assert not caplog.records
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = WanPipeline(**{**pipe.components, "scheduler": scheduler})
    tiny.run(other, **call)
    stats = handle.stats()["transformer"]
    assert stats.sparse == 20 and not stats.dense, "its steps cannot be counted"
    said = [r.message for r in caplog.records if "not of the pipeline" in r.message]
    assert len(said) == 1 and "set the processors on the pipeline that runs" in said[0]


def test_the_clean_tokens_of_an_image_do_not_say_the_noise_level():
    pipe, call = setup(tiny.tiny_wan)
    seen = forwards(pipe, call)
    handle = apply(pipe.transformer, paro())
    engine = handle.components[0].engine
    for level in (900.0, 500.0):
        steps = torch.full((1, 120), level)
        steps[:, :24] = 0
        engine.begin(pipe.transformer, (), {**seen[0], "timestep": steps})
        assert engine.context.sigma == level / 1000 and engine.context.branch == 0


@pytest.mark.parametrize(
    "policy",
    [paro(), paro(order="curve", tail="joint/4"), SparseProcessor(min_tokens=0, block=16)],
    ids=["axis", "curve", "pooled"],
)
def test_defaults_of_torch_do_not_matter(policy):
    """What processors make stands on the CPU in fp32, whatever a user has set."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 120, 2, 16, generator=generator)
    layer = torch.tensor(0)

    def attend():
        engine = Engine(
            name="test",
            layers=1,
            planner=policy.planner("test", "test", 1),
            **policy.engine_settings(),
        )
        for _ in range(2):  # the first call calibrates, where that is needed
            engine.enter(ForwardContext(TokenLayout(TokenGrid(5, 4, 6))))
            out = engine.attend(q, k, v, layer=layer)
        assert engine.stats.sparse
        return out

    expected = attend()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        out = attend()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(out, expected)


def test_applying_again_replaces_and_an_old_handle_is_harmless():
    pipe, call = setup(tiny.tiny_wan)
    stock = dict(pipe.transformer.attn_processors)
    first = apply(pipe, paro(density=0.2))
    second = apply(pipe, paro(density=0.9))
    first.remove()
    assert pipe.transformer.attn_processors != stock, "the second one is still there"
    second.remove()
    second.remove()
    assert pipe.transformer.attn_processors == stock


def test_what_cannot_be_accelerated():
    pipe, _ = tiny.tiny_wan()
    with pytest.raises(TypeError, match="WanAttnProcessor: apply"):
        apply(pipe, WanAttnProcessor())
    with pytest.raises(ValueError, match="no family serves this transformer"):
        apply(AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1]), paro())
    with pytest.raises(TypeError, match="takes a diffusers pipeline"):
        apply(object(), paro())


def test_summary_tells_what_was_left_and_why():
    pipe, call = setup(tiny.tiny_hunyuan)
    handle = apply(pipe, paro(density=0.25))
    tiny.run(pipe, **call)
    text = handle.summary()
    assert "ParoProcessor(min_tokens=0, density=0.25, block=16)" in text
    assert "4 attention modules accelerated" in text
    assert "left alone: 1 x token refiner" in text
    assert "sparse: 16 calls, density 0." in text and "carrier gather" in text
    assert "of the softmax mass, calibrated during a run in" in text


def test_short_sequences_stay_dense_and_say_so_once(caplog):
    pipe, call = setup(tiny.tiny_wan)
    dense = tiny.run(pipe, **call)
    handle = pipe.set_attn_processor(ParoProcessor())
    assert torch.equal(tiny.run(pipe, **call), dense)
    tiny.run(pipe, **call)
    assert caplog.text.count("120 tokens < min_tokens=4096") == 1
    assert handle.stats()["transformer"].sparse == 0


def test_prompts_of_different_length_in_one_batch():
    pipe, call = setup(tiny.tiny_hunyuan)
    prompts = ["a cat runs", "an elephant walks slowly home in the evening"]
    dense = tiny.run(pipe, **{**call, "prompt": prompts})
    with apply(pipe, paro(density=1.0)) as handle:
        out = tiny.run(pipe, **{**call, "prompt": prompts})
        assert handle.stats()["transformer"].sparse
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=1e-4)
    with apply(pipe, paro(density=0.3)):
        assert tiny.run(pipe, **{**call, "prompt": prompts}).isfinite().all()


def test_left_padded_text_stays_dense_with_the_reason(monkeypatch):
    pipe, call = setup(tiny.tiny_hunyuan)
    monkeypatch.setattr(pipe.tokenizer, "padding_side", "left")
    dense = tiny.run(pipe, **call)
    with apply(pipe, paro()) as handle:
        torch.testing.assert_close(tiny.run(pipe, **call), dense, atol=2e-5, rtol=1e-4)
        assert "not a prefix" in next(iter(handle.stats()["transformer"].dense))
    with pytest.raises(ValueError, match="nothing to calibrate: .* not a prefix"):
        call.pop("output_type")
        calibrate(pipe, progress=False, prompts=[call.pop("prompt")], **call)


def test_a_bare_transformer_knows_no_steps_but_runs():
    pipe, call = setup(tiny.tiny_wan)
    handle = apply(pipe.transformer, paro())
    tiny.run(pipe, **call)
    stats = handle.stats()["transformer"]
    assert stats.dense == {"calibrating": 4} and stats.sparse == 16


def test_a_bare_transformer_asked_for_one_step_over_and_over_is_calibrated():
    pipe, call = setup(tiny.tiny_wan)
    seen = forwards(pipe, call)
    handle = apply(pipe.transformer, paro())
    with torch.no_grad():
        for _ in range(6):
            pipe.transformer(**seen[0])
    stats = handle.stats()["transformer"]
    assert stats.dense == {"calibrating": 8} and stats.sparse == 4


def test_set_on_the_transformer_directly():
    pipe, call = setup(tiny.tiny_wan)
    dense = tiny.run(pipe, **call)
    pipe.transformer.set_attn_processor(paro(grid=(5, 4, 6), density=1.0))
    torch.testing.assert_close(tiny.run(pipe, **call), dense, atol=2e-5, rtol=1e-4)
    pipe.transformer.set_attn_processor(paro(grid=(5, 4, 6), density=0.3))
    assert not torch.equal(tiny.run(pipe, **call), dense)
    pipe.transformer.set_attn_processor(paro())
    with pytest.raises(ValueError, match=r"write pipe.set_attn_processor\(...\), or"):
        tiny.run(pipe, **call)
    pipe.transformer.set_attn_processor(paro(grid=(5, 4, 6), dense_layers=(0, -1)))
    with pytest.raises(ValueError, match=r"dense_layers=\(0, -1\): .* count from the first"):
        tiny.run(pipe, **call)


@pytest.mark.parametrize(
    "build, grid",
    [(tiny.tiny_hunyuan, (5, 4, 6)), (tiny.tiny_flux, (1, 8, 12))],
    ids=["hv", "flux"],
)
def test_set_directly_on_joint_transformers(build, grid):
    pipe, call = setup(build)
    dense = tiny.run(pipe, **call)
    pipe.transformer.set_attn_processor(paro(grid=grid, density=1.0))
    torch.testing.assert_close(tiny.run(pipe, **call), dense, atol=2e-5, rtol=1e-4)


def test_compiled_blocks_are_one_graph_and_follow_the_schedule():
    pipe, call = setup(tiny.tiny_wan)
    with apply(pipe, paro()):
        expected = tiny.run(pipe, **call)
    torch._dynamo.reset()
    handle = apply(pipe, paro())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, block in enumerate(pipe.transformer.blocks):
            pipe.transformer.blocks[i] = torch.compile(block, fullgraph=True, backend="eager")
        out = tiny.run(pipe, **call)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert handle.stats()["transformer"].sparse == 16


def test_first_block_cache_skips_blocks_without_confusing_the_steps():
    pipe, call = setup(tiny.tiny_wan, steps=10)
    handle = apply(pipe, paro())
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    out = tiny.run(pipe, **call)
    stats = handle.stats()["transformer"]
    assert out.isfinite().all()
    assert stats.sparse < 32, "the cache skipped some calls"
    assert handle.components[0].engine.context.step == 9


def test_save_and_load_are_intact(tmp_path):
    pipe, call = setup(tiny.tiny_wan)
    dense = tiny.run(pipe, **call)
    apply(pipe, paro())
    pipe.transformer.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert all(type(p) is WanAttnProcessor for p in loaded.attn_processors.values())
    pipe.transformer = loaded
    torch.testing.assert_close(tiny.run(pipe, **call), dense)


def test_a_pipeline_with_processors_can_be_collected():
    pipe, _ = tiny.tiny_wan()
    handle = apply(pipe, paro())
    transformer = weakref.ref(pipe.transformer)
    del pipe, handle
    gc.collect()
    assert transformer() is None


def test_lists_beyond_the_budget_are_made_anew(monkeypatch):
    pipe, call = setup(tiny.tiny_wan)
    with apply(pipe, paro()) as handle:
        expected = tiny.run(pipe, **call)
        kept = handle.components[0].planner._lists
        one = next(iter(kept.values())).nbytes
        assert len(kept) == 2
        monkeypatch.setattr(calibrated, "_LIST_BYTES", one)
        kept.clear()
        tiny.run(pipe, **call)
        assert len(kept) == 1
        # Those of a step group that is over make room for those of the next.
        (key,) = kept
        over = (key[0], key[1] - 1, *key[2:])
        kept[over] = kept.pop(key)
        tiny.run(pipe, **call)
        assert list(kept) == [key]
    with apply(pipe, paro()) as handle:
        assert torch.equal(tiny.run(pipe, **call), expected)
        assert len(handle.components[0].planner._lists) == 1


@pytest.mark.parametrize(
    "policy",
    [paro(), GnaProcessor(min_tokens=0, block=16), SparseProcessor(select="all", min_tokens=0)],
    ids=lambda policy: type(policy).__name__,
)
def test_lists_of_other_prompts_are_let_go(policy):
    pipe, call = setup(tiny.tiny_hunyuan, steps=3)
    handle = apply(pipe, policy)
    planner = handle.components[0].planner
    lists = next(x for x in vars(planner).values() if isinstance(x, Lists))
    tiny.run(pipe, **{**call, "prompt": "a"})
    tiny.run(pipe, **{**call, "prompt": "a"})
    count, kept = len(lists), {id(made) for made in lists.values()}
    tiny.run(pipe, **{**call, "prompt": "a"})
    assert kept == {id(made) for made in lists.values()}, "the same prompt finds its lists"
    for prompt in ("a b c", "a b c d e", "a b c d e f g"):
        tiny.run(pipe, **{**call, "prompt": prompt})
        assert len(lists) == count > 0


def test_a_copied_transformer_runs_on_its_own():
    torch._dynamo.reset()
    pipe, call = setup(tiny.tiny_wan)
    handle = apply(pipe, paro())
    expected = tiny.run(pipe, **call)
    pipe.transformer = copy.deepcopy(pipe.transformer)
    handle.remove()
    del handle
    gc.collect()  # its engine must not be needed
    for block in pipe.transformer.blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(tiny.run(pipe, **call), expected, atol=1e-5, rtol=1e-5)
    assert pipe.transformer._gen_accel.engine.stats.sparse == 16


def test_a_bare_transformer_finds_its_timestep_by_position():
    pipe, call = setup(tiny.tiny_flux)
    seen = forwards(pipe, call)
    handle = apply(pipe.transformer, paro())
    names = list(inspect.signature(type(pipe.transformer).forward).parameters)[1:]
    first = seen[0] | {"controlnet_block_samples": None, "controlnet_single_block_samples": None}
    positional = [first.pop(name) for name in names[: names.index("timestep") + 1]]
    with torch.no_grad():
        pipe.transformer(*positional, **first)
    assert handle.components[0].engine.context.sigma == float(seen[0]["timestep"][0]) == 1.0


def test_set_directly_follows_the_backend():
    pipe, call = setup(tiny.tiny_wan)
    policy = paro(grid=(5, 4, 6), min_tokens=1 << 20)
    pipe.transformer.set_attn_processor(policy)
    tiny.run(pipe, **call)
    pipe.transformer.set_attention_backend("_native_math")
    tiny.run(pipe, **call)
    backends = {p._attention_backend for p in policy._direct._processors.values()}
    assert [b.value for b in backends] == ["_native_math"]


@pytest.mark.parametrize("build", [tiny.tiny_wan, tiny.tiny_hunyuan, tiny.tiny_flux])
def test_compile_lasts_until_the_processors_go(build, monkeypatch):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m, **given: compiled(m, **given, backend="eager")
    )
    torch._dynamo.reset()
    pipe, call = setup(build)
    with apply(pipe, paro(density=0.4)):
        expected = tiny.run(pipe, **call)
    blocks = [m for m in pipe.transformer.modules() if type(m).__name__.endswith("Block")]
    with apply(pipe, paro(density=0.4), compile=True) as handle:
        assert sum(block._compiled_call_impl is not None for block in blocks) == len(
            handle.components[0].taken
        )
        out = tiny.run(pipe, **call)
        assert handle.stats()["transformer"].sparse
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    assert all(block._compiled_call_impl is None for block in blocks)
