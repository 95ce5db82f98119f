import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gen_accel import SpaAttnProcessor, SparseProcessor, TokenGrid, apply
from gen_accel.engine import Engine
from gen_accel.kernels.blocks import Blocks
from gen_accel.layout import ForwardContext, TokenLayout, Unsupported
from gen_accel.order.curve import CurveOrder
from gen_accel.planner import pooled
from gen_accel.planner.pooled import PooledPlanner
from gen_accel.select.neighbours import block_neighbours
from gen_accel.select.presets import SPAATTN
from gen_accel.tail import NAMES, TailSetting
from helpers import tiny
from helpers.tiny import PIPES

GRID = TokenGrid(3, 6, 7)  # 126 tokens: the last of eight blocks of 16 holds 14
LAYOUTS = {
    "no text": TokenLayout(GRID),
    "one token": TokenLayout(GRID, 0, 1),
    "text behind": TokenLayout(GRID, 0, 11),
    "text in front": TokenLayout(GRID, 9, 0),
    "padded text": TokenLayout(GRID, 0, 12, (5, 12)),
    "no valid text": TokenLayout(GRID, 0, 12, (0, 12)),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def spaattn(**settings):
    return SpaAttnProcessor(**{"min_tokens": 0, "dense_steps": 0, "block": 16, **settings})


def engine(policy, layers=2):
    return Engine(
        name="test",
        layers=layers,
        schedule=policy.schedule(),
        planner=policy.planner("test", "test", layers),
        tail=policy.tail_setting(),
        impl=policy.impl,
    )


def attend(policy, layout, q, k, v, layer=0):
    runs = engine(policy)
    runs.enter(ForwardContext(layout))
    return runs.attend(q, k, v, layer=layer), runs


def qkv(layout, batch=2, heads=2, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, layout.tokens, heads, dim, generator=generator)


def dense(layout, q, k, v):
    valid = layout.text_valid or (layout.text_after,) * q.shape[0]
    outs = []
    for sample, text in enumerate(valid):
        keys = layout.tokens - layout.text_after + text
        parts = q[sample : sample + 1], k[sample : sample + 1, :keys], v[sample : sample + 1, :keys]
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in parts))
        outs.append(out.transpose(1, 2))
    return torch.cat(outs)


@pytest.mark.parametrize("build", PIPES, ids=lambda b: b.__name__)
@pytest.mark.parametrize("tail", ["rectified+gapr", "joint"])
def test_the_one_line(build, tail):
    pipe, call = build()
    stock = tiny.run(pipe, **call)
    handle = pipe.set_attn_processor(spaattn(density=0.3, tail=tail))
    out = tiny.run(pipe, **call)
    assert out.isfinite().all() and not torch.allclose(out, stock, atol=1e-4)
    stats = list(handle.stats().values())
    assert any(0 < s.mean_density < 1 for s in stats) and handle.plan is None
    handle.remove()
    assert torch.equal(tiny.run(pipe, **call), stock)


@pytest.mark.parametrize("build", [tiny.tiny_wan, tiny.tiny_hunyuan, tiny.tiny_flux])
def test_the_order_is_applied_once_per_forward(build, monkeypatch):
    pipe, call = build()
    with apply(pipe, spaattn(density=0.3)) as handle:
        hoist = handle.components[0].hoist
        once = tiny.run(pipe, **call)
        assert hoist.reason == "" and "per call" not in handle.summary()
    with apply(pipe, spaattn(density=0.3)) as handle:
        monkeypatch.setattr(type(hoist), "_check", _refuse)
        per_call = tiny.run(pipe, **call)
        assert "order applied per call: a test" in handle.summary()
    torch.testing.assert_close(once, per_call, rtol=0, atol=1e-4)


def _refuse(self, args, kwargs):
    raise Unsupported("a test")


@layouts
@pytest.mark.parametrize("tail", NAMES)
@pytest.mark.parametrize("order", ["curve", "raster"])
def test_choosing_all_is_dense(layout, tail, order):
    q, k, v = qkv(layout)
    policy = spaattn(density=1.0, tail=tail, order=order)
    out, runs = attend(policy, layout, q, k, v)
    torch.testing.assert_close(out, dense(layout, q, k, v), rtol=0, atol=1e-5)
    assert set(runs.stats.density.values()) == {1.0}


