"""The override against a fake of ComfyUI's contract; the real ComfyUI is in test_server.py."""

import dataclasses
import itertools
import logging
from types import SimpleNamespace

import pytest
import torch

from gen_accel.comfy.call import AttentionCall, without_padding
from gen_accel.comfy.layout import bind, token_layout
from gen_accel.comfy.patch import install, last_run
from gen_accel.comfy.run import Run, Span
from gen_accel.layout import TokenGrid, TokenLayout, Unsupported
from gen_accel.processors import GnaProcessor, ParoProcessor, SpaAttnProcessor, SparseProcessor
from helpers import fake_comfy
from helpers.fake_comfy import OVERRIDE, ModelPatcher, sample

VIDEO, IMAGE = (1, 4, 4, 16, 16), (1, 4, 32, 32)
MODELS = {
    "wan": (fake_comfy.WanModel, VIDEO),
    "hunyuan_video": (fake_comfy.HunyuanVideo, VIDEO),
    "cosmos": (fake_comfy.GeneralDIT, VIDEO),
    "flux": (fake_comfy.Flux, IMAGE),
}
SPARSE = {"min_tokens": 0, "density": 0.3, "block": 16}
ALWAYS = Span(0.0, 1.0)


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    for name, module in fake_comfy.modules().items():
        monkeypatch.setitem(__import__("sys").modules, name, module)


def tiny(family):
    kind, shape = MODELS[family]
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return ModelPatcher(kind()), latent


def patched(model, policy=None, span=ALWAYS, **settings):
    return install(model, policy=policy or SparseProcessor(**SPARSE), span=span, **settings)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_dense_is_the_model_itself_and_sparse_is_not(family, batched):
    model, latent = tiny(family)
    plain = sample(model, latent, batched=batched)
    dense = patched(model, span=Span(1.0, 1.0))
    assert torch.equal(sample(dense, latent, batched=batched), plain)
    forwards = 4 if batched else 8
    assert sum(last_run(dense).stats.dense.values()) == 2 * forwards
    for policy in (
        SparseProcessor(**SPARSE),
        ParoProcessor(**SPARSE),
        SpaAttnProcessor(**SPARSE, refresh=2),
        GnaProcessor(min_tokens=0, density=0.25),
    ):
        sparse = patched(model, policy)
        assert (sample(sparse, latent, batched=batched) - plain).abs().max() > 1e-7, policy
        assert last_run(sparse).stats.sparse > 0
    assert OVERRIDE not in model.model_options["transformer_options"], "the input was changed"


def test_the_density_asked_for_is_reported():
    model, latent = tiny("wan")
    sparse = patched(model)
    sample(sparse, latent)
    run = last_run(sparse)
    assert run.stats.mean_density == pytest.approx(0.3, abs=0.02)
    assert run.stats.sparse == 16 and run.grids == [TokenGrid(4, 8, 8)]
    assert run.declined == {"cross-attention": 16}


def test_percent_is_of_the_noise_schedule():
    model, latent = tiny("wan")
    sparse = patched(model, span=Span(0.25, 0.75))
    sample(sparse, latent, steps=8)
    steps = {step for step, _ in last_run(sparse).stats.density}
    assert steps == {2, 3, 4, 5, 6}  # levels 0.75 to 0.25
    sigmas = [0.5, 0.25]  # the second half of a run, as KSampler (Advanced) makes one
    assert Span(0.5, 1).dense_steps(sigmas, lambda p: 1 - p) == (0, 0)
    assert Span(0.5, 1).dense_steps(sigmas, None) == (1, 0)
    assert Span(0.0, 1).dense_steps(sigmas, lambda p: 1 - p) == (0, 0)
    with pytest.raises(ValueError, match="give 0 <= start <= end <= 1"):
        Span(0.5, 0.2)


def test_what_is_not_ours_is_declined_with_one_line_each(caplog):
    model, latent = tiny("hunyuan_video")
    sparse = patched(model)
    with caplog.at_level(logging.INFO, "gen_accel"):
        sample(sparse, latent)
        sample(sparse, latent)
    said = [r.message for r in caplog.records if "leaves attention calls" in r.message]
    assert len(said) == 1 and "24 tokens, the latents and their text have 280" in said[0]


