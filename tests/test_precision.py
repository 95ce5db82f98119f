"""Precisions per head: splitting calls, measuring, plan files, and what an engine runs."""

from __future__ import annotations

import logging
from unittest.mock import MagicMock

import pytest
import torch
from safetensors import safe_open

from gen_accel import AttentionPlan, GnaProcessor, ParoProcessor, SpaAttnProcessor, apply, calibrate
from gen_accel import engine as engine_module
from gen_accel.engine import Engine
from gen_accel.kernels.api import block_sparse_attention
from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.quant import PRECISIONS
from gen_accel.kernels.tail import block_scores, pool_keys, rectify
from gen_accel.plan import PlanError
from gen_accel.precision import HeadPrecisions, PrecisionMeter, head_errors, pays, split_heads
from gen_accel.schedule import Schedule
from helpers import tiny
from helpers.attention_cases import Case, banded, random

MIXED = HeadPrecisions(("int8", "auto", "int8", "int8+fp8"))


def call(batch=2, heads=4):
    case = Case("mixed", random(1, heads, 0.5), 300, 260, heads=heads, batch=batch)
    return *case.tensors(), case.blocks()


def test_heads_are_grouped_and_cut():
    assert MIXED.groups() == {"int8": [0, 2], "auto": [1], "int8+fp8": [3]}
    assert MIXED.heads(slice(1, 3)).names == ("auto", "int8")
    with pytest.raises(ValueError, match="precision='int7'"):
        HeadPrecisions(("int7",))


@pytest.mark.parametrize("tail", ["drop", "joint", "variance", "rectified"])
@pytest.mark.parametrize("heads", [(0, 2), (1, 2, 3), (3,)])
def test_some_heads_of_a_call_are_those_heads(tail, heads):
    q, k, v, blocks = call()
    stands = None
    if tail in ("joint", "variance"):
        stands = pool_keys(k, v, 64, per_block=4, variance=tail == "variance")
    elif tail == "rectified":
        scores = block_scores(q, k, 64, 64, pooled=260, scale=0.125)
        stands = rectify(v, blocks, scores, pooled=260)
    whole = block_sparse_attention(q, k, v, blocks, tail=stands)
    *qkv, part, some = split_heads(q, k, v, blocks, stands, heads)
    out = block_sparse_attention(*qkv, part, tail=some)
    torch.testing.assert_close(out, whole[:, :, list(heads)], rtol=1e-5, atol=1e-5)
    assert split_heads(q, k, v, blocks, stands, heads)[3] is part  # made once
    rule = Case("rule", random(1, 4, 0.3), 300, 260, heads=4, partial=random(1, 4, 0.3),
                mask_mod=banded).blocks()  # fmt: skip
    with pytest.raises(ValueError, match="without an element rule"):
        split_heads(q, k, v, rule, None, heads)


def test_each_head_has_the_cheapest_that_is_exact_enough():
    q, k, v, blocks = call()
    q[:, :, 1] *= 8  # large scores: rounding them moves weights
    meter = PrecisionMeter(("int4+int4", "int8+int8", "int8"), max_error=0.02)
    meter.observe(3, q, k, v, blocks)
    errors = meter.errors[3]
    assert all(errors[name][1] > 0.02 for name in errors)
    chosen = meter.choose(3)
    assert chosen.names[1] == "auto"
    for head, name in enumerate(chosen.names):
        kept = [n for n in meter.candidates if errors[n][head] <= 0.02]
        assert name == (kept[0] if kept else "auto")
    assert "int4+int4" not in chosen.names and "int8+int8" in chosen.names
    # The worst call counts.
    before = {name: error.clone() for name, error in errors.items()}
    meter.observe(3, q / 4, k, v, blocks)
    assert all((errors[n] >= before[n]).all() for n in errors)


