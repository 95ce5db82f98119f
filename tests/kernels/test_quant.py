"""The numeric contract of quantised attention."""

from __future__ import annotations

import pytest
import torch

from gen_accel.kernels.api import block_sparse_attention
from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.quant import (
    LEVELS,
    PRECISIONS,
    quantise,
    quantise_rows,
    quantise_values,
)
from gen_accel.kernels.reference import attention

SCALE = 0.125


def _qkv(tokens: int = 200, keys: int = 200, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """Neighbours alike, as video tokens in a good order are."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    base = draw(1, -(-max(tokens, keys) // 8), 1, dim).repeat_interleave(8, 1)
    return (
        1.5 * (base[:, :tokens] + 0.5 * draw(2, tokens, 3, dim)),
        1.5 * (base[:, :keys] + 0.5 * draw(2, keys, 3, dim)),
        base[:, :keys] + draw(2, keys, 3, dim),
    )


def _error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def _exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention(q.double(), k.double(), v.double(), None, SCALE)[0]


@pytest.mark.parametrize(
    ("name", "bar"), [("int8", 0.01), ("int8+int8", 0.02), ("int8+fp8", 0.03), ("int4", 0.2)]
)
def test_error_on_structured_data(name: str, bar: float) -> None:
    q, k, v = _qkv()
    out = block_sparse_attention(q, k, v, scale=SCALE, precision=name, impl="reference")
    assert 0 < _error(out, _exact(q, k, v)) <= bar


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 200])
def test_codes_stand_for_what_they_replace(tokens: int) -> None:
    x = _qkv(tokens)[0]
    codes = quantise_rows(x, "int8", 32)
    assert codes.codes.dtype == torch.int8
    assert codes.scale.shape == (2, 3, -(-tokens // 32))
    half = (codes.scale / 2).repeat_interleave(32, -1)[..., :tokens].transpose(1, 2)[..., None]
    assert ((codes.dequantise() - x).abs() <= half * 1.00001).all()
    # The largest of each group has the largest code: no range is given away.
    group = codes.codes[:, :32].abs().amax((1, 3))
    assert (group == 127).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_values_have_a_scale_per_channel(kind: str) -> None:
    v = _qkv()[2].clone()
    v[..., 5] *= 1000
    whole, blocks = quantise_values(v, kind, v.shape[1]), quantise_values(v, kind, 64)
    assert whole.scale.shape == (2, 3, 1, 64)
    assert blocks.scale.shape == (2, 3, 4, 64)
    assert whole.codes.float().abs().max() == LEVELS[kind]
    for codes in (whole, blocks):
        others = [c for c in range(64) if c != 5]
        bar = {"int8": 0.01, "fp8": 0.03, "int4": 0.15}[kind]
        assert _error(codes.dequantise()[..., others], v[..., others]) < bar


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_constant_on_all_keys_changes_nothing(name: str) -> None:
    q, k, v = _qkv()
    calls = [
        block_sparse_attention(
            q, keys, v, scale=SCALE, precision=name, impl="reference", return_lse=True
        )
        for keys in (k, k + 40 * torch.randn(64))
    ]
    (out, lse), (moved, moved_lse) = calls
    # Rounding of k + 40: 40 / 2^24 of a unit moves a score by less than 1e-3, and few codes.
    assert _error(moved, out) < 2e-3
    exact = attention(q.double(), k.double(), v.double(), None, SCALE)[1]
    assert (lse - exact).abs().max() < (0.2 if "int4" not in name else 2)
    assert not torch.allclose(lse, moved_lse)  # the sum of exponentials does depend on it


def test_an_outlier_channel_of_the_keys_costs_less_than_twice_the_error() -> None:
    q, k, v = _qkv()
    k = k.clone()
    error = lambda: _error(  # noqa: E731
        block_sparse_attention(q, k, v, scale=SCALE, precision="int8", impl="reference"),
        _exact(q, k, v),
    )
    before = error()
    k[..., 7] += 300  # an outlier channel has a constant sign: what smoothing is for
    assert error() < 2 * before
    plain = PRECISIONS["int8"]._replace(smooth_k=False)
    assert _error(attention(q, k, v, None, SCALE, precision=plain)[0], _exact(q, k, v)) > 4 * before


def test_smoothed_keys_are_the_same_in_any_order() -> None:
    q, k, v = _qkv()
    order = torch.randperm(k.shape[1])
    means = [quantise(q, x, v, PRECISIONS["int8"]).k_mean for x in (k, k[:, order])]
    torch.testing.assert_close(*means)


def test_smoothed_queries_keep_what_they_share() -> None:
    q, k, v = _qkv()
    q = q + 20 * torch.randn(1, 1, 3, 64)
    int4 = PRECISIONS["int4"]
    errors = [
        _error(attention(q, k, v, None, SCALE, precision=p)[0], _exact(q, k, v))
        for p in (int4, int4._replace(smooth_q=False))
    ]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("name", PRECISIONS)
def test_blocks_of_zeros_are_safe(name: str) -> None:
    q, k, v = _qkv()
    for x in (q, k, v):
        x[:, 64:128] = 0
    out, lse = block_sparse_attention(
        q, k, v, scale=SCALE, precision=name, impl="reference", return_lse=True
    )
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    nothing = block_sparse_attention(q * 0, k * 0, v, scale=SCALE, precision=name, impl="reference")
    mean = v.mean(1, keepdim=True).expand_as(nothing)
    assert _error(nothing, mean) < (0.5 if name == "int4+int4" else 0.1)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("tail", ["drop", "joint", "rectified"])
def test_hidden_blocks_and_tails(name: str, tail: str) -> None:
    q, k, v = _qkv(230, 170)
    mask = torch.rand(1, 3, 4, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, 0, 1] = False
    blocks = Blocks.from_mask(mask, q_len=230, kv_len=170, block_size=64)
    run = lambda precision: block_sparse_attention(  # noqa: E731
        q, k, v, blocks, tail=tail, precision=precision, impl="reference", return_lse=True
    )
    (exact, exact_lse), (out, lse) = run("auto"), run(name)
    bar = 0.35 if "int4" in name else 0.05
    assert _error(out, exact) < bar
    if tail == "drop":
        assert (out[:, 64:128, 0] == 0).all()
        assert (lse[:, 0, 64:128] == -torch.inf).all()
    seen = torch.isfinite(exact_lse)
    assert torch.equal(seen, torch.isfinite(lse))
    assert (lse - exact_lse)[seen].abs().max() < (3 if "int4" in name else 0.3)


def test_weights_in_tiles_are_finer_than_in_rows_or_blocks() -> None:
    """PARO's block groups beat one scale per row of values far apart; tiles beat both."""
    q, k, v = _qkv(256, 512)
    exact = _exact(q, k, v)
    only_weights = PRECISIONS["int8+int8"]
    error = {
        p: _error(
            attention(q, k, v, None, SCALE, precision=only_weights._replace(pv="int4", p_scale=p))[
                0
            ],
            exact,
        )
        for p in ("tile", "row", "block")
    }
    assert error["tile"] < error["row"]
    assert error["tile"] < error["block"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in _qkv())
    out = block_sparse_attention(q, k, v, precision="int8+int8", impl="reference")
    assert out.dtype == dtype
    assert _error(out, attention(q.double(), k.double(), v.double(), None, SCALE)[0]) < 0.02


def test_fp16_scores_beyond_its_range_stay_finite() -> None:
    q, k, v = (x.half() for x in _qkv())
    q, k = q * 100, k * 100  # scores of about a million
    for name in ("auto", *PRECISIONS):
        out = block_sparse_attention(q, k, v, precision=name, impl="reference")
        assert torch.isfinite(out).all(), name


def test_an_unknown_precision_is_named() -> None:
    q, k, v = _qkv(8, 8)
    with pytest.raises(ValueError, match=r"precision='int8\+int7'.*did you mean 'int8\+int8'"):
        block_sparse_attention(q, k, v, precision="int8+int7")


@pytest.mark.parametrize("k_rows", [16, 32, 128])
def test_values_in_groups_that_are_not_tiles(k_rows: int) -> None:
    q, k, v = _qkv()
    v = v * torch.linspace(1, 50, 200)[:, None, None]  # so that a wrong group's scale shows
    precision = PRECISIONS["int8+int8"]._replace(k_rows=k_rows)
    out = attention(q, k, v, None, SCALE, precision=precision)[0]
    assert _error(out, _exact(q, k, v)) < 0.02