@layouts
@pytest.mark.parametrize("tail", [name for name in NAMES if name != "drop"])
def test_uniform_blocks_are_exact_at_any_density(layout, tail):
    order, block = CurveOrder(), 16
    q, k, v = qkv(layout)
    place = torch.from_numpy(order.permutation(GRID).copy())
    video = slice(layout.text_before, layout.text_before + GRID.numel)
    for x in (q, k):  # along the curve, every token of a block is its first
        ordered = x[:, video][:, place]
        ordered = ordered[:, torch.arange(GRID.numel) // block * block]
        x[:, video] = torch.empty_like(ordered).index_copy_(1, place, ordered)
    policy = spaattn(density=0.2, tail=tail, neighbours=False)
    out, runs = attend(policy, layout, q, k, v)
    assert max(runs.stats.density.values()) < 0.8
    expected = dense(layout, q, k, v)
    assert (out - expected).norm() / expected.norm() < 1e-5
    dropped, _ = attend(spaattn(density=0.2, tail="drop", neighbours=False), layout, q, k, v)
    assert (dropped - expected).norm() / expected.norm() > 0.05


@layouts
@pytest.mark.parametrize("tail", NAMES)
def test_values_of_one_give_one(layout, tail):
    q, k, v = qkv(layout)
    out, _ = attend(spaattn(density=0.2, tail=tail), layout, q, k, torch.ones_like(v))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-5)


@layouts
@pytest.mark.parametrize("tail", NAMES)
def test_a_constant_added_to_all_keys_changes_nothing(layout, tail):
    q, k, v = qkv(layout)
    one, _ = attend(spaattn(density=0.2, tail=tail), layout, q, k, v)
    two, _ = attend(spaattn(density=0.2, tail=tail), layout, q, k + torch.arange(8.0) / 4, v)
    torch.testing.assert_close(one, two, rtol=0, atol=2e-5)


def test_text_queries_and_neighbours_are_exact():
    layout = LAYOUTS["text behind"]
    q, k, v = qkv(layout)
    runs = engine(spaattn(density=0.1))
    runs.enter(ForwardContext(layout))
    planned = runs.planner.lookup(0, layout, 11, q.device, None)
    order = planned.order
    blocks, _ = planned.blocks(order.reorder(q, layout), order.reorder(k, layout))
    assert isinstance(blocks, Blocks) and planned.pooled == 112
    mask = blocks.mask()
    assert mask[:, :, 7:].all() and mask[..., 7:].all()
    near = block_neighbours(order.permutation(GRID), GRID, 16)[:7, :7]
    assert mask[:, :, :7, :7][..., near].all()
    out, _ = attend(spaattn(density=0.1), layout, q, k, v)
    expected = dense(layout, q, k, v)
    torch.testing.assert_close(out[:, -11:], expected[:, -11:], rtol=0, atol=1e-5)


