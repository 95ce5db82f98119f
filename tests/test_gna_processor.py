import pytest
import torch

from gen_accel import GnaProcessor, TokenGrid, apply
from gen_accel.engine import Engine
from gen_accel.kernels.api import available
from gen_accel.layout import ForwardContext, TokenLayout
from gen_accel.select.window import Window
from helpers import tiny
from helpers.tiny import PIPES


def gna(**settings):
    return GnaProcessor(**{"min_tokens": 0, "dense_steps": 0, **settings})


@pytest.mark.parametrize("build", PIPES, ids=lambda b: b.__name__)
def test_the_one_line(build):
    pipe, call = build()
    dense = tiny.run(pipe, **call)
    with apply(pipe, gna(window=-1)) as handle:
        whole = tiny.run(pipe, **call)
        assert all(not stats.dense for stats in handle.stats().values())
    torch.testing.assert_close(whole, dense, atol=2e-5, rtol=1e-4)
    handle = pipe.set_attn_processor(gna(window=3))
    out = tiny.run(pipe, **call)
    assert out.isfinite().all() and not torch.allclose(out, dense, atol=1e-3)
    assert handle.plan is None
    handle.remove()
    assert torch.equal(tiny.run(pipe, **call), dense)


def attend(policy, layout, q, k, v, layer=0):
    engine = Engine(
        name="test",
        layers=2,
        schedule=policy.schedule(),
        planner=policy.planner("test", "test", 2),
        impl=policy.impl,
    )
    engine.enter(ForwardContext(layout))
    return engine.attend(q, k, v, layer=layer)


def brute_force(windows, layout, q, k, v):
    """Masked dense softmax in fp64, the mask made key by key from the rule of each axis."""
    grid, before = layout.grid, layout.text_before
    heads = q.shape[2]
    mask = torch.ones(heads, layout.tokens, layout.tokens, dtype=torch.bool)
    place = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    for head in range(heads):
        seen = torch.ones(grid.numel, grid.numel, dtype=torch.bool)
        for axis, rule in enumerate(windows[head % len(windows)].axes):
            table = torch.zeros(grid[axis], grid[axis], dtype=torch.bool)
            for query in range(grid[axis]):
                table[query, torch.tensor(rule.keys(query))] = True
            seen &= table[place[:, axis]][:, place[:, axis]]
        video = slice(before, before + grid.numel)
        mask[head, video, video] = seen
    if layout.text_valid is not None:
        mask[:, :, grid.numel + layout.text_valid[0] :] = False
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * q.shape[-1] ** -0.5
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", p, v.double())


@pytest.mark.parametrize("impl", ["reference", "gather"])
@pytest.mark.parametrize(
    "grid, settings",
    [
        ((4, 6, 8), dict(window=(3, 3, 5))),
        ((4, 6, 8), dict(window=(4, 4, 4), stride=(2, 2, 4))),
        ((5, 7, 9), dict(window=(3, 5, 4), stride=(1, 2, 3))),  # ragged, even window
        ((5, 7, 9), dict(window=(2, 3, 3), dilation=(2, 2, 3))),
        ((5, 7, 9), dict(window=(3, 3, 3), causal=(True, False, False))),
        ((1, 9, 10), dict(window=(-1, 5, 4))),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "text", [(0, 0, None), (11, 0, None), (0, 13, None), (0, 13, (6,))], ids=str
)
def test_output_is_the_masked_softmax(impl, grid, settings, text):
    torch.manual_seed(0)
    layout = TokenLayout(TokenGrid(*grid), *text)
    q, k, v = torch.randn(3, 1, layout.tokens, 3, 16).unbind()
    out = attend(gna(impl=impl, **settings), layout, q, k, v)
    expected = brute_force([Window(grid, **_named(settings))], layout, q, k, v)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def _named(settings):
    names = {"window": "size"}
    return {names.get(k, k): v for k, v in settings.items()}


@pytest.mark.skipif(available()["flex"] is not None, reason="no compiler for FlexAttention")
def test_compiled_flex_attention_agrees():
    torch.manual_seed(0)
    layout = TokenLayout(TokenGrid(5, 8, 9), 0, 13, (6,))
    q, k, v = torch.randn(3, 1, layout.tokens, 2, 16).unbind()
    settings = dict(window=(3, 5, 4), stride=(1, 2, 3))
    out = attend(gna(impl="flex", **settings), layout, q, k, v)
    expected = brute_force([Window((5, 8, 9), **_named(settings))], layout, q, k, v)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_each_head_and_each_layer_may_have_its_own_window():
    torch.manual_seed(0)
    layout = TokenLayout(TokenGrid(4, 6, 8), 0, 5)
    q, k, v = torch.randn(3, 1, layout.tokens, 2, 16).unbind()
    near, far = Window((4, 6, 8), (2, 3, 3)), Window((4, 6, 8), (4, 5, 5))
    out = attend(gna(window=(near, far)), layout, q, k, v)
    expected = brute_force([near, far], layout, q, k, v)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    by_layer = gna(window={0: near, 1: far})
    for layer, window in enumerate((near, far)):
        out = attend(by_layer, layout, q, k, v, layer)
        expected = brute_force([window], layout, q, k, v)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(8, 16, 16), (1, 32, 32)])
