"""The NATTEN backend against a stand-in: the library needs a GPU and its own wheel."""

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from gen_accel import GnaProcessor, ParoProcessor, TokenGrid, apply, natten
from gen_accel.engine import Engine
from gen_accel.layout import ForwardContext, TokenLayout
from gen_accel.select.window import Window
from helpers import tiny
from helpers.windows import axis_mask

GRID = (4, 6, 8)


def masked_attention(q, k, v, *, kernel_size, stride, dilation, is_causal, scale):
    """What NATTEN's documentation says of ``[batch, *grid, heads, dim]``."""
    grid = q.shape[1:-2]
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis in zip(grid, kernel_size, stride, dilation, is_causal, strict=True):
        mask = torch.kron(mask, torch.from_numpy(axis_mask(*axis)))
    q, k, v = (x.flatten(1, len(grid)) for x in (q, k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (scale or q.shape[-1] ** -0.5)
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", p, v).unflatten(1, grid)


@pytest.fixture
def fake(monkeypatch):
    """A ``natten`` that runs on the CPU; its calls by function, last one wins."""
    package, functional, calls = ModuleType("natten"), ModuleType("natten.functional"), {}
    package.__spec__ = ModuleSpec("natten", None)
    package.HAS_LIBNATTEN = True

    def record(name):
        def attend(q, k, v, **settings):
            assert q.ndim == int(name[2]) + 3
            calls[name] = settings
            return masked_attention(q, k, v, **settings)

        return attend

    for name in ("na1d", "na2d", "na3d"):
        setattr(functional, name, record(name))
    monkeypatch.setitem(sys.modules, "natten", package)
    monkeypatch.setitem(sys.modules, "natten.functional", functional)
    monkeypatch.setattr(natten, "_DEVICE", "cpu")
    return calls


def attend(policy, layout, q, k, v):
    engine = Engine(
        name="test",
        layers=1,
        schedule=policy.schedule(),
        planner=policy.planner("test", "test", 1),
        impl=policy.impl,
    )
    engine.enter(ForwardContext(layout))
    return engine.attend(q, k, v, layer=0), engine.stats


def gna(**settings):
    return GnaProcessor(**{"min_tokens": 0, "dense_steps": 0, **settings})


def qkv(layout, heads=2, dim=16):
    torch.manual_seed(0)
    return torch.randn(3, 2, layout.tokens, heads, dim).unbind()


@pytest.mark.parametrize(
    "grid, settings, name",
    [
        (GRID, dict(window=(3, 4, 5)), "na3d"),
        (GRID, dict(window=(4, 4, 4), stride=(2, 2, 4)), "na3d"),
        (GRID, dict(window=(2, 3, 4), dilation=(2, 2, 2)), "na3d"),
        (GRID, dict(window=(3, -1, 5), causal=(True, False, False)), "na3d"),
        (GRID, dict(density=0.25), "na3d"),
        ((1, 9, 10), dict(window=(5, 4), stride=(1, 2)), "na2d"),
        ((1, 1, 24), dict(window=(-1, -1, 6)), "na1d"),
    ],
    ids=str,
)
def test_agrees_with_the_carriers(fake, grid, settings, name):
    layout = TokenLayout(TokenGrid(*grid))
    x = qkv(layout)
    out, stats = attend(gna(impl="natten", **settings), layout, *x)
    expected, ours = attend(gna(impl="gather", **settings), layout, *x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert list(fake) == [name] and stats.carrier == "natten" and stats.sparse == ours.sparse == 1
    if "window" in settings:
        axes = [axis.density for axis in Window(grid, settings["window"]).axes]
        if not settings.get("causal"):
            assert stats.density == {(None, 0): pytest.approx(math.prod(axes))}


def test_arguments(fake):
    q, k, v = qkv(TokenLayout(TokenGrid(*GRID)))
    window = Window(GRID, (2, 3, -1), (2, 1, 1), (2, 2, 1), (False, True, False))
    natten.run(q, k, v, [window], scale=0.5)
    assert fake["na3d"] == {
        "kernel_size": (2, 3, 8),
        "stride": (2, 1, 1),
        "dilation": (2, 2, 1),
        "is_causal": (False, True, False),
        "scale": 0.5,
    }


def test_in_a_pipeline(fake):
    pipe, call = tiny.tiny_wan()
    with apply(pipe, gna(window=3)):
        expected = tiny.run(pipe, **call)
    with apply(pipe, gna(window=3, impl="natten")) as handle:
        torch.testing.assert_close(tiny.run(pipe, **call), expected, atol=2e-5, rtol=1e-4)
        assert [s.carrier for s in handle.stats().values()] == ["natten"]


NEAR, FAR = Window(GRID, 2), Window(GRID, 3)
SNAPPED = Window(GRID, (2, 4, 4), snap=(1, 4, 4))


@pytest.mark.parametrize(
    "windows, text, dtype, dim, message",
    [
        ([NEAR], 5, torch.float32, 16, "5 text tokens"),
        ([NEAR, FAR], 0, torch.float32, 16, "one window for all heads"),
        ([SNAPPED], 0, torch.float32, 16, "border='shift'"),
        ([Window((1, 1, 1), -1)], 0, torch.float32, 16, "at least 2 tokens"),
        ([NEAR], 0, torch.float64, 16, "torch.float64"),
        ([NEAR], 0, torch.float32, 20, "multiples of 8 as head_dim, not 20"),
    ],
)
def test_limits(fake, windows, text, dtype, dim, message):
    tokens = math.prod(windows[0].grid) + text
    q = torch.zeros(1, tokens, 2, dim, dtype=dtype)
    reason = natten.limits(q, windows, text)
    assert message in reason and "impl='auto'" in reason
    with pytest.raises(ValueError, match="^impl='natten': ") as error:
        natten.run(q, q, q, windows)
    assert reason in str(error.value) and not fake


def test_no_call_off_the_gpu(fake, monkeypatch):
    monkeypatch.setattr(natten, "_DEVICE", "cuda")
    layout = TokenLayout(TokenGrid(*GRID))
    with pytest.raises(ValueError, match="CUDA only, q is on cpu: use impl='auto'"):
        attend(gna(window=2, impl="natten"), layout, *qkv(layout))


def test_an_engine_does_not_fall_back(fake):
    layout = TokenLayout(TokenGrid(*GRID), 0, 5)
    with pytest.raises(ValueError, match="5 text tokens"):
        attend(gna(window=2, impl="natten"), layout, *qkv(layout))
    layout = TokenLayout(TokenGrid(*GRID))
    with pytest.raises(ValueError, match="one window for all heads"):
        attend(gna(window=(NEAR, FAR), impl="natten"), layout, *qkv(layout))
    assert not fake


def test_it_is_missed_before_the_run(fake, monkeypatch):
    pipe, _ = tiny.tiny_wan()
    monkeypatch.setattr(sys.modules["natten"], "HAS_LIBNATTEN", False)
    with pytest.raises(ValueError, match="without its compiled library: install"):
        apply(pipe, gna(impl="natten"))
    monkeypatch.setitem(sys.modules, "natten", None)
    with pytest.raises(ValueError, match="not installed: install a wheel"):
        apply(pipe, gna(impl="natten"))
    apply(pipe, gna()).remove()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(precision="fp32"), "precision='fp32': NATTEN"),
        (dict(border="snap"), "border='snap': NATTEN"),
    ],
)
def test_settings_it_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        gna(impl="natten", **settings)


def test_only_windows_run_on_it():
    with pytest.raises(ValueError, match="impl='natten': it must be one of"):
        ParoProcessor(impl="natten")
