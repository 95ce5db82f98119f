from functools import partial

import pytest
import torch
import torch.nn.functional as F

from gen_accel.kernels import gather
from gen_accel.kernels.api import block_sparse_attention
from gen_accel.kernels.quant import PRECISIONS
from helpers.attention_cases import (
    CASES,
    Case,
    every,
    expected,
    keep_all,
    random,
    tolerance,
    unbalanced,
)

cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def attend(case, q, k, v, **options):
    return block_sparse_attention(q, k, v, case.blocks(), impl="gather", **options)


@cases
@pytest.mark.parametrize("budget", [gather._NUMBERS_PER_THREAD, 2**13], ids=["default", "tiny"])
def test_equals_the_definition(case, budget, poison, monkeypatch):
    # A tiny budget walks long lists in many spans.
    monkeypatch.setattr(gather, "_NUMBERS_PER_THREAD", budget)
    q, k, v = case.tensors()
    out, lse = attend(case, q, k, v, return_lse=True)
    exact, exact_lse = expected(case)
    assert out.dtype == q.dtype and out.shape == q.shape and lse.dtype == torch.float32
    assert (out - exact).abs().max() <= tolerance(case, torch.float32)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=1e-5)
    without_lse = attend(case, q, k, v)
    assert (without_lse - exact).abs().max() <= tolerance(case, torch.float32)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["auto", "half", "fp32"])
def test_half_precision(case, dtype, precision, poison):
    if precision == "half":
        precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    out = attend(case, *case.tensors(dtype), precision=precision)
    assert out.dtype == dtype
    assert (out - expected(case, dtype)[0]).abs().max() <= tolerance(case, dtype)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("name", ["unbalanced heads", "rule per sample and head"])
def test_any_number_of_threads(name, threads):
    case = next(case for case in CASES if case.name == name)
    out = attend(case, *case.tensors())
    assert (out - expected(case)[0]).abs().max() <= tolerance(case, torch.float32)


@pytest.mark.parametrize("pays", [True, False])
def test_half_precision_is_widened_where_it_is_slow(pays, monkeypatch):
    case = Case("unbalanced heads", unbalanced)
    monkeypatch.setattr(gather, "_half_pays", lambda dtype: pays)
    used = []
    fused = gather._Problem._fused
    monkeypatch.setattr(
        gather._Problem, "_fused", lambda self, *args: used.append(1) or fused(self, *args)
    )
    attend(case, *case.tensors(torch.bfloat16))
    assert bool(used) == pays
    attend(case, *case.tensors(torch.bfloat16), precision="bf16")
    assert used  # an explicit precision is not second-guessed


def test_double_precision():
    case = CASES[3]
    out = attend(case, *(x.double() for x in case.tensors()))
    torch.testing.assert_close(out, expected(case)[0], rtol=0, atol=1e-14)


@cases
def test_all_blocks_kept_is_dense(case):
    case = keep_all(case)
    q, k, v = case.tensors()
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    out, _ = attend(case, q, k, v, return_lse=True)
    assert (out - dense.transpose(1, 2)).abs().max() <= 2 * tolerance(case, torch.float32)
    # Where nothing is asked but the result, the dense kernel gives it.
    torch.testing.assert_close(attend(case, q, k, v), dense.transpose(1, 2), rtol=0, atol=0)
    torch.testing.assert_close(
        block_sparse_attention(q, k, v), dense.transpose(1, 2), rtol=0, atol=0
    )