def test_the_first_frame_is_where_it_stands_on_the_curve():
    layout = LAYOUTS["no text"]
    q, k, _ = qkv(layout)
    masks = []
    for first_frame in (False, True):
        planner = spaattn(density=0.1, first_frame=first_frame).planner("", "", 1)
        planned = planner.lookup(0, layout, 0, q.device, None)
        ordered = (planned.order.reorder(x, layout) for x in (q, k))
        masks.append(planned.blocks(*ordered)[0].mask())
    of_first = torch.zeros(8, dtype=torch.bool)
    place = CurveOrder().permutation(GRID)
    for at, token in enumerate(place):
        of_first[at // 16] |= bool(token < 42)
    assert masks[1][..., of_first[:, None] & of_first].all()
    assert not masks[0][..., of_first[:, None] & of_first].all()


def test_lists_are_kept_for_some_steps_and_branches_have_their_own():
    layout = LAYOUTS["no text"]
    runs = engine(spaattn(density=0.2, refresh=2, neighbours=False))
    made = []
    select = type(runs.planner)._select

    def counting(self, *args):
        made.append((self._context.step, self._context.branch))
        return select(self, *args)

    type(runs.planner)._select = counting
    try:
        for step in range(5):
            for branch in range(2):
                context = ForwardContext(layout, step=step, steps=5, branch=branch, run=1)
                runs.enter(context)
                runs.attend(*qkv(layout, seed=step), layer=0)
    finally:
        type(runs.planner)._select = select
    assert made == [(s, b) for s in (0, 2, 4) for b in (0, 1)]


def test_lists_are_kept_where_branches_have_text_of_different_lengths(monkeypatch):
    pipe, call = tiny.tiny_hunyuan()
    call = {**call, "num_inference_steps": 8, "true_cfg_scale": 2.0, "negative_prompt": "a b c"}
    made = []
    select = PooledPlanner._select
    monkeypatch.setattr(
        PooledPlanner, "_select", lambda self, *a: (made.append(a), select(self, *a))[1]
    )
    with apply(pipe, SpaAttnProcessor(refresh=4, min_tokens=0, dense_steps=0, block=16)) as handle:
        tiny.run(pipe, **call)
        layers = handle.components[0].engine.layers
    assert len(made) == 2 * 2 * layers, "twice in eight steps, for each branch and layer"


@pytest.mark.parametrize("build", [tiny.tiny_hunyuan, tiny.tiny_flux], ids=lambda b: b.__name__)
def test_lists_that_are_routed_are_those_of_the_mask(build, monkeypatch):
    """As on a GPU, where a kernel makes them of the scores."""
    pipe, call = build()
    outs, policy = [], SparseProcessor(min_tokens=0, block=16, neighbours=True)
    for on_gpu in (False, True):
        monkeypatch.setattr(pooled, "fused", lambda x, on_gpu=on_gpu: on_gpu)
        with apply(pipe, policy):
            outs.append(tiny.run(pipe, **call))
    assert torch.equal(*outs)


def test_densities_follow_the_run():
    layout = LAYOUTS["no text"]
    policy = spaattn(density=((0.0, 0.5), (0.5, 0.125)), neighbours=False, top_p=0.0)
    runs = engine(policy)
    for step in range(4):
        runs.enter(ForwardContext(layout, step=step, steps=4, run=1))
        runs.attend(*qkv(layout), layer=0)
    assert runs.stats.density == {(0, 0): 0.5, (1, 0): 0.5, (2, 0): 0.125, (3, 0): 0.125}


def test_short_sequences_stay_dense_and_say_why():
    layout = TokenLayout(TokenGrid(1, 4, 5), 0, 3)
    q, k, v = qkv(layout)
    out, runs = attend(spaattn(), layout, q, k, v)
    torch.testing.assert_close(out, dense(layout, q, k, v), rtol=0, atol=1e-5)
    assert list(runs.stats.dense) == ["grid 1x4x5 has no two blocks of 16"]


def test_presets():
    for model in SPAATTN:
        policy = SpaAttnProcessor.preset(model)
        assert policy.top_p == 0.3 and policy.block == 128
    policy = SpaAttnProcessor.preset("wan2.1-t2v-14b", density=0.5, tail="joint")
    assert (policy.density, policy.tail, policy.dense_layers) == (0.5, "joint", (0, 1))
    assert policy.dense_steps == 0.1 and policy.first_frame
    with pytest.raises(ValueError, match="presets for hunyuan-video"):
        SpaAttnProcessor.preset("wan")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(order="axis"), "order='axis': choose 'curve' or 'raster'"),
        (dict(block=17), "block=17"),
        (dict(tail="joined"), "did you mean 'joint'"),
        (dict(tail="joint/x"), "tail='joint/x'"),
        (dict(density=1.5), "density=1.5"),
        (dict(parts=0), "parts=0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        spaattn(**settings)


# ---- any mixture ---------------------------------------------------------------------------------

MIXTURES = [
    ("axis", "static"),
    ("curve", "static"),
    ("raster", "static"),
    ("curve", "pooled"),
    ("raster", "pooled"),
    ("tile", "window"),
    ("raster", "all"),
]


def sparse(**settings):
    return SparseProcessor(**{"min_tokens": 0, "dense_steps": 0.4, "block": 16, **settings})


@pytest.mark.parametrize(("order", "select"), MIXTURES)
@pytest.mark.parametrize("tail", ["drop", "rectified", "joint/4+variance"])
@pytest.mark.parametrize("build", [tiny.tiny_wan, tiny.tiny_hunyuan, tiny.tiny_flux])
def test_every_mixture_runs(order, select, tail, build):
    pipe, call = build()
    call["num_inference_steps"] = 3
    stock = tiny.run(pipe, **call)
    policy = sparse(order=order, select=select, tail=tail, density=0.3)
    with apply(pipe, policy) as handle:
        out = tiny.run(pipe, **call)
        stats = next(iter(handle.stats().values()))
    assert stats.sparse and out.isfinite().all()
    if select == "all":
        torch.testing.assert_close(out, stock, atol=2e-5, rtol=1e-4)
    else:
        assert not torch.allclose(out, stock, atol=1e-4)


def test_a_static_curve_plan_travels_through_its_file(tmp_path):
    pipe, call = tiny.tiny_wan()
    call["num_inference_steps"] = 3
    with apply(pipe, sparse(order="curve", select="static")) as handle:
        tiny.run(pipe, **call)
        plan = handle.plan
        again = tiny.run(pipe, **call)
    assert plan.order == "curve" and plan.components["transformer"].layers[0].order_names
    path = plan.save(tmp_path / "curve.safetensors")
    with apply(pipe, sparse(plan=path, select="static")):
        assert torch.equal(tiny.run(pipe, **call), again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(select="static", order="tile"), "its orders are 'axis', 'curve', 'raster'"),
        (dict(select="pooled", order="axis"), "its orders are 'curve', 'raster'"),
        (dict(select="learned"), "select='learned'"),
        (dict(select="pooled", order="curve", plan="x"), "only static masks have a plan"),
        (dict(density=0), "density=0"),
    ],
)
def test_bad_mixtures(settings, message):
    with pytest.raises(ValueError, match=message):
        sparse(**settings)


