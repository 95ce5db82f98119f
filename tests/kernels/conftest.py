from __future__ import annotations

import warnings

import pytest
import torch


@pytest.fixture
def by_torch(monkeypatch):
    """The public functions are definitions on a GPU too, or a kernel would be its own judge."""
    monkeypatch.setattr("gen_accel.kernels.fused._HAS_TRITON", False)


@pytest.fixture
def poison():
    """Memory that nobody wrote holds NaN, or the largest integer: whoever reads it is caught."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(before)
