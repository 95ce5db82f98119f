"""Other kernels for the steps that stay dense."""

import pytest
import torch

from gen_accel import ParoProcessor, apply
from helpers import tiny
from helpers.tiny import PIPES


def _error(out, exact):
    return ((out - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("build", PIPES, ids=lambda b: b.__name__)
def test_dense_steps_can_be_quantised(build):
    pipe, call = build()
    stock = tiny.run(pipe, **call)
    outs = {}
    for kind in ("stock", "int8", "int4"):
        policy = ParoProcessor(dense_steps=1.0, dense=kind, min_tokens=0, impl="reference")
        with apply(pipe, policy) as handle:
            outs[kind] = tiny.run(pipe, **call)
            assert all(s.sparse == 0 for s in handle.stats().values())
    torch.testing.assert_close(outs["stock"], stock, atol=2e-5, rtol=1e-4)
    assert 0 < _error(outs["int8"], stock) < 0.02
    assert _error(outs["int8"], stock) < _error(outs["int4"], stock)
