"""A hoisted order changes no output, and is really there: attention sees the tokens in it."""

from functools import partial
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig

from gen_accel.families import family_of
from gen_accel.hoist import hoist_order
from gen_accel.order.curve import CurveOrder
from gen_accel.order.hoisted import Hoisted
from gen_accel.order.tile import TileOrder
from helpers import dits, tiny
from helpers.dense import Dense, difference, installed

TOLERANCE = 1e-5
LATENTS = {"cosmos": 1e-4, "cosmos2-image": 1e-4}  # fp32 that begins at sigma 80, guided by 5
CURVE = CurveOrder()

PIPELINES = {
    "wan": tiny.tiny_wan,
    "wan-5b": partial(tiny.tiny_wan, expand_timesteps=True),  # a timestep for every token
    "wan-a14b": tiny.tiny_wan22,
    "wan-i2v": tiny.tiny_wan_i2v,
    "hunyuan": tiny.tiny_hunyuan,
    "flux": tiny.tiny_flux,
    "cosmos": tiny.tiny_cosmos,  # learned position embeddings added in every block
    "cosmos2-image": partial(tiny.tiny_cosmos2, video=False),
}
FAMILIES = ["wan", "hunyuan", "flux", "cosmos"]
MODELS = {
    "wan": dits.wan,
    "vace": dits.vace,
    "chronoedit": dits.chronoedit,
    "hunyuan": dits.hunyuan,
    "latent_concat": dits.hunyuan_latent_concat,
    "flux": dits.flux,
    "cosmos": dits.cosmos,
    "cosmos25": dits.cosmos25,
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


class Ordered(Dense):
    """Dense attention that keeps what it saw: q of the first call, and how its tokens stood."""

    def __init__(self, hoist=None):
        super().__init__()
        self.hoist = hoist
        self.active = []
        self.q = None

    def __call__(self, q, k, v, **kwargs):
        self.active.append(self.hoist is not None and self.hoist.active)
        if self.q is None:
            self.q = q.clone()
        return super().__call__(q, k, v, **kwargs)


class BlockSparse(Dense):
    """Attention to random blocks of the ordered sequence."""

    def __init__(self, remaining):
        super().__init__()
        self.remaining = remaining

    def __call__(self, q, k, v, **kwargs):
        order = self.remaining()
        q, k, v = (order.reorder(x, self.layout).transpose(1, 2) for x in (q, k, v))
        block = torch.arange(q.shape[2]) // 16
        blocks = int(block[-1]) + 1
        keep = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.4
        keep |= torch.eye(blocks, dtype=torch.bool)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[block][:, block])
        return order.restore(out.transpose(1, 2), self.layout)


def transformers(pipe):
    return [p for name, p in pipe.components.items() if name.startswith("transformer") and p]


def run(model, inputs):
    return model(**inputs, return_dict=False)[0]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- the output is the same ----------------------------------------------------------------------


@pytest.mark.parametrize("order", [CURVE, TileOrder((5, 2, 3))], ids=["curve", "tile"])
@pytest.mark.parametrize("case", PIPELINES)
def test_pipeline_equals_stock(case, order):
    pipe, call = PIPELINES[case]()
    stock = tiny.run(pipe, **call)
    hoists = [hoist_order(model, order) for model in transformers(pipe)]
    assert difference(tiny.run(pipe, **call), stock) <= LATENTS.get(case, TOLERANCE)
    assert [hoist.reason for hoist in hoists] == [""] * len(hoists)
    for hoist in hoists:
        hoist.remove()
    assert torch.equal(tiny.run(pipe, **call), stock)


@pytest.mark.parametrize("case", FAMILIES)
def test_batch_of_two_prompts(case):
    pipe, call = PIPELINES[case]()
    call["prompt"] = ["a cat runs", "an elephant goes home"]
    if "negative_prompt" in call:
        call["negative_prompt"] = ["bad", "bad and ugly"]
    stock = tiny.run(pipe, **call)
    hoist = hoist_order(pipe.transformer, CURVE)
    with installed(pipe.transformer, Ordered(hoist)) as attend:
        assert difference(tiny.run(pipe, **call), stock) <= LATENTS.get(case, TOLERANCE)
    assert all(attend.active) and attend.active


@pytest.mark.parametrize("name", MODELS)
def test_attention_sees_the_tokens_in_order(name):
    model, inputs, layers = MODELS[name]()
    with installed(model, Ordered()) as plain:
        stock = run(model, inputs)
    hoist = hoist_order(model, CURVE)
    with installed(model, Ordered(hoist)) as attend:
        assert difference(run(model, inputs), stock) <= TOLERANCE
    assert attend.active == [True] * layers
    layout = attend.layout
    before, video, after = plain.q.split(
        [layout.text_before, layout.grid.numel, layout.text_after], 1
    )
    index = torch.tensor(CURVE.permutation(layout.grid))
    torch.testing.assert_close(attend.q, torch.cat([before, video[:, index], after], 1))