def test_dense_with_lse():
    q, k, v = Case("dense", every, q_len=300, kv_len=430).tensors()
    out, lse = block_sparse_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, block_sparse_attention(q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 64**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@cases
def test_ones_stay_ones(case):
    q, k, v = case.tensors()
    out, lse = attend(case, q, k, torch.ones_like(v), return_lse=True)
    seen = (lse > -torch.inf).transpose(1, 2)[..., None].to(out.dtype)
    torch.testing.assert_close(out, seen.expand_as(out), rtol=0, atol=2e-6)


@cases
def test_a_constant_on_all_keys_changes_only_the_lse(case):
    q, k, v = (x.double() for x in case.tensors())
    shift = torch.randn(1, 1, 1, case.dim, dtype=torch.float64)
    out, lse = attend(case, q, k, v, return_lse=True)
    moved, moved_lse = attend(case, q, k + shift, v, return_lse=True)
    torch.testing.assert_close(moved, out, rtol=0, atol=1e-12)
    change = (q * shift).sum(-1).transpose(1, 2) * case.scale
    torch.testing.assert_close(moved_lse, lse + change.float(), rtol=1e-6, atol=1e-5)


def test_the_order_of_the_tokens_does_not_matter():
    case = Case("unbalanced heads", unbalanced)
    q, k, v = (x.double() for x in case.tensors())
    within = torch.cat([start + torch.randperm(64) for start in range(0, 512, 64)])
    out = attend(case, q, k, v)
    permuted = attend(case, q[:, within], k[:, within.flip(0)], v[:, within.flip(0)])
    assert not torch.allclose(permuted, out[:, within])  # keys went into other blocks
    permuted = attend(case, q[:, within], k[:, within], v[:, within])
    torch.testing.assert_close(permuted, out[:, within], rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [16, 128])
def test_memory_does_not_grow_with_the_length(block, monkeypatch):
    """Scores and gathered blocks stay within the budget, whatever a row keeps."""
    budget = 2**19
    monkeypatch.setattr(gather, "_NUMBERS_PER_THREAD", budget)
    taken = []
    multiply = torch.baddbmm

    def record(c, a, b, **options):
        taken.append(a.numel() + 2 * b.numel())
        return multiply(c, a, b, **options)

    monkeypatch.setattr(torch, "baddbmm", record)
    case = Case("long", unbalanced, 4096, 4096, dim=16, block=(block, block))
    attend(case, *case.tensors())
    assert budget / 2 < max(taken) <= budget * torch.get_num_threads()


def test_inputs_are_not_written_to():
    for case in (CASES[10], CASES[26]):
        q, k, v = case.tensors()
        before = [x.clone() for x in (q, k, v)]
        attend(case, q, k, v, return_lse=True)
        for x, y in zip((q, k, v), before):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_padded_list_entries_are_not_read():
    case = CASES[8]
    blocks = case.blocks()
    padding = torch.arange(blocks.full_kv_indices.shape[-1]) >= blocks.full_kv_num_blocks[..., None]
    blocks.full_kv_indices[padding] = 10**6
    q, k, v = case.tensors()
    torch.testing.assert_close(
        block_sparse_attention(q, k, v, blocks), attend(case, q, k, v), rtol=0, atol=0
    )


def test_needs_no_grad():
    case = CASES[0]
    q, k, v = case.tensors()
    q.requires_grad_()
    with pytest.raises(ValueError, match=r"gradient.*torch.no_grad\(\).*impl='reference'"):
        attend(case, q, k, v)
    with torch.no_grad():
        assert not attend(case, q, k, v).requires_grad
    block_sparse_attention(q, k, v).sum().backward()  # dense calls have one
    assert q.grad is not None


@pytest.mark.parametrize("tail", [None, "joint", "rectified"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_emulates_the_reference(name, tail, poison):
    """Where a weight lies between two codes, fp32 rounding decides; that is rare and small."""
    unalike = total = 0
    for case in CASES:
        if tail is not None and case.partial is not None:
            continue
        call = partial(
            block_sparse_attention, *case.tensors(), case.blocks(), tail=tail, precision=name
        )
        (out, lse), (right, right_lse) = (
            call(impl=impl, return_lse=True) for impl in ("gather", "reference")
        )
        assert torch.equal(torch.isfinite(lse), torch.isfinite(right_lse)), case.name
        assert (out - right).norm() <= 2e-3 * right.norm(), case.name
        apart = (out - right).abs() > 2e-5 * right.abs().max()
        unalike, total = unalike + int(apart.sum()), total + apart.numel()
    assert unalike <= (0 if PRECISIONS[name].pv is None else 0.02 * total)


@pytest.mark.parametrize("name", ["int8", "int4+int4"])
def test_emulation_in_many_spans(name, monkeypatch):
    case = next(case for case in CASES if case.name == "unbalanced heads")
    q, k, v = case.tensors()
    once = attend(case, q, k, v, precision=name)
    monkeypatch.setattr(gather, "_NUMBERS_PER_THREAD", 2**13)
    torch.testing.assert_close(attend(case, q, k, v, precision=name), once, rtol=0, atol=2e-3)


def test_quantised_calls_name_their_limits():
    q, k, v = (torch.randn(1, 96, 2, 16) for _ in range(3))
    blocks = Case("odd blocks", every, 96, 96, block=(48, 48)).blocks()
    assert block_sparse_attention(q, k, v, blocks, precision="int8").isfinite().all()
    with pytest.raises(ValueError, match=r"'int8\+fp8' with block_kv=48: .* precision='int8'"):
        block_sparse_attention(q, k, v, blocks, precision="int8+fp8")
    with pytest.raises(ValueError, match=r"no gradient; call it under torch.no_grad\(\)"):
        block_sparse_attention(q.requires_grad_(), k, v, precision="int8", impl="reference")


@pytest.mark.parametrize("impl", ["gather", "reference"])
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("tail", [None, "joint", "rectified"])
@pytest.mark.parametrize("pays", [True, False])
def test_fp16_scores_beyond_its_range(impl, listed, tail, pays, monkeypatch):
    monkeypatch.setattr(gather, "_half_pays", lambda dtype: pays)
    case = Case("loud", random(1, 3, 0.5), loud=400.0)
    q, k, v = case.tensors(torch.float16)
    blocks = case.blocks() if listed else None
    assert (case.scale * q[:, 0, 0].float() @ k[0, :, 0].float().mT).abs().max() > 65504
    for precision in ("auto", "fp16", *PRECISIONS):
        out = block_sparse_attention(q, k, v, blocks, tail=tail, precision=precision, impl=impl)
        assert out.isfinite().all(), precision
    # Inputs that fp16 has no numbers for are as large as it has.
    out = block_sparse_attention(q.float() * 1e6, k.float(), v.float(), precision="fp16", impl=impl)
    assert out.isfinite().all()