def test_errors_are_relative_and_per_head():
    exact = torch.ones(2, 5, 3, 4)
    out = exact.clone()
    out[1, :, 2] *= 1.5
    exact[:, :, 0] = out[:, :, 0] = 0
    torch.testing.assert_close(head_errors(out, exact), torch.tensor([0, 0, 0.5]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": ("int8", "bf16")}, "precision='bf16': it must be one of 'auto', 'int8'"),
        ({"candidates": ()}, "give at least one"),
        ({"max_error": 0.0}, "max_error=0.0: it is a relative error above 0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        PrecisionMeter(**change)


# ---- plans ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned():
    """A plan of a tiny model with precisions, and one without."""
    pipe, run = tiny.tiny_wan()
    run.pop("prompt")
    run.update(num_inference_steps=4, progress=False, block=16, groups=2)
    with_it = calibrate(pipe, "a", precision=("int4+int4", "int8+int8"), max_error=0.012, **run)
    return with_it, calibrate(pipe, "a", **run)


def test_calibration_chooses_by_what_it_measured(planned):
    plan, plain = planned
    found = plan.info["precision"]
    assert found["max_error"] == 0.012 and found["tried"] == ["int4+int4", "int8+int8"]
    for layer, part in plan.components["transformer"].layers.items():
        errors = found["errors"]["transformer"][str(layer)]
        for head, name in enumerate(part.precision.names):
            assert name == next((n for n in found["tried"] if errors[n][head] <= 0.012), "auto")
        assert plain.components["transformer"].layers[layer].precision is None


def test_plan_files_carry_precisions(planned, tmp_path):
    plan, plain = planned
    for made, version in ((plan, 3), (plain, 1)):
        path = made.save(tmp_path / "plan.safetensors")
        with safe_open(path, "numpy") as file:
            assert f'"version": {version}' in file.metadata()["gen_accel.plan"]
        loaded = AttentionPlan.load(path)
        for layer, part in made.components["transformer"].layers.items():
            assert loaded.components["transformer"].layers[layer].precision == part.precision


def test_damaged_precisions_are_refused(planned, tmp_path):
    plan = planned[0]
    layer = plan.components["transformer"].layers[0]
    before = layer.precision
    for names in (("int8",), ("int8",) * 3):
        object.__setattr__(layer, "precision", HeadPrecisions(names))
        path = plan.save(tmp_path / "plan.safetensors")
        with pytest.raises(PlanError, match="damaged header"):
            AttentionPlan.load(path)
    object.__setattr__(layer, "precision", before)


# ---- what runs -----------------------------------------------------------------------------------


def run(policy, build=tiny.tiny_wan, **changes):
    pipe, arguments = build()
    with apply(pipe, policy) as handle:
        out = tiny.run(pipe, **{**arguments, "num_inference_steps": 3, **changes})
        return out, handle.stats()["transformer"], handle.summary()


@pytest.mark.parametrize(
    "build", [tiny.tiny_wan, tiny.tiny_hunyuan, tiny.tiny_flux, tiny.tiny_cosmos2]
)
@pytest.mark.parametrize(
    "policy",
    [
        lambda **o: ParoProcessor(density=0.5, **o),
        lambda **o: ParoProcessor(density=0.5, order="curve", tail="joint", **o),
        lambda **o: SpaAttnProcessor(density=0.5, **o),
        lambda **o: GnaProcessor(density=0.5, **o),
    ],
    ids=["axis", "curve+joint", "pooled+rectified", "window"],
)
def test_every_precision_with_every_order_selection_and_family(policy, build):
    settings = {"min_tokens": 0, "block": 16}
    exact, stats, summary = run(policy(**settings), build)
    assert stats.precision == {"auto": stats.sparse} and "precision" not in summary.splitlines()[-1]
    assert stats.sparse
    for name in ("int8", "int8+int8", "int4"):
        out, stats, summary = run(policy(precision=name, **settings), build)
        error = (out - exact).norm() / exact.norm()
        assert 0 < error < (0.3 if name == "int4" else 0.03), name
        assert stats.precision == {name: stats.sparse} and stats.emulated
        assert f"precision {name} x {stats.sparse} (emulated: accuracy only, no speed)" in summary


def test_a_plan_says_who_is_quantised_unless_the_user_does(planned):
    plan = planned[0]
    layers = plan.components["transformer"].layers
    before = {n: layer.precision for n, layer in layers.items()}
    try:
        for layer in layers.values():
            object.__setattr__(layer, "precision", HeadPrecisions(("int4+int4", "auto")))
        mixed, stats, _ = run(ParoProcessor(plan=plan, min_tokens=0))
        assert stats.precision == {"int4+int4": stats.sparse, "auto": stats.sparse}
        assert stats.carrier == "gather"
        same, stats, _ = run(ParoProcessor(plan=plan, min_tokens=0, precision="fp32"))
        assert stats.precision == {"fp32": stats.sparse} and not stats.emulated
        coarse, _, _ = run(ParoProcessor(plan=plan, min_tokens=0, precision="int4+int4"))
        assert 0 < (mixed - same).norm() < (coarse - same).norm()
        part = layers[0].heads(slice(1, 2))  # what a rank of two executes
        assert part.precision.names == ("auto",) and part.masks.shape[1] == 1
    finally:
        for n, layer in layers.items():
            object.__setattr__(layer, "precision", before[n])


@pytest.mark.parametrize("kernel", [True, False])
def test_paro_prefers_int8_where_a_kernel_runs_it(kernel, monkeypatch):
    """As on a GPU: half precision, and a carrier that multiplies codes."""
    monkeypatch.setattr(
        engine_module, "emulates", lambda name, precision: precision in PRECISIONS and not kernel
    )
    half = lambda: (lambda pipe, call: (pipe.to(torch.bfloat16), call))(*tiny.tiny_wan())  # noqa: E731
    settings = {"min_tokens": 0, "block": 16}
    for policy, build, expected in (
        (ParoProcessor(**settings), half, "int8" if kernel else "auto"),
        (ParoProcessor(precision="bf16", **settings), half, "bf16"),
        (ParoProcessor(**settings), tiny.tiny_wan, "auto"),
        (SpaAttnProcessor(**settings), half, "auto"),
    ):
        _, stats, _ = run(policy, build)
        assert set(stats.precision) == {expected}


def test_a_plans_precision_without_a_kernel_on_this_gpu_is_not_quantised(monkeypatch):
    planner = HeadPrecisions(("int8", "int8+fp8", "auto", "int8+fp8"))
    q = torch.zeros(1, 32, 4, 16)
    blocks = Blocks.from_mask(
        torch.ones(1, 1, 2, 2, dtype=torch.bool), q_len=32, kv_len=32, block_size=16
    )
    engine = Engine(name="t", layers=1, schedule=Schedule(), planner=None)
    assert engine._runnable(planner, q, q, q, blocks, None) == planner.groups()
    monkeypatch.setattr(engine_module, "emulates", lambda carrier, name: "fp8" in name)
    monkeypatch.setattr(engine_module, "choose", lambda *a, **k: "triton")
    on_gpu = MagicMock(device=torch.device("cuda"))
    found = engine._runnable(planner, on_gpu, q, q, blocks, None)
    assert found == {"int8": [0], "auto": [1, 2, 3]}


def test_bad_numbers_are_named_on_request(caplog):
    pipe, arguments = tiny.tiny_wan()
    torch.nn.init.constant_(pipe.transformer.blocks[1].attn1.to_v.bias, float("inf"))
    policy = {"density": 0.5, "min_tokens": 0, "block": 16}
    with (
        apply(pipe, SpaAttnProcessor(check_finite=True, **policy)),
        pytest.raises(ValueError, match="transformer, layer 1: v holds .* NaN or infinite values"),
    ):
        tiny.run(pipe, **arguments)
    with apply(pipe, SpaAttnProcessor(**policy)), caplog.at_level(logging.ERROR):
        assert not tiny.run(pipe, **arguments).isfinite().all()


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), True), ((10, 0), False), ((12, 0), True)]
)
def test_int8_is_no_default_where_triton_lacks_its_instruction(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pays(torch.device("cuda")) is expected
    assert pays(torch.device("cpu"))