@pytest.mark.parametrize("density", [0.5, 0.25])
def test_auto_takes_a_block_sparse_window_of_the_density(grid, density):
    policy = gna(density=density, block=32)
    layout = TokenLayout(TokenGrid(*grid))
    planner = policy.planner("test", "test", 1)
    planner.begin(ForwardContext(layout))
    planned = planner.lookup(0, layout, 0, torch.device("cpu"), None)
    assert planned.blocks.kv_num_blocks is None, "perfectly block-sparse: no partial blocks"
    assert planned.blocks.density() == pytest.approx(density, rel=0.35)
    assert planner.lookup(1, layout, 0, torch.device("cpu"), None) is planned


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": (99, 3, 3)}, "99"),
        ({"window": 3, "tile": (4, 8, 8), "block": 16}, "block=16: a tile of"),
        ({"window": {1: (3, 3, 99)}}, "99"),
        ({"window": 3, "tile": (4, 8)}, "tile="),
    ],
)
def test_what_does_not_fit_the_grid_is_refused_before_the_dense_steps(settings, message):
    pipe, call = tiny.tiny_wan()
    with apply(pipe, gna(dense_steps=0.8, **settings)) as handle:
        with pytest.raises(ValueError, match=message):
            tiny.run(pipe, **call)
        assert not handle.stats()["transformer"].dense
    with apply(pipe, gna(dense_steps=0.8, min_tokens=10**6, **settings)):
        tiny.run(pipe, **call)  # stays dense, so nothing has to fit


def test_another_grid_is_planned_anew():
    pipe, call = tiny.tiny_wan()
    with apply(pipe, gna(window=3)):
        tiny.run(pipe, **call)
        assert tiny.run(pipe, **{**call, "num_frames": 9}).isfinite().all()


def test_set_on_the_transformer_directly():
    pipe, call = tiny.tiny_hunyuan()
    with apply(pipe, gna(window=3)):
        expected = tiny.run(pipe, **call)
    pipe.transformer.set_attn_processor(gna(window=3, grid=(5, 4, 6)))
    torch.testing.assert_close(tiny.run(pipe, **call), expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(window="big"), "window='big'"),
        (dict(density=2), "density=2"),
        (dict(impl="gathr"), "did you mean|gather"),
        (dict(precision="int9"), "precision"),
        (dict(grid=(4, 4)), "grid="),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        gna(**settings)


@pytest.mark.parametrize(
    "settings", [dict(window=(9, 3, 3)), dict(window=3, stride=4), dict(window=3, dilation=3)]
)
def test_illegal_windows_name_the_nearest_legal_one(settings):
    pipe, call = tiny.tiny_wan()
    with apply(pipe, gna(**settings)), pytest.raises(ValueError, match="nearest legal"):
        tiny.run(pipe, **call)
