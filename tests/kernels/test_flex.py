"""Few and small: every shape here costs some seconds of compilation."""

import subprocess
import sys

import pytest
import torch

from gen_accel.kernels import flex
from gen_accel.kernels.api import available, block_sparse_attention
from helpers.attention_cases import CASES, expected, tolerance

NAMED = {case.name: case for case in CASES}
needs_compiler = pytest.mark.skipif(flex.missing() is not None, reason=str(flex.missing()))


def check(name, dtype=torch.float32, **options):
    case = NAMED[name]
    q, k, v = case.tensors(dtype)
    out = block_sparse_attention(q, k, v, case.blocks(), impl="flex", **options)
    assert out.shape == q.shape and out.dtype == dtype
    assert (out - expected(case, dtype)[0]).abs().max() <= tolerance(case, dtype)


@needs_compiler
def test_equals_the_definition_with_one_compilation_per_shape():
    torch._dynamo.reset()
    shape = (512, 512, 3, 64, 1, (64, 64))
    cases = [
        c
        for c in CASES
        if (c.q_len, c.kv_len, c.heads, c.dim, c.batch, c.block) == shape and c.mask_mod is None
    ]
    assert len(cases) >= 8
    lists = {tuple(c.blocks().full_kv_num_blocks.shape) for c in cases}
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for case in cases:
        check(case.name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == len(lists)


@needs_compiler
@pytest.mark.parametrize("name", ["odd length", "rule per sample and head"])
def test_ragged_ends_and_rules(name):
    check(name)


@needs_compiler
def test_half_precision():
    check("batch 2, lists per sample and head", torch.bfloat16)


@needs_compiler
def test_emulates_quantised_scores():
    case = NAMED["odd length"]
    q, k, v = case.tensors()
    run = lambda impl: block_sparse_attention(  # noqa: E731
        q, k, v, case.blocks(), precision="int8", impl=impl
    )
    torch.testing.assert_close(run("flex"), run("reference"), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_fp16_scores_beyond_its_range():
    case = NAMED["batch 2, lists per sample and head"]
    q, k, v = (100 * x for x in case.tensors())
    for precision in ("auto", "int8"):
        out = block_sparse_attention(
            q.half(), k.half(), v.half(), case.blocks(), precision=precision, impl="flex"
        )
        assert out.isfinite().all()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["head_dim 96", "blocks of 32 x 128", "few queries, many keys", "only partial, ragged"]
)
def test_other_shapes(name):
    check(name)


@needs_compiler
def test_runs_inside_a_compiled_caller():
    case = NAMED["alternate"]
    q, k, v = case.tensors()
    blocks = case.blocks()
    call = lambda q: block_sparse_attention(2 * q, k, v, blocks, impl="flex")  # noqa: E731
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), call(q), rtol=0, atol=0)


def test_limits_name_the_way_out():
    case = CASES[0]
    q, k, v = case.tensors()
    with pytest.raises(ValueError, match="impl='flex': .*log-sum-exp on a CPU: use impl='gather'"):
        block_sparse_attention(q, k, v, case.blocks(), impl="flex", return_lse=True)
    with pytest.raises(ValueError, match="does not take fp64"):
        block_sparse_attention(q.double(), k.double(), v.double(), impl="flex")
    with pytest.raises(ValueError, match=r"cannot round weights.*use precision='int8', or impl="):
        block_sparse_attention(q, k, v, case.blocks(), impl="flex", precision="int8+int8")
    with pytest.raises(ValueError, match="no gradient on a CPU"):
        block_sparse_attention(q.requires_grad_(), k, v, impl="flex")


def test_missing_compiler(monkeypatch):
    """In a process of its own: what torch found is cached."""
    code = (
        "from gen_accel.kernels.api import available;"
        "r = available()['flex']; assert r and 'no C++ compiler' in r and 'gather' in r, r"
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_available():
    assert available()["flex"] == flex.missing()
