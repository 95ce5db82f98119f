"""The forward kernel on codes against the reference, on the GPU or in Triton's interpreter."""

import math
from dataclasses import replace

import pytest
import torch

from gen_accel.kernels.api import block_sparse_attention
from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.operands import operands
from gen_accel.kernels.prepare import AxisPlaces, IndexPlaces, prepare, restore
from gen_accel.kernels.quant import PRECISIONS, quantise_rows
from gen_accel.kernels.reference import attention
from gen_accel.kernels.tail import block_scores, pool_keys, rectify
from gen_accel.select.gna import gna_plan
from helpers.attention_cases import CASES, Case, every, random
from helpers.kernels import DEVICE

import triton  # isort: skip
import triton.language as tl  # isort: skip

from gen_accel.kernels.triton.forward import _scores  # isort: skip
from gen_accel.kernels.triton.launch import attend_codes  # isort: skip

KERNELS = ("int8", "int8+int8", "int8+fp8")
STEP = {"int8": 2.0**-8, "int8+int8": 1 / 127, "int8+fp8": 2.0**-4}  # of the largest weight


@triton.jit
def _score_tile(Q, K, OUT, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr):
    row, key, dim = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, DIM)
    queries = tl.load(Q + row[:, None] * DIM + dim[None, :])
    keys = tl.load(K + key[:, None] * DIM + dim[None, :])
    tl.store(OUT + row[:, None] * KEYS + key[None, :], _scores(queries, keys, 64))


def test_scores_are_the_integers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 64, 1, 256, generator=generator)
    q, k = (quantise_rows(t, "int8", 64).codes[0, :, 0].to(DEVICE) for t in x)
    out = torch.empty(64, 64, device=DEVICE)
    _score_tile[(1,)](q, k, out, 64, 64, 256)
    assert torch.equal(out.cpu().long(), q.cpu().long() @ k.cpu().long().T)


def tensors(case, name):
    """Where values keep 16 bits, they are given in 16 bits."""
    dtype = torch.bfloat16 if PRECISIONS[name].pv is None else torch.float32
    return [x.to(DEVICE) for x in case.tensors(dtype)]


def check(case, name, blocks=None, tail=None):
    """What rounds the same is the same to fp32 rounding; a weight on a tie may go either way."""
    q, k, v = tensors(case, name)
    blocks = blocks or case.blocks().to(DEVICE)
    precision = PRECISIONS[name]
    codes = operands(q, k, v, precision)
    out, lse = attend_codes(codes, blocks, case.scale, tail=tail, return_lse=True)
    assert out.dtype == q.dtype and out.is_contiguous() and lse.dtype == torch.float32
    right, right_lse = attention(
        q.float(), k.float(), v.float(), blocks, case.scale, tail, precision
    )
    compare(out, lse, right, right_lse, v, name, rounded=tail is not None)


def compare(out, lse, right, right_lse, v, name, rounded=False):
    largest = float(v.abs().max())
    far = (out.float() - right).abs() / largest
    # A weight of the keys' 16-bit product, or of stand-ins, is rounded to bf16.
    near = 2**-7 if name == "int8" or rounded else 2e-5
    if name == "int8+fp8" and DEVICE == "cuda":
        near = max(near, 2**-9)  # Hopper sums e4m3 products in about 14 bits
    assert float(far.max()) <= max(near, STEP[name])
    assert float((far > near).float().mean()) < 0.05
    seen = torch.isfinite(right_lse)
    # Four units in the last place of scores as large as the sums.
    fine = 1e-5 + 5e-7 * float(right_lse[seen].abs().max()) if seen.any() else 0.0
    assert torch.equal(seen, torch.isfinite(lse))
    fine = 5e-3 if rounded else fine
    apart = (lse - right_lse)[seen].abs()
    if apart.numel():
        assert float(apart.max()) <= fine + (0 if name == "int8" else 5e-3)
        assert float((apart > fine).float().mean()) < 0.1


