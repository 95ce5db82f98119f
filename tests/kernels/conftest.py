from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody wrote holds NaN: whoever reads it is caught."""

    def poisoned(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
