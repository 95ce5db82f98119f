"""Each family with a dense ``attend`` is its stock processor, under everything users combine."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig

from gen_accel.families import base
from gen_accel.families.base import FamilyProcessor
from gen_accel.kernels.prepare import prepare
from helpers import tiny
from helpers.dense import Dense, Masked, Zero, difference, installed

TOLERANCE = 1e-5

# name -> (builder, accelerated layers, denoising calls of a two-step run, token layout)
CASES = {
    "wan": (tiny.tiny_wan, 2, 4, (0, 120, 0)),
    "wan-5b": (partial(tiny.tiny_wan, expand_timesteps=True), 2, 4, (0, 120, 0)),
    "wan-a14b": (tiny.tiny_wan22, 2, 2, (0, 120, 0)),
    "wan-i2v": (tiny.tiny_wan_i2v, 2, 4, (0, 120, 0)),
    "hunyuan": (tiny.tiny_hunyuan, 4, 2, (0, 120, 32)),
    "flux": (tiny.tiny_flux, 4, 2, (48, 96, 0)),
    "cosmos": (tiny.tiny_cosmos, 2, 4, (0, 72, 0)),
    "cosmos2-video": (tiny.tiny_cosmos2, 2, 4, (0, 120, 0)),
    "cosmos2-image": (partial(tiny.tiny_cosmos2, video=False), 2, 4, (0, 24, 0)),
}
FAMILIES = ["wan", "hunyuan", "flux", "cosmos"]


def build(case):
    return CASES[case][0]()


def accelerated(pipe, call, attend=None, **kwargs):
    """Run with the families' processors on every transformer; also returns the attends."""
    with ExitStack() as stack:
        attends = [
            stack.enter_context(installed(part, attend or Dense()))
            for name, part in pipe.components.items()
            if name.startswith("transformer") and part is not None
        ]
        return tiny.run(pipe, **call, **kwargs), attends


def assert_parity(pipe, call):
    stock = tiny.run(pipe, **call)
    ours, attends = accelerated(pipe, call)
    assert all(attend.calls for attend in attends)
    assert difference(ours, stock) <= TOLERANCE
    return attends


@pytest.mark.parametrize("case", CASES)
def test_pipeline_equals_stock(case):
    _, layers, forwards, (before, video, after) = CASES[case]
    for attend in assert_parity(*build(case)):
        assert [layer for layer, _ in attend.calls] == list(range(layers)) * forwards
        layout = attend.layout
        assert (layout.text_before, layout.grid.numel, layout.text_after) == (before, video, after)


@pytest.mark.parametrize("case", CASES)
def test_attend_decides_the_output(case):
    """Parity would be worthless if the stock path still ran, or if attention did not matter."""
    pipe, call = build(case)
    assert difference(accelerated(pipe, call, Zero())[0], tiny.run(pipe, **call)) > 100 * TOLERANCE


@pytest.mark.parametrize("case", FAMILIES)
def test_norm_and_rope_in_one(case, monkeypatch):
    """What a GPU takes, here in torch operations."""
    norms = []

    def one(x, places, rope, norm):
        norms.append(norm.weight.numel() // x.shape[-1])
        return prepare(x, places, rope, norm)

    monkeypatch.setattr(base, "fused", lambda *tensors: True)
    monkeypatch.setattr(base, "prepare", one)
    pipe, call = build(case)
    assert_parity(pipe, call)
    _, layers, forwards, _ = CASES[case]
    dual = 2 if case == "flux" else 0  # blocks in which the text has norms of its own
    assert len(norms) == forwards * 2 * (layers + dual)
    assert all((heads > 1) == (case == "wan") for heads in norms)


@pytest.mark.parametrize("case", FAMILIES)
def test_batch_of_two_prompts(case):
    pipe, call = build(case)
    call["prompt"] = ["a cat runs", "an elephant goes home"]
    if "negative_prompt" in call:
        call["negative_prompt"] = ["bad", "bad and ugly"]
    (attend,) = assert_parity(pipe, call)
    if case == "hunyuan":
        short, long = attend.layout.text_valid
        assert 0 < short < long <= 32


@pytest.mark.parametrize("case", ["hunyuan", "flux"])
def test_true_cfg(case):
    """Two forwards per step with different text lengths (Wan and Cosmos always run this way)."""
    pipe, call = build(case)
    assert_parity(pipe, {**call, "true_cfg_scale": 2.0, "negative_prompt": "bad and ugly"})


@pytest.mark.parametrize("case", FAMILIES)
def test_lora(case):
    pipe, call = build(case)
    plain = tiny.run(pipe, **call)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "to_add_out"]
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, target_modules=targets, init_lora_weights=False), adapter_name="random"
    )
    assert difference(tiny.run(pipe, **call), plain) > 100 * TOLERANCE
    assert_parity(pipe, call)