def test_a_carrier_that_cannot_is_declined(monkeypatch):
    model, latent = tiny("wan")
    model.model.head_dim, model.model.heads = 320, 1
    policy = SparseProcessor(**SPARSE, impl="triton", precision="bf16")
    sparse = patched(model, policy)
    monkeypatch.setattr(model.model, "attend", lambda q, k, v, context, options: (
        fake_comfy.optimized_attention(
            *(x.flatten(2) for x in (q, k, v)), heads=1, transformer_options=options
        )
    ))  # fmt: skip
    plain = sample(model, latent)
    assert torch.equal(sample(sparse, latent), plain)
    (reason,) = last_run(sparse).declined
    assert "head_dim=320: it takes at most 256" in reason and last_run(sparse).stats.sparse == 0


def test_auto_is_triton_or_nothing_on_a_gpu(monkeypatch):
    asked = []

    def choose(*tensors, impl, precision):
        asked.append(impl)
        raise ValueError("impl='triton': no")

    monkeypatch.setattr("gen_accel.comfy.run.choose", choose)
    q = SimpleNamespace(device=torch.device("cuda"))
    for impl in ("auto", "gather"):
        run = Run(SparseProcessor(**SPARSE, impl=impl), ALWAYS)
        with pytest.raises(Unsupported, match="no"):
            run._make(None, q, q, q)
    assert asked == ["triton", "gather"]


def call(q, k=None, mask=None, **rest):
    k = q if k is None else k
    settings = {"heads": 2, "mask": mask, "rest": rest}
    return AttentionCall(fake_comfy.optimized_attention, q, k, k, **settings)


def test_reasons():
    layout, q = TokenLayout(TokenGrid(2, 4, 4)), torch.randn(1, 32, 8)
    assert call(q).reason(layout) is None
    assert call(q, scale=0.5).reason(layout) is None
    assert "scale=0.1" in call(q, scale=0.1).reason(layout)
    assert call(q, enable_gqa=True).reason(layout) == "grouped heads"
    assert call(q, q[..., :4]).reason(layout) == "grouped heads"
    assert call(q, q[:, :5]).reason(layout) == "cross-attention"
    assert "exact" in call(q, low_precision_attention=False).reason(layout)
    assert call(q, low_precision_attention=True).reason(layout) is None
    assert "16 tokens" in call(q[:, :16]).reason(layout)


def test_masks_of_text_padding_and_no_others():
    layout = TokenLayout(TokenGrid(1, 4, 4), text_after=8)
    low = torch.finfo(torch.float32).min
    additive = torch.zeros(1, 1, 24)
    additive[..., 20:] = low
    assert without_padding(layout, None, 2) == layout
    assert without_padding(layout, torch.zeros(1, 1, 24), 2) == layout
    assert without_padding(layout, additive, 2).text_valid == (4, 4)
    assert without_padding(layout, additive[:, None] == 0, 1).text_valid == (4,)
    per_sample = additive.repeat(2, 1, 1)
    per_sample[1, 0, 18:] = -torch.inf
    assert without_padding(layout, per_sample, 2).text_valid == (4, 2)
    weights = additive.clone()
    weights[..., 3] = -0.5
    hole = additive.clone()
    hole[..., 17] = low
    video = additive.clone()
    video[..., 10:] = low
    square = torch.zeros(24, 24)
    for mask in (weights, hole, video, square, additive.long(), torch.zeros(1, 2, 1, 24)):
        with pytest.raises(Unsupported, match="mask"):
            without_padding(layout, mask, 1)
    before = TokenLayout(TokenGrid(1, 4, 4), text_before=8)
    with pytest.raises(Unsupported, match="not text padding"):
        without_padding(before, additive, 1)