@pytest.mark.parametrize("name", MODELS)
def test_block_sparse_attention_is_that_of_ordering_every_call(name):
    """Where the blocks decide what is attended to, a wrong order anywhere changes the output."""
    model, inputs, _ = MODELS[name]()
    dense = run(model, inputs)
    with installed(model, BlockSparse(lambda: CURVE)):
        per_call = run(model, inputs)
    hoist = hoist_order(model, CURVE)
    with installed(model, BlockSparse(lambda: hoist.remaining)):
        hoisted = run(model, inputs)
    assert difference(hoisted, per_call) <= TOLERANCE
    assert difference(hoisted, dense) > 100 * TOLERANCE
    with installed(model, BlockSparse(lambda: Hoisted(CURVE))):
        hoist.remove()
        assert difference(run(model, inputs), per_call) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (dits.flux, ["controlnet_block_samples", "controlnet_single_block_samples"]),
        (dits.cosmos, ["block_controlnet_hidden_states"]),
    ],
)
def test_controlnet_residuals_are_ordered_too(model, names):
    model, inputs, _ = model()
    if names[0].startswith("block"):
        model.register_to_config(controlnet_block_every_n=1)
    tokens = 24 if "img_ids" in inputs else 72
    for name in names:
        inputs[name] = [dits.rand(1, tokens, 32) + i for i in range(2)]
    stock, hoist = run(model, inputs), hoist_order(model, CURVE)
    assert difference(run(model, inputs), stock) <= TOLERANCE and hoist.reason == ""
    short = {**inputs, names[0]: [x[:, :4] for x in inputs[names[0]]]}
    with pytest.raises(RuntimeError):  # the model's own error: these never fitted
        run(model, short)
    assert hoist.reason.startswith(f"{names[0]} (1, 4, 32) does not have the ") and not hoist.active


def test_positional_arguments():
    model, inputs, _ = dits.wan()
    inputs["timestep"] = torch.arange(120.0).view(1, -1)
    stock, hoist = run(model, inputs), hoist_order(model, CURVE)
    again = model(*inputs.values(), return_dict=False)[0]
    assert difference(again, stock) <= TOLERANCE and hoist.reason == ""
    assert inputs["timestep"].equal(torch.arange(120.0).view(1, -1))


@pytest.mark.parametrize("case", FAMILIES)
def test_lora_loaded_afterwards(case):
    """PEFT puts another module in place of the embedding and of the output projection."""
    pipe, call = PIPELINES[case]()
    model, path = pipe.transformer, family_of(pipe.transformer).path
    plain = tiny.run(pipe, **call)
    hoist = hoist_order(model, CURVE)
    tiny.run(pipe, **call)
    torch.manual_seed(0)
    linear = [n for n, m in model.named_children() if type(m).__name__ == "Linear"]
    assert set(linear) & set(path.exits)
    model.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", *linear], init_lora_weights=False),
        adapter_name="random",
    )
    ours = tiny.run(pipe, **call)
    assert hoist.reason == ""
    hoist.remove()
    stock = tiny.run(pipe, **call)
    assert difference(ours, stock) <= LATENTS.get(case, TOLERANCE)
    assert difference(stock, plain) > 100 * TOLERANCE


@pytest.mark.parametrize("case", ["wan", "hunyuan", "flux"])
def test_first_block_cache(case):
    def cached():
        pipe, call = PIPELINES[case]()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        return pipe, {**call, "num_inference_steps": 5}

    pipe, call = cached()
    stock = tiny.run(pipe, **call)
    pipe, call = cached()
    hoist = hoist_order(pipe.transformer, CURVE)
    with installed(pipe.transformer, Ordered(hoist)) as attend:
        assert difference(tiny.run(pipe, **call), stock) <= TOLERANCE
    assert all(attend.active)
    layers = 1 + max(int(layer) for layer, _ in attend.calls)
    forwards = sum(layer == 0 for layer, _ in attend.calls)
    assert len(attend.calls) < layers * forwards  # it did skip blocks


