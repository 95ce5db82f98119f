"""A PARO call without a tail leaves the order to the kernel."""

import pytest
import torch

from gen_accel import ParoProcessor, apply, calibrate
from gen_accel.order.axis import AxisOrder
from helpers import tiny
from helpers.tiny import tiny_flux, tiny_hunyuan

pytest.importorskip("triton")


@pytest.mark.parametrize("build", [tiny_flux, tiny_hunyuan], ids=lambda b: b.__name__)
def test_no_pass_of_its_own(build, monkeypatch):
    pipe, call = build()
    rest = {name: value for name, value in call.items() if name != "prompt"}
    plan = calibrate(pipe, [call["prompt"]], density=0.4, dense_steps=0.0, block=16, **rest)
    settings = dict(plan=plan, dense_steps=0.0, min_tokens=0)
    with apply(pipe, ParoProcessor(**settings, impl="reference", precision="bf16")):
        by_hand = tiny.run(pipe, **call)

    def refuse(*args):
        raise AssertionError("a pass for the order")

    monkeypatch.setattr(AxisOrder, "reorder", refuse)
    with apply(pipe, ParoProcessor(**settings, impl="triton", precision="bf16")) as handle:
        out = tiny.run(pipe, **call)
        assert handle.stats()["transformer"].carrier == "triton"
    torch.testing.assert_close(out, by_hand, atol=0.02, rtol=0.02)