def test_layouts():
    context = torch.zeros(1, 7, 32)
    wan, flux, hunyuan = (MODELS[n][0]() for n in ("wan", "flux", "hunyuan_video"))
    odd = {"x": torch.zeros(1, 4, 3, 15, 17), "context": context}
    assert token_layout(wan, odd) == TokenLayout(TokenGrid(3, 8, 9))
    more = odd | {"time_dim_concat": torch.zeros(1, 4, 2, 15, 17)}
    assert token_layout(wan, more).grid == TokenGrid(5, 8, 9)
    wan.ref_conv = object()
    assert token_layout(wan, odd | {"reference_latent": object()}).grid == TokenGrid(4, 8, 9)
    image = {"x": torch.zeros(1, 4, 16, 16), "context": context}
    assert token_layout(flux, image) == TokenLayout(TokenGrid(1, 8, 8), text_before=7)
    byt5 = odd | {"txt_byt5": torch.zeros(1, 5, 8)}
    assert token_layout(hunyuan, byt5).text_after == 12
    with pytest.raises(Unsupported, match="reference images"):
        token_layout(flux, image | {"ref_latents": [0]})
    with pytest.raises(Unsupported, match="on which side"):
        token_layout(type("Other", (), {"double_blocks": [], "patch_size": 2})(), image)
    with pytest.raises(Unsupported, match="how many latents"):
        token_layout(object(), image)
    with pytest.raises(Unsupported, match="neither an image nor a video"):
        token_layout(wan, {"x": torch.zeros(1, 4, 9)})


def test_arguments_by_name():
    def forward(x, y, transformer_options={}, **kwargs):  # noqa: B006
        raise AssertionError

    bound, named = bind(forward, (1, 2), {"z": 3})
    assert named == {"x": 1, "y": 2, "z": 3} and bound.kwargs == {"z": 3}


def counting(calls, before=None):
    def override(func, *args, **kwargs):
        calls.append(func)
        return before(func, *args, **kwargs) if before else func(*args, **kwargs)

    return override


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize("place", ["before", "after"])
def test_overrides_of_others_are_called_for_what_we_leave(place, chains):
    model, latent = tiny("wan")
    calls = []

    def put(patcher):
        patcher = patcher.clone()
        options = patcher.model_options["transformer_options"]
        options[OVERRIDE] = counting(calls, options.get(OVERRIDE) if chains else None)
        return patcher

    half = Span(0.5, 1.0)
    ours = patched(put(model), span=half) if place == "before" else put(patched(model, span=half))
    out = sample(ours, latent)
    assert last_run(ours).stats.sparse == 8
    assert len(calls) == 16 + 8  # cross-attention, and self-attention of two steps
    assert torch.equal(out, sample(patched(model, span=half), latent))


def test_nodes_of_ours_replace_each_other_setting_by_setting():
    model, latent = tiny("wan")
    kernel_calls = []

    def kernel(*args, **kwargs):
        kernel_calls.append(kwargs["mask"])
        return fake_comfy.optimized_attention(*args, **kwargs)

    both = install(patched(model, span=Span(0.5, 1.0)), dense=kernel)
    out = sample(both, latent)
    assert last_run(both).stats.sparse == 8 and len(kernel_calls) == 8
    assert torch.allclose(out, sample(patched(model, span=Span(0.5, 1.0)), latent), atol=1e-6)
    other = patched(both, GnaProcessor(min_tokens=0), span=ALWAYS)
    sample(other, latent)
    assert isinstance(last_run(other).policy, GnaProcessor) and len(kernel_calls) == 8
    assert len(other.wrappers[fake_comfy.WrappersMP.DIFFUSION_MODEL]["gen_accel"]) == 1
    quantised = install(model, dense="int8")
    sample(quantised, latent)
    assert set(last_run(quantised).stats.dense) == {"first 100% of the steps"}


def test_a_dense_kernel_sees_no_padding():
    model, latent = tiny("hunyuan_video")
    seen = []

    def kernel(q, k, v, heads, mask=None, **kwargs):
        seen.append((k.shape[2], mask))
        return fake_comfy.optimized_attention(q, k, v, heads, mask, **kwargs)

    out = sample(install(model, dense=kernel), latent)
    assert set(seen) == {(280 - 10, None)}
    assert torch.allclose(out, sample(model, latent), atol=1e-6)


def test_clones_share_the_patch_and_runs_do_not_leak():
    model, latent = tiny("wan")
    sparse = patched(model, ParoProcessor(**SPARSE), span=Span(0.5, 1.0))
    first = sample(sparse.clone().clone(), latent)
    assert last_run(sparse).plan is not None
    other = sample(sparse, latent + 1)
    with pytest.raises(InterruptedError):
        sample(sparse, latent + 2, fail_at=3)
    assert torch.equal(sample(sparse, latent), first)
    assert torch.equal(sample(sparse, latent + 1), other)
    run = sparse.get_attachment("gen_accel").last
    assert run._engine is None and sparse.get_attachment("gen_accel").run is None