@pytest.mark.parametrize("case", ["wan", "wan-i2v", "flux"])
def test_fused_projections(case):
    pipe, call = build(case)
    pipe.transformer.fuse_qkv_projections()
    for module in pipe.transformer.modules():
        if getattr(module, "fused_projections", False):
            # The unfused weights must not be read any more.
            for name in ("to_k", "to_v", "add_k_proj", "add_v_proj"):
                if getattr(module, name, None) is not None:
                    getattr(module, name).weight.fill_(float("nan"))
    assert_parity(pipe, call)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("case", FAMILIES)
def test_group_offload(case, offload_type):
    pipe, call = build(case)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1
    )
    assert_parity(pipe, call)


@pytest.mark.parametrize("case", ["wan", "hunyuan", "flux"])
def test_first_block_cache(case):
    pipe, call = build(case)
    call["num_inference_steps"] = 4
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1.0))
    (attend,) = assert_parity(pipe, call)
    layers = [layer for layer, _ in attend.calls]
    assert layers.count(0) > layers.count(1), "nothing was skipped: the cache was not active"


@pytest.mark.parametrize("case", FAMILIES)
def test_compiled_blocks(case):
    """No graph breaks, and one compilation serves all steps and both CFG branches."""
    depth = {"layers": 1, **({"single_layers": 1} if case in ("hunyuan", "flux") else {})}
    pipe, call = CASES[case][0](**depth)
    stock = tiny.run(pipe, **call)
    torch._dynamo.reset()
    once = torch._dynamo.config.patch(error_on_recompile=True)
    with once, installed(pipe.transformer, Dense()) as attend:
        for name, blocks in pipe.transformer.named_children():
            if name.endswith("blocks"):
                for block in blocks:
                    block.compile(fullgraph=True, backend="eager")
        assert difference(tiny.run(pipe, **call), stock) <= TOLERANCE
    assert attend.traced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FAMILIES)
def test_same_operations_give_the_same_bits(case, dtype):
    """With the model's own mask as well: a kernel without one may round differently."""
    pipe, call = build(case)
    pipe.to(dtype)
    assert torch.equal(accelerated(pipe, call, Masked())[0], tiny.run(pipe, **call))


@pytest.mark.parametrize("case", [*FAMILIES, "wan-a14b"])
def test_save_and_load_with_processors_installed(case, tmp_path):
    pipe, call = build(case)
    stock = tiny.run(pipe, **call)
    weights = set(pipe.transformer.state_dict())
    with installed(pipe.transformer, Dense()):
        assert set(pipe.transformer.state_dict()) == weights
        pipe.save_pretrained(tmp_path)
    extra = {"safety_checker": tiny.NoSafetyChecker()} if case == "cosmos" else {}
    loaded = type(pipe).from_pretrained(tmp_path, **extra)
    assert difference(tiny.run(loaded, **call), stock) <= TOLERANCE
    assert_parity(loaded, call)


def test_backend_chosen_before_and_after_installing():
    """The choice lives on the stock processor: it survives installing and removing."""
    pipe, call = tiny.tiny_wan()
    attn = pipe.transformer.blocks[0].attn1
    attn.set_attention_backend("_native_math")
    with installed(pipe.transformer, Dense()):
        assert isinstance(attn.processor, FamilyProcessor)
        assert attn.processor._attention_backend == "_native_math"
        attn.set_attention_backend("native")
        tiny.run(pipe, **call)
    assert attn.processor._attention_backend == "native"