@pytest.mark.parametrize("tail", NAMES)
@pytest.mark.parametrize("settings", [dict(), dict(parts=4, top_p=0.0, budget="layer")], ids=str)
def test_nothing_asks_the_device(tail, settings, monkeypatch):
    """Fake tensors have no values: whatever wanted one (and would wait for a GPU) raises."""
    layout = LAYOUTS["text behind"]
    policy = spaattn(density=0.3, tail=tail, **settings)
    attend(policy, layout, *qkv(layout))  # what depends on the grid alone is cached
    planned = policy.planner("", "", 1).lookup(0, layout, 11, torch.device("cpu"), None)
    make = Blocks.from_mask
    monkeypatch.setattr(
        Blocks, "from_mask", lambda full, width, **sizes: make(full, width=full.shape[-1], **sizes)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(2, layout.tokens, 2, 8) for _ in range(3))
        blocks, scores = planned.blocks(q, k)
        made = policy.tail_setting().make(q, k, v, blocks, pooled=planned.pooled, scores=scores)
        assert isinstance(blocks.kept(), torch.Tensor) and (made is None) == (tail == "drop")
        with pytest.raises(DataDependentOutputException):
            blocks.density()


def test_a_selection_has_an_order_of_its_own():
    orders = {s: SparseProcessor(select=s).order for s in ("static", "pooled", "window", "all")}
    assert orders == {"static": "axis", "pooled": "curve", "window": "tile", "all": "raster"}
    assert SparseProcessor().order == "curve" and SparseProcessor().select == "pooled"
    assert SparseProcessor().tail_setting() == TailSetting("joint", parts=4)


def test_set_on_the_transformer_directly():
    pipe, call = tiny.tiny_wan()
    with apply(pipe, spaattn(density=0.3)):
        expected = tiny.run(pipe, **call)
    # Modules see no steps, so lists are never kept.
    pipe.transformer.set_attn_processor(spaattn(density=0.3, grid=(5, 4, 6), refresh=4))
    torch.testing.assert_close(tiny.run(pipe, **call), expected, rtol=0, atol=1e-4)


def test_compiled_blocks_follow_the_selection():
    pipe, call = tiny.tiny_wan()
    with apply(pipe, spaattn(density=0.3, tail="joint/4")) as handle:
        expected = tiny.run(pipe, **call)
        torch._dynamo.reset()
        for i, block in enumerate(pipe.transformer.blocks):
            pipe.transformer.blocks[i] = torch.compile(block, fullgraph=True, backend="eager")
        out = tiny.run(pipe, **call)
        assert handle.stats()["transformer"].sparse and not handle.components[0].hoist.reason
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("select", ["static", "pooled"])
def test_mixtures_keep_what_they_are_asked_to(select):
    pipe, call = tiny.tiny_wan()
    call["num_inference_steps"] = 3
    policy = sparse(select=select, density=0.3)
    with apply(pipe, policy) as handle:
        tiny.run(pipe, **call)
        blocks = 120 // 16
        # The ragged last block and its row are kept whole where masks are static.
        whole = round(0.3 * blocks**2) + (2 * blocks + 1) if select == "static" else None
        ran = handle.stats()["transformer"].mean_density
    expected = whole / (blocks + 1) ** 2 if whole else round(0.3 * 8) / 8
    assert ran == pytest.approx(expected, abs=0.01)


def test_kept_lists_are_those_of_the_sample():
    layout = TokenLayout(GRID, 0, 12, (5, 12, 5))
    q, k, v = qkv(layout, batch=3)
    outs = []
    for refresh in (1, 2):
        runs = engine(spaattn(density=0.2, neighbours=False, refresh=refresh))
        runs.enter(ForwardContext(layout, step=0, steps=4, run=1))
        outs.append(runs.attend(q, k, v, layer=0))
    assert torch.equal(*outs)
