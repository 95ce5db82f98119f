import pytest
import torch
import torch.nn.functional as F

from gen_accel.kernels.reference import attention
from helpers.attention_cases import CASES, elements, expected


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_is_masked_attention(case):
    q, k, v = (x.double() for x in case.tensors())
    out, lse = attention(q, k, v, case.blocks(), case.scale)

    visible = elements(case.blocks(), case.batch, case.heads)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.scale
    scores = torch.where(visible, scores, -torch.inf)
    weights = torch.where(visible, scores.softmax(-1), 0).nan_to_num()
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", weights, v))
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())


def test_without_blocks_is_dense():
    q, k, v = (torch.randn(2, 301, 3, 16, dtype=torch.float64) for _ in range(3))
    out, _ = attention(q, k, v, None, 0.3)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.3)
    torch.testing.assert_close(out, dense.transpose(1, 2))


def test_half_precision_is_computed_in_fp32():
    case = CASES[3]
    out, _ = attention(*case.tensors(torch.bfloat16), case.blocks(), case.scale)
    assert out.dtype == torch.bfloat16
    exact, _ = expected(case, torch.bfloat16)
    assert (
        torch.equal(out, exact.bfloat16()) or (out - exact).abs().max() < 2**-8 * exact.abs().max()
    )


def test_has_a_gradient():
    case = CASES[6]
    q, k, v = (x.double().requires_grad_() for x in case.tensors())
    attention(q, k, v, case.blocks(), case.scale)[0].square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
