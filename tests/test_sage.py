"""The guard around SageAttention, against a fake with the faults of the wheel."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from gen_accel import SparseProcessor, sage
from gen_accel.dense import attend
from gen_accel.kernels.reference import attention


def _wheel_attention(
    q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs
):
    """What 1.0.6 does, in fp32: mutates k, ignores keywords, pads the tail, divides 0 by 0."""
    assert tensor_layout == "NHD" and not is_causal
    assert not kwargs, f"the wheel ignores {sorted(kwargs)}"
    assert q.shape[-1] in (64, 96, 128) and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    if smooth_k:
        k -= k.mean(1, keepdim=True)
    rounded = []
    for x, tile in ((q, 128), (k, 64)):
        padded = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % tile)).unflatten(1, (-1, tile))
        scale = padded[:, :, :, :].abs().amax((2, 4), keepdim=True) / 127
        rounded.append((torch.round(padded / scale) * scale).flatten(1, 2))
    scores = torch.einsum("bqhd,bkhd->bhqk", *rounded) * (sm_scale or q.shape[-1] ** -0.5)
    values = F.pad(v.float(), (0, 0, 0, 0, 0, -v.shape[1] % 64))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    return out[:, : q.shape[1]].to(q.dtype)


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("sageattention")
    module.__spec__ = importlib.machinery.ModuleSpec("sageattention", None)
    module.sageattn = _wheel_attention
    monkeypatch.setitem(sys.modules, "sageattention", module)
    monkeypatch.setattr(sage, "version", lambda: (1, 0, 6))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sage, "_on_gpu", lambda x: True)
    monkeypatch.setattr(sage, "MIN_TOKENS", 64)
    return module


def _qkv(tokens: int = 256, dim: int = 64, dtype=torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, tokens, 2, dim, generator=generator)
    return [x.to(dtype) for x in (q, k + 10, v)]


def _error(x: torch.Tensor, q, k, v, scale=None) -> float:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact = attention(q.double(), k.double(), v.double(), None, scale)[0]
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dim", sage.HEAD_DIMS)
def test_result_and_inputs(wheel, dim) -> None:
    q, k, v = _qkv(dim=dim)
    kept = k.clone()
    out = sage.dense(q, k, v)
    assert torch.equal(k, kept)
    assert _error(out, q, k, v) < 0.03


def test_the_scale_is_heard(wheel) -> None:
    q, k, v = _qkv()
    assert _error(sage.dense(q, k, v, scale=0.5), q, k, v, 0.5) < 0.06
    assert _error(sage.dense(q, k, v, scale=0.5), q, k, v) > 0.5


def test_tiles_of_zeros_do_not_become_nan(wheel) -> None:
    q, k, v = _qkv(512)
    q[:, 128:256], k[:] = 0, 3.0
    assert not torch.isfinite(_wheel_attention(q, k.clone(), v, "NHD")).all()
    out = sage.dense(q, k, v)
    assert torch.isfinite(out).all()
    assert _error(out, q, k, v) < 0.03


def test_inputs_with_strides(wheel) -> None:
    q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in _qkv())
    assert q.stride(-1) != 1
    assert _error(sage.dense(q, k, v), q, k, v) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.float(), r"torch.float32: it takes fp16 and bf16; use dense='stock'"),
        (lambda q: q[..., :48], r"head_dim=48: it takes 64, 96, 128"),
        (lambda q: q[:, :63], r"63 tokens: it pays from 64 on"),
        (lambda q: q[:, :200], r"200 keys end 56 short .* sageattention 1.0.6 .* up to 28.0%"),
    ],
)
def test_what_it_must_not_run(wheel, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        sage.dense(*(change(x) for x in _qkv()))


def test_a_ragged_end_that_weighs_nothing(wheel) -> None:
    assert sage.limits(*[torch.empty(1, 75_600, 1, 64, dtype=torch.bfloat16)] * 2) is None
    short = [torch.empty(1, 17_800, 1, 64, dtype=torch.bfloat16)] * 2
    assert "17800 keys end 56 short" in sage.limits(*short)


def test_later_versions_need_no_help(wheel, monkeypatch) -> None:
    seen = {}

    def compiled(q, k, v, **kwargs):
        seen.update(kwargs, k=k)
        return q

    monkeypatch.setattr(sage, "version", lambda: (2, 2, 0))
    wheel.sageattn = compiled
    q, k, v = _qkv(200)
    sage.dense(q, k, v)
    assert seen.pop("k") is k
    assert seen == {"tensor_layout": "NHD", "is_causal": False, "sm_scale": 0.125}


def test_without_the_package_or_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(sage, "version", lambda: None)
    with pytest.raises(ValueError, match=r"dense='sage': sageattention is not installed: pip"):
        SparseProcessor(dense="sage")
    monkeypatch.setattr(sage, "version", lambda: (1, 0, 6))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        SparseProcessor(dense="sage")


def test_dense_kinds(wheel) -> None:
    q, k, v = _qkv()
    for kind in ("stock", "sage", "int8", "int8+int8"):
        assert _error(attend(q, k, v, kind, None, "reference"), q, k, v) < 0.03, kind
    with pytest.raises(ValueError, match=r"dense='sagee': .* did you mean 'sage'"):
        SparseProcessor(dense="sagee")
