import math

import pytest
import torch

from gen_accel.kernels import flex
from gen_accel.kernels import tail as tail_module
from gen_accel.kernels.api import block_sparse_attention
from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.mass import block_mass
from gen_accel.kernels.pool import group_means
from gen_accel.kernels.reference import attention
from gen_accel.kernels.tail import block_scores, pool_keys, rectify
from helpers.attention_cases import CASES
from helpers.operations import operations

B, H, D, BLOCK = 2, 3, 16, 8


def tensors(video=64, text=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, B, video + text, H, D)
    return torch.randn(shape, generator=generator, dtype=dtype)


def lists(video=64, text=5, density=0.3, seed=1):
    """Random video blocks, the diagonal, all text; text queries see everything."""
    tokens = video + text
    rows = -(-tokens // BLOCK)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, H, rows, rows, generator=generator) < density
    mask |= torch.eye(rows, dtype=torch.bool)
    whole = video // BLOCK if text else rows
    mask[..., whole:] = True
    mask[..., whole:, :] = True
    if not text:
        mask[..., -1] = torch.arange(rows) % 2 == 0
    return Blocks.from_mask(mask, q_len=tokens, kv_len=tokens, block_size=BLOCK), whole


def rectified(q, k, v, blocks, pooled, gapr=None):
    scores = block_scores(q, k, BLOCK, BLOCK, pooled=pooled, scale=D**-0.5, gapr=gapr is not None)
    return rectify(v, blocks, scores, pooled=pooled, gapr=gapr)


def tails(q, k, v, blocks, pooled):
    """Every tail with a normaliser of its own, and dropping."""
    k_, v_ = k[:, :pooled], v[:, :pooled]
    return {
        "drop": None,
        "rectified": rectified(q, k, v, blocks, pooled),
        "rectified+gapr": rectified(q, k, v, blocks, pooled, "code"),
        "joint": pool_keys(k_, v_, BLOCK),
        "joint, 4 a block": pool_keys(k_, v_, BLOCK, per_block=4),
        "joint+variance": pool_keys(k_, v_, BLOCK, variance=True),
    }


SIZES = [(64, 0), (64, 1), (64, 5), (64, 24), (60, 0)]
sizes = pytest.mark.parametrize("video, text", SIZES)


def pooled_keys(video, text):
    return video // BLOCK * BLOCK if text else video


@sizes
def test_uniform_blocks_make_every_tail_exact(video, text):
    q, k, v = tensors(video, text)
    for x in (q, k):  # every token of a block is its first; values stay as they are
        first = torch.arange(video) // BLOCK * BLOCK
        x[:, :video] = x[:, first]
    q, k, v = (x.float() for x in (q, k, v))
    blocks, _ = lists(video, text)
    dense = attention(q, k, v, None, D**-0.5)[0]
    pooled = pooled_keys(video, text)
    for name, tail in tails(q, k, v, blocks, pooled).items():
        error = (attention(q, k, v, blocks, D**-0.5, tail)[0] - dense)[:, :pooled]
        error = error.norm() / dense.norm()
        assert error > 0.1 if tail is None else error < 1e-5, name


@sizes
def test_values_of_one_give_one(video, text):
    q, k, v = tensors(video, text)
    v = torch.ones_like(v)
    blocks, _ = lists(video, text)
    for name, tail in tails(q, k, v, blocks, pooled_keys(video, text)).items():
        out, _ = attention(q, k, v, blocks, D**-0.5, tail)
        torch.testing.assert_close(out, v, rtol=0, atol=1e-6, msg=name)


@sizes
def test_a_constant_added_to_all_keys_changes_nothing(video, text):
    q, k, v = tensors(video, text)
    shift = 3 * torch.randn(D, generator=torch.Generator().manual_seed(7), dtype=k.dtype)
    blocks, _ = lists(video, text)
    pooled = pooled_keys(video, text)
    here = tails(q, k, v, blocks, pooled)
    there = tails(q, k + shift, v, blocks, pooled)
    smooth, smooth_too = (
        rectified(q, x - x.mean(1, keepdim=True), v, blocks, pooled, "code") for x in (k, k + shift)
    )
    here["smoothed gapr"], there["smoothed gapr"] = smooth, smooth_too
    for name in here:
        one = attention(q, k, v, blocks, D**-0.5, here[name])[0]
        two = attention(q, k + shift, v, blocks, D**-0.5, there[name])[0]
        same = torch.allclose(one, two, rtol=0, atol=1e-6)
        # GAPR compares sizes of logits, which a shift changes: smooth the keys first.
        assert same != (name == "rectified+gapr"), name


@sizes
def test_seeing_all_is_dense(video, text):
    q, k, v = tensors(video, text)
    blocks, _ = lists(video, text, density=2.0)
    dense = attention(q, k, v, None, D**-0.5)[0]
    full = torch.ones_like(blocks.mask())
    blocks = Blocks.from_mask(full, q_len=q.shape[1], kv_len=k.shape[1], block_size=BLOCK)
    for name, tail in tails(q, k, v, blocks, pooled_keys(video, text)).items():
        out = attention(q, k, v, blocks, D**-0.5, tail)[0]
        torch.testing.assert_close(out, dense, rtol=0, atol=1e-6, msg=name)


def test_joint_is_formula_four():
    q, k, v = tensors(text=5)
    blocks, whole = lists(text=5)
    pooled = whole * BLOCK
    mask = blocks.mask()
    mean = k[:, :pooled].unflatten(1, (whole, BLOCK)).mean(2)
    total = v[:, :pooled].unflatten(1, (whole, BLOCK)).sum(2)
    got, lse = attention(q, k, v, blocks, D**-0.5, pool_keys(k[:, :pooled], v[:, :pooled], BLOCK))
    for b, h, i in [(0, 0, 0), (1, 2, 37), (0, 1, 63)]:
        seen = mask[b, h, i // BLOCK]
        keys = seen.repeat_interleave(BLOCK)[: k.shape[1]]
        exact = torch.exp(q[b, i, h] @ k[b, keys, h].T * D**-0.5)
        rough = torch.exp(q[b, i, h] @ mean[b, ~seen[:whole], h].T * D**-0.5)
        bottom = exact.sum() + BLOCK * rough.sum()
        top = exact @ v[b, keys, h] + rough @ total[b, ~seen[:whole], h]
        torch.testing.assert_close(got[b, i, h], top / bottom, rtol=0, atol=1e-7)
        assert math.isclose(lse[b, h, i], math.log(bottom), abs_tol=1e-6)


def test_variance_is_the_second_order_of_a_block():
    # Gaussian keys: E exp(s q.k) = exp(s q.mean + s^2/2 q Var q), which is what the term adds.
    generator = torch.Generator().manual_seed(0)
    size, scale = 4096, 0.5
    q = torch.randn(1, 1, 1, 4, generator=generator, dtype=torch.float64)
    k = torch.randn(1, 2 * size, 1, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([True, False]).view(1, 1, 1, 2)
    blocks = Blocks.from_mask(mask, q_len=1, kv_len=2 * size, block_size=(1, size))
    _, dense = attention(q, k, k, None, scale)
    plain = attention(q, k, k, blocks, scale, pool_keys(k, k, size))[1]
    better = attention(q, k, k, blocks, scale, pool_keys(k, k, size, variance=True))[1]
    assert abs(better - dense) < 0.05 * abs(plain - dense)


def test_paper_gapr_loses_the_mass_that_the_code_keeps():
    q, k, v = tensors()
    blocks, whole = lists()
    code, paper = (rectified(q, k, v, blocks, whole * BLOCK, g) for g in ("code", "paper"))
    assert torch.equal(code.shift, paper.shift)
    assert (paper.ratio <= code.ratio).all() and (paper.ratio < code.ratio).any()


def test_rectified_is_the_pseudo_code():
    q, k, v = tensors()
    blocks, whole = lists()
    pooled, b, h, n = whole * BLOCK, 1, 2, 3
    mean = [x[b, :pooled, h].unflatten(0, (whole, BLOCK)).mean(1) for x in (q, k, v)]
    logits = mean[0][n] @ mean[1].T * D**-0.5 + math.log(BLOCK)
    text = mean[0][n] @ k[b, pooled:, h].T * D**-0.5
    mass = torch.cat([logits, text]).softmax(0)
    hidden = ~blocks.mask()[b, h, n, :whole]
    tail = rectified(q, k, v, blocks, pooled)
    torch.testing.assert_close(tail.ratio[b, h, n], 1 - mass[:whole][hidden].sum())
    torch.testing.assert_close(tail.shift[b, h, n], mass[:whole][hidden] @ mean[2][hidden])


def test_padding_places_do_not_count():
    q, k, v = tensors(text=0)
    real = torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.7
    real[:BLOCK] = False  # a group without any
    got = pool_keys(k, v, BLOCK, real=real, variance=True)
    for c in range(8):
        inside = k[:, c * BLOCK : (c + 1) * BLOCK][:, real[c * BLOCK : (c + 1) * BLOCK]]
        if inside.shape[1] == 0:
            assert got.bias[c] == -math.inf
            continue
        torch.testing.assert_close(got.key[:, c], inside.mean(1))
        torch.testing.assert_close(got.variance[:, c], inside.var(1, correction=0))
        assert math.isclose(got.bias[c], math.log(inside.shape[1]), abs_tol=1e-6)
    assert torch.isfinite(got.key).all()


def test_ragged_last_group_is_a_masked_mean():
    x = tensors(video=30, text=0)[0]
    mean, count, deviation, _ = group_means(x, BLOCK, deviation=True)
    assert count.tolist() == [8, 8, 8, 6]
    torch.testing.assert_close(mean[:, 3], x[:, 24:].mean(1))
    expected = (x[:, 24:] - x[:, 24:].mean(1, keepdim=True)).abs().mean(1)
    torch.testing.assert_close(deviation[:, 3], expected)
    got = pool_keys(x, x, BLOCK, per_block=4)
    assert got.key.shape[1] == 16 and got.bias[-1] == -math.inf
    torch.testing.assert_close(got.bias[:15].exp().sum(), torch.tensor(30.0))


@pytest.mark.parametrize("name", ["joint", "rectified"])
def test_named_tails_of_the_api(name):
    q, k, v = tensors(text=0, dtype=torch.float32)
    blocks, _ = lists(text=0)
    own = pool_keys(k, v, BLOCK) if name == "joint" else rectified(q, k, v, blocks, k.shape[1])
    one = block_sparse_attention(q, k, v, blocks, tail=name, impl="reference")
    two = block_sparse_attention(q, k, v, blocks, tail=own, impl="reference")
    assert torch.equal(one, two)
    assert block_sparse_attention(q, k, v, tail=name).shape == q.shape


def _bhsd(q, k, v, blocks, scale, return_lse):
    out, lse = attention(*(x.transpose(1, 2) for x in (q, k, v)), blocks, scale)
    return out.transpose(1, 2), lse if return_lse else None


@sizes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["gather", "flex"])
def test_carriers_agree_with_the_reference(video, text, dtype, impl, monkeypatch):
    if impl == "flex":  # compiled, it has no log-sum-exp on a CPU
        monkeypatch.setattr(flex, "_compiled", lambda: _bhsd)
        monkeypatch.setattr(flex, "_block_mask", lambda blocks: blocks)
        monkeypatch.setattr(flex, "limits", lambda call: None)
    q, k, v = tensors(video, text).to(dtype)
    blocks, _ = lists(video, text)
    atol = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for name, tail in tails(q, k, v, blocks, pooled_keys(video, text)).items():
        expected, lse = attention(q, k, v, blocks, D**-0.5, tail)
        out, got = block_sparse_attention(q, k, v, blocks, tail=tail, impl=impl, return_lse=True)
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected, rtol=0, atol=atol, msg=name)
        torch.testing.assert_close(got, lse, rtol=0, atol=max(atol, 1e-5), msg=name)
        alone = block_sparse_attention(q, k, v, blocks, tail=tail, impl=impl)
        torch.testing.assert_close(alone, expected, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("impl", ["reference", "gather"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_ugly_shapes(case, impl, poison):
    q, k, v = case.tensors()
    blocks = case.blocks()
    atol = 2e-3 if "large" in case.name else 1e-5
    for tail in (
        pool_keys(k, v, blocks.block_kv),
        pool_keys(k[:, : blocks.block_kv], v[:, : blocks.block_kv], blocks.block_kv, per_block=2),
    ):
        expected, lse = attention(*(x.double() for x in (q, k, v)), blocks, 0.3, tail)
        out, got = block_sparse_attention(
            q, k, v, blocks, tail=tail, scale=0.3, impl=impl, return_lse=True
        )
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
        torch.testing.assert_close(got, lse, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("numbers", [1, 3000])
def test_memory_budget_changes_nothing(numbers, monkeypatch):
    q, k, v = (x.transpose(1, 2) for x in tensors())
    blocks, _ = lists()
    pooled = pool_keys(k.transpose(1, 2)[:, :64], v.transpose(1, 2)[:, :64], BLOCK)
    expected = tail_module.stand_in_attention(q, pooled, blocks, 0.3)
    monkeypatch.setattr(tail_module, "_NUMBERS", numbers)
    for one, two in zip(tail_module.stand_in_attention(q, pooled, blocks, 0.3), expected):
        torch.testing.assert_close(one, two)


def test_a_gpu_does_not_wait_for_launches():
    """HunyuanVideo's 118,800 tokens; of the meta device, which computes nothing, as of a GPU."""
    tokens, pooled, block = 118_800 + 256, 118_784, 128
    q = torch.empty(1, tokens, 24, 128, dtype=torch.bfloat16, device="meta")
    sizes = dict(pooled=pooled, scale=0.1, parts=4)
    assert 50 < operations(lambda: block_scores(q, q, block, block, **sizes)) < 150
    rows = -(-tokens // block)
    lists = torch.empty(1, 24, rows, rows, dtype=torch.int32, device="meta")
    blocks = Blocks(lists[..., 0], lists, tokens, tokens, block, block)
    means = pool_keys(q[:, :pooled], q[:, :pooled], block)
    queries = q.transpose(1, 2).float()
    assert operations(lambda: tail_module.stand_in_attention(queries, means, blocks, 0.1)) < 1000


@pytest.mark.parametrize("name", ["joint", "rectified"])
def test_tails_travel_through_compiled_code(name):
    q, k, v = tensors(text=0, dtype=torch.float32)
    blocks, _ = lists(text=0)

    def call(q):
        return block_sparse_attention(q, k, v, blocks, tail=name)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), call(q), rtol=0, atol=1e-6)


def test_errors():
    q, k, v = tensors(text=0, dtype=torch.float32)
    blocks, _ = lists(text=0)
    with pytest.raises(ValueError, match="per_block=3: it must divide"):
        pool_keys(k, v, BLOCK, per_block=3)
    with pytest.raises(ValueError, match="did you mean 'joint'"):
        block_sparse_attention(q, k, v, blocks, tail="join")
    with pytest.raises(ValueError, match="without blocks none is hidden"):
        block_sparse_attention(q, k, v, tail=pool_keys(k, v, BLOCK))
    with pytest.raises(ValueError, match="at most the 8 key blocks"):
        block_sparse_attention(q, k, v, blocks, tail=pool_keys(k, v, BLOCK // 2))
    with pytest.raises(ValueError, match="key of the tail is"):
        tail = pool_keys(k[:1], v[:1], BLOCK)
        block_sparse_attention(q, k, v, blocks, tail=tail)
    scores = block_scores(q, k, BLOCK, BLOCK, pooled=64, scale=1.0)
    with pytest.raises(ValueError, match="gapr='code' needs"):
        rectify(v, blocks, scores, pooled=64, gapr="code")
    with pytest.raises(ValueError, match="gapr='both'"):
        rectify(v, blocks, scores, pooled=64, gapr="both")


@pytest.mark.parametrize("numbers", [1 << 21, 1])
@pytest.mark.parametrize("video, text", SIZES)
def test_scores_of_parts_are_means_of_their_softmax(video, text, numbers, monkeypatch):
    monkeypatch.setattr(tail_module, "_NUMBERS", numbers)
    q, k, _ = tensors(video, text)
    pooled, parts = pooled_keys(video, text), 4
    size, scale = BLOCK // parts, D**-0.5
    got = block_scores(q, k, BLOCK, BLOCK, pooled=pooled, scale=scale, parts=parts)
    torch.testing.assert_close(got.video.sum(-1) + got.text, torch.ones_like(got.text))
    b, h = 1, 2
    chunks = k[b, :pooled, h].split(size)
    keys = torch.stack([c.mean(0) for c in chunks] + list(k[b, pooled:, h]))
    bias = torch.tensor([len(c) for c in chunks] + [1] * (k.shape[1] - pooled)).double().log()
    for row in (0, q.shape[1] // BLOCK - 1, -(-q.shape[1] // BLOCK) - 1):
        queries = q[b, row * BLOCK : (row + 1) * BLOCK, h].split(size)
        mass = torch.stack([(scale * keys @ x.mean(0) + bias).softmax(0) for x in queries]).mean(0)
        blocks = mass[: len(chunks)].split(parts)
        torch.testing.assert_close(got.video[b, h, row], torch.stack([x.sum() for x in blocks]))


def test_scores_of_single_tokens_are_the_masses():
    q, k, _ = tensors()
    got = block_scores(q, k, BLOCK, BLOCK, pooled=64, scale=0.3, parts=BLOCK)
    exact = block_mass(q, k, block=BLOCK, blocks=8, scale=0.3)
    torch.testing.assert_close(got.video[:, :, :8].mean(0).float(), exact)