def test_grids_may_change_from_forward_to_forward():
    pipe, call = tiny.tiny_wan()
    small = {**call, "num_frames": 9}
    stock = [tiny.run(pipe, **c) for c in (call, small, call)]
    hoist_order(pipe.transformer, CURVE)
    for c, expected in zip((call, small, call), stock):
        assert difference(tiny.run(pipe, **c), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_gradients(name):
    model, inputs, _ = MODELS[name]()
    with torch.inference_mode():
        hoist_order(model, CURVE).remove()
    found = []
    for hoist in (None, hoist_order(model, CURVE)):
        with torch.enable_grad():
            x = inputs["hidden_states"].clone().requires_grad_()
            out = run(model, {**inputs, "hidden_states": x})
            (out * dits.rand(*out.shape)).sum().backward()
        found.append(x.grad)
        if hoist is None:
            model.zero_grad()
    assert difference(*found) <= 1e-4


# ---- where it is left alone ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (dits.animate, "frame by frame"),
        (dits.hunyuan_token_replace, "the first frame has a timestep of its own"),
    ],
)
def test_models_that_know_where_tokens_stand(build, reason):
    model, inputs, _ = build()
    stock, hoist = run(model, inputs), hoist_order(model, CURVE)
    with installed(model, Ordered(hoist)) as attend:
        assert difference(run(model, inputs), stock) <= TOLERANCE
    assert reason in hoist.reason and not any(attend.active) and hoist.remaining is CURVE


def test_timestep_per_frame():
    pipe, call = tiny.tiny_cosmos2()
    stock, hoist = tiny.run(pipe, **call), hoist_order(pipe.transformer, CURVE)
    assert torch.equal(tiny.run(pipe, **call), stock)
    assert "every frame has a timestep of its own" in hoist.reason


def test_unknown_layout_padding_and_shards():
    model, inputs, _ = dits.flux()
    hoist = hoist_order(model, CURVE)
    run(model, {**inputs, "img_ids": inputs["img_ids"] + 1})
    assert "img_ids are not one image grid" in hoist.reason
    padded = hoist_order(model, TileOrder((1, 4, 4)))
    stock = run(model, inputs)
    assert hoist.reason == "" and padded.reason == "the order has padding places"
    model._parallel_config = SimpleNamespace(context_parallel_config=object())
    assert difference(run(model, inputs), stock) <= TOLERANCE
    assert hoist.reason == "tokens are sharded across processes"


def test_model_whose_modules_have_other_names():
    model, inputs, _ = dits.wan()
    stock, hoist = run(model, inputs), hoist_order(model, CURVE)
    rope, model.rope = model.rope, None
    model.forward = MethodType(_renamed, model)
    model.position = rope
    assert difference(run(model, inputs), stock) <= TOLERANCE
    assert hoist.reason == "WanTransformer3DModel has no module rope"


def _renamed(self, *args, **kwargs):
    """The model's forward in a version of diffusers that calls ``rope`` something else."""
    self.rope = self.position
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        self.rope = None


def test_no_order_outside_of_a_forward_or_after_a_failed_one():
    model, inputs, _ = dits.wan()
    stock, hoist = run(model, inputs), hoist_order(model, CURVE)
    embedded = model.patch_embedding(inputs["hidden_states"])
    assert hoist.reason == "no forward yet" and hoist.remaining is CURVE
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(model, {**inputs, "encoder_hidden_states": torch.zeros(1, 3, 5)})
    assert not hoist.active
    assert torch.equal(model.patch_embedding(inputs["hidden_states"]), embedded)
    assert difference(run(model, inputs), stock) <= TOLERANCE


def test_forward_that_passes_a_module_by(monkeypatch):
    model, inputs, _ = dits.wan()
    hoist = hoist_order(model, CURVE)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "__call__", torch.nn.Linear.forward)
        with pytest.raises(RuntimeError, match="forward did not call proj_out: its output is in"):
            run(model, inputs)
    assert not hoist.active
    run(model, inputs)


# ---- compilation, installing, removing -----------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_compiled_blocks(name):
    model, inputs, _ = MODELS[name]()
    stock = run(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    hoist = hoist_order(model, CURVE)
    assert difference(run(model, inputs), stock) <= TOLERANCE and hoist.reason == ""
    hoist.remove()
    assert difference(run(model, inputs), stock) <= TOLERANCE


@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_transformer(when):
    """Graphs break at the hooks, or the hoist declines because it is traced."""
    model, inputs, _ = dits.wan()
    stock = run(model, inputs)
    compiled = torch.compile(model, backend="eager")
    if when == "after":
        run(compiled, inputs)
    hoist = hoist_order(compiled, CURVE)
    assert difference(run(compiled, inputs), stock) <= TOLERANCE
    assert hoist.reason in ("", "the whole transformer is compiled; compile its blocks instead")
    assert not hoist.active


def test_remove_takes_every_hook_difference():
    model, inputs, _ = dits.vace()
    before = hooks(model)
    hoist = hoist_order(model, CURVE)
    run(model, inputs)
    assert hooks(model) == before + 2 + 4
    hoist.remove()
    hoist.remove()
    assert hooks(model) == before and not hoist.active


def test_unknown_model():
    with pytest.raises(ValueError, match="Linear: no family serves this transformer"):
        hoist_order(torch.nn.Linear(2, 2), CURVE)