MIXED = Case("batch 2, lists per sample and head", random(2, 2, 0.4), 333, 333, heads=2, batch=2)
NAMES = (
    "whole rows off", "head_dim 16", "head_dim 96", "head_dim 128", "blocks of 32",
    "blocks of 128 x 64", "blocks of 32 x 128", "ragged tail visible everywhere", "one token",
    "many queries, few keys", "strided inputs", "large scores",
)  # fmt: skip
HELD = [MIXED, *(c for c in CASES if c.name in NAMES)]


def one_head(case):
    lists = case.blocks().full_kv_indices
    return replace(case, heads=1) if lists.shape[1] == 1 else case


@pytest.mark.parametrize("case", HELD, ids=lambda c: c.name)
def test_equals_the_reference(case, poison):
    check(one_head(case), "int8+int8")


@pytest.mark.parametrize("name", ["int8", "int8+fp8"])
@pytest.mark.parametrize("case", [MIXED, HELD[2], HELD[6], HELD[8]], ids=lambda c: c.name)
def test_other_numbers_equal_the_reference(name, case, poison):
    check(one_head(case), name)


@pytest.mark.parametrize("name", KERNELS)
def test_dense(name):
    case = Case("dense", every, 200, 230, heads=1)
    q, k, v = tensors(case, name)
    precision = PRECISIONS[name]
    out, lse = attend_codes(operands(q, k, v, precision), None, case.scale, return_lse=True)
    right = attention(q.float(), k.float(), v.float(), None, case.scale, precision=precision)
    compare(out, lse, *right, v, name)
    through = block_sparse_attention(q, k, v, precision=name, impl="triton")
    assert torch.equal(through, out)


@pytest.mark.parametrize("name", ["int8", "int8+fp8"])
def test_heads_may_be_innermost_in_memory(name):
    case = Case("strides", every, 40, 70, heads=3)
    precision = PRECISIONS[name]
    plain = tensors(case, name)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in plain]
    out, other = (
        attend_codes(operands(*x, precision), None, case.scale)[0] for x in (plain, turned)
    )
    torch.testing.assert_close(other, out)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale):
    q, k, v = (x.to(DEVICE) for x in replace(MIXED, batch=1, pattern=every).tensors())
    k = k + 3
    precision = PRECISIONS["int8+int8"]
    out, lse = attend_codes(operands(q, k, v, precision), None, scale, return_lse=True)
    compare(out, lse, *attention(q, k, v, None, scale, precision=precision), v, "int8+int8")


def test_groups_of_zeros_are_hidden_and_seen():
    case = replace(HELD[1], heads=1, q_len=200, kv_len=200)
    q, k, v = (x.to(DEVICE) for x in case.tensors())
    for x in (q, k, v):
        x[:, 64:128] = 0
    blocks = case.blocks().to(DEVICE)
    plain = PRECISIONS["int8+int8"]._replace(smooth_k=False)  # or no group would be zero
    out, lse = attend_codes(operands(q, k, v, plain), blocks, case.scale, return_lse=True)
    right = attention(q, k, v, blocks, case.scale, precision=plain)
    compare(out, lse, *right, v, "int8+int8")


@pytest.mark.parametrize("block", [64, 128])
def test_windows(block, poison):
    grid, tile = (4, 8, 8), (1, 8, 8)
    _, blocks = gna_plan(grid, (3, 5, 5), tile=tile, block=block, text=33, device=DEVICE)
    assert blocks.kv_num_blocks is not None, "the case shall have partial blocks"
    check(Case("window", every, blocks.q_len, blocks.kv_len, 1), "int8+int8", blocks)


TAILED = Case("blocks of 64", random(1, 1, 0.3), 333, 333, heads=1)