def test_a_plan_serves_another_run_and_no_other_grid(tmp_path):
    model, latent = tiny("wan")
    made = patched(model, ParoProcessor(**SPARSE), span=Span(0.5, 1.0))
    out = sample(made, latent)
    path = last_run(made).plan.save(tmp_path / "plan.safetensors")
    used = patched(model, ParoProcessor(**SPARSE, plan=path), span=Span(0.5, 1.0))
    assert torch.equal(sample(used, latent), out)
    sample(used, latent[..., :8])
    (reason,) = (r for r in last_run(used).declined if "plan was made for grid" in r)
    assert last_run(used).declined[reason] == 16 and last_run(used).stats.sparse == 0
    foreign, image = tiny("flux")
    with pytest.raises(ValueError, match="plan was made for WanTransformer3DModel/2x2x16"):
        sample(patched(foreign, ParoProcessor(**SPARSE, plan=path)), image)


@pytest.mark.parametrize("policy", [SpaAttnProcessor(**SPARSE, refresh=4), ParoProcessor(**SPARSE)])
def test_windows_of_two_sizes(policy):
    model, latent = tiny("wan")
    sparse = patched(model, policy, span=Span(0.5, 1.0))
    pieces = (slice(0, 3), slice(1, 4), slice(2, 4))
    assert sample(sparse, latent, pieces=pieces, batched=True).isfinite().all()
    run = last_run(sparse)
    assert run.grids == [TokenGrid(3, 8, 8), TokenGrid(2, 8, 8)] and run.stats.sparse > 0


def test_branches_keep_their_number():
    run = Run(SparseProcessor(**SPARSE), ALWAYS)
    sigmas = torch.tensor([1.0, 0.5, 0.0])

    def context(sigma, who):
        return run.context(
            {"sample_sigmas": sigmas, "sigmas": torch.tensor([sigma]), "cond_or_uncond": who}
        )

    found = [context(1.0, [1]), context(1.0, [0]), context(1.0, [1])]
    assert [c.branch for c in found] == [0, 1, 2]  # the third is another window
    again = [context(0.5, [0]), context(0.5, [1]), context(0.5, [1])]
    assert [c.branch for c in again] == [1, 0, 2]
    assert [c.step for c in (*found, *again)] == [0, 0, 0, 1, 1, 1]
    assert context(0.7, [1]).step == 0  # a sampler that looks in between


@pytest.mark.parametrize("says", [False, True])
def test_skipped_blocks_do_not_shift_the_others(says):
    """SkipLayerGuidance: a pass without block 0, where ComfyUI does or does not number blocks."""
    model, latent = tiny("wan")
    sparse = patched(model, ParoProcessor(**SPARSE), span=Span(0.5, 1.0))
    forward = model.model._forward

    def skipping(x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
        forward(x, timestep, context, transformer_options)
        options = transformer_options | {
            "patches_replace": {"dit": {("double_block", 0): skipping}}
        }
        if says:
            options |= {"block_index": 1, "block_type": "double"}
        q = torch.randn(len(x), 256, 2, 16, generator=torch.Generator().manual_seed(1))
        again = {**options, "gen_accel": dataclasses.replace(options["gen_accel"])}
        again["gen_accel"].layers = itertools.count()
        model.model.attend(q, q, q, context, again)
        return x

    model.model._forward = skipping
    sample(sparse, latent)
    run = last_run(sparse)
    assert run.stats.sparse == 8 + 4 * says
    assert run.declined["a node replaces blocks, and which of them calls is not known"] == 8 * (
        not says
    )


def test_calls_without_a_forward_pass_through():
    model, _ = tiny("wan")
    override = patched(model).model_options["transformer_options"][OVERRIDE]
    q = torch.randn(1, 40, 32)
    for options in ({}, None):
        out = override(
            fake_comfy.optimized_attention, q, q, q, 2, transformer_options=options,
            _inside_attn_wrapper=True,
        )  # fmt: skip
        assert torch.equal(out, fake_comfy.optimized_attention(q, q, q, 2))
