import pytest
import torch
import torch.nn.functional as F

from gen_accel.kernels import gather
from gen_accel.kernels.api import block_sparse_attention
from helpers.attention_cases import CASES, Case, every, expected, keep_all, tolerance, unbalanced

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