@pytest.mark.parametrize("name", ["int8", "int8+int8"])
@pytest.mark.parametrize("kind", ["rectified", "joint", "joint, 4 a block", "joint, variance"])
def test_tails(kind, name, poison):
    q, k, v = tensors(TAILED, name)
    blocks = TAILED.blocks().to(DEVICE)
    if kind == "rectified":
        scores = block_scores(q, k, 64, 64, pooled=k.shape[1], scale=TAILED.scale)
        tail = rectify(v, blocks, scores, pooled=k.shape[1])
    else:
        each = {"joint": 1, "joint, 4 a block": 4, "joint, variance": 2}[kind]
        tail = pool_keys(k, v, 64, per_block=each, variance=kind == "joint, variance")
    check(TAILED, name, blocks, tail)


def places():
    axes = [(2, 0, 1), (1, 2, 0)]
    yield AxisPlaces.from_axes(axes, (3, 5, 7), 9, DEVICE), 9 + 105 + 20
    token = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    token = torch.cat([token, token[:28]])  # padding repeats tokens
    place = torch.empty(100, dtype=torch.long)
    place[token.flip(0)] = torch.arange(128).flip(0)
    yield IndexPlaces(token.to(DEVICE), place.to(DEVICE)), 100


@pytest.mark.parametrize("order", [0, 1])
def test_orders_in_and_out(order):
    where, tokens = list(places())[order]
    x = torch.randn(3, 1, tokens, 2, 32, device=DEVICE)
    q, k, v = (prepare(t, where).transpose(1, 2) for t in x)
    length = q.shape[1]
    full = random(1, 2, 0.6)(-(-length // 64), -(-length // 64))
    blocks = Blocks.from_mask(full, q_len=length, kv_len=length, block_size=64).to(DEVICE)
    precision = PRECISIONS["int8+int8"]
    plain, plain_lse = attend_codes(operands(q, k, v, precision), blocks, 0.2, return_lse=True)
    codes = operands(*x, precision, where)
    out, lse = attend_codes(codes, blocks, 0.2, return_lse=True, places=where)
    assert torch.equal(out, restore(plain.transpose(1, 2), where))
    lse_back = restore(plain_lse[..., None], where)[..., 0].transpose(1, 2)
    assert torch.equal(lse, lse_back)


def test_fp16_scores_beyond_its_range_stay_finite():
    q, k, v = (x.half().to(DEVICE) for x in replace(MIXED, batch=1, heads=1).tensors())
    for name in KERNELS:
        out = block_sparse_attention(100 * q, 100 * k, v, precision=name, impl="triton")
        assert out.dtype == torch.float16 and torch.isfinite(out).all()


def test_limits_name_the_way_out():
    q = torch.randn(1, 64, 1, 32, device=DEVICE)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    small = Blocks.from_mask(mask, q_len=64, kv_len=64, block_size=16).to(DEVICE)
    for x, name, blocks, message in [
        (q, "int4", None, "int4: no kernel.*use impl='gather'"),
        (q, "int4+int4", None, "int4: no kernel.*use impl='gather'"),
        (q, "int8+int8", small, "block_kv=16: 8-bit products sum over 32 keys.*precision='int8'"),
        (q.double(), "int8", None, "float64: .*cast the inputs"),
    ]:
        with pytest.raises(ValueError, match=f"impl='triton': {message}"):
            block_sparse_attention(x, x, x, blocks, precision=name, impl="triton")
    block_sparse_attention(q, q, q, small, precision="int8", impl="triton")


def test_the_error_is_that_of_the_numbers():
    """And not of the kernel: against fp64, beside the bars of the reference."""
    case = Case("smooth", every, 256, 256, heads=1)
    base = torch.randn(1, 32, 1, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = ((base.repeat_interleave(8, 1) + 0.5 * x[:, :256]).to(DEVICE) for x in case.tensors())
    exact = attention(q.double(), k.double(), v.double(), None, case.scale)[0]
    for name, bar in (("int8", 0.01), ("int8+int8", 0.02), ("int8+fp8", 0.03)):
        out = block_sparse_attention(q, k, v, precision=name, impl="triton")
        error = float((out.double() - exact).norm() / exact.norm())
        assert 0 < error <= bar and math.isfinite(error), (name, error)
