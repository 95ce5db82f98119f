"""The families without the rest of the house: a dense ``attend``, and an installer of ten lines."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from gen_accel.families import family_of
from gen_accel.layout import Unsupported
from gen_accel.parallel import by_part, by_rank


class Dense:
    """An `Attend` that attends to everything but padding, and remembers what it was asked."""

    def __init__(self):
        self.layout = None
        self.reason = None
        self.calls = []
        self.traced = False

    def begin(self, transformer, args, kwargs):
        """Pre-forward hook of the transformer."""
        try:
            self.layout = family_of(transformer).layout(transformer, args, kwargs)
        except Unsupported as reason:
            self.layout, self.reason = None, str(reason)

    def __call__(self, q, k, v, *, layer, backend, mask=None, heads=None, ranks=1):
        if ranks > 1 and self.layout.text:
            q, k, v = (by_part(x, self.layout, ranks) for x in (q, k, v))
            out = self(q, k, v, layer=layer, backend=backend, heads=heads)
            return by_rank(out, self.layout, ranks)
        if torch.compiler.is_compiling():
            self.traced = True  # a list that grows would be guarded on, and recompile every step
        else:
            self.calls.append((layer, tuple(q.shape)))
        if self.layout is None:
            return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)
        assert q.shape == k.shape == v.shape and q.shape[1] == self.layout.tokens
        if self.layout.text_valid is None:
            return dispatch_attention_fn(q, k, v, backend=backend)
        out = []
        for i, valid in enumerate(self.layout.text_valid):
            keys = self.layout.grid.numel + valid
            one = (q[i : i + 1], k[i : i + 1, :keys], v[i : i + 1, :keys])
            out.append(dispatch_attention_fn(*one, backend=backend))
        return torch.cat(out)


class Masked(Dense):
    """Dense attention with the stock mask, as for a call whose layout is not known."""

    def begin(self, transformer, args, kwargs):
        self.reason = "not asked"


class Zero(Dense):
    """Attention that returns nothing: whoever still gets the stock output did not call it."""

    def __call__(self, q, k, v, *, layer, backend, mask=None, heads=None, ranks=1):
        return torch.zeros_like(q)


@contextmanager
def installed(transformer, attend):
    """Family processors on ``transformer`` inside the block; the stock ones after it."""
    family = family_of(transformer)
    taken = {}
    for name, module in transformer.named_modules():
        if hasattr(module, "processor") and family.keep(name, module) is None:
            taken[module] = module.processor
    for layer, (module, stock) in enumerate(taken.items()):
        module.set_processor(family.processors[type(stock).__name__](attend, layer, stock))
    hook = transformer.register_forward_pre_hook(attend.begin, with_kwargs=True)
    try:
        yield attend
    finally:
        hook.remove()
        for module, stock in taken.items():
            module.set_processor(stock)


def difference(a, b) -> float:
    """Largest absolute difference; both must be finite."""
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return float((a.float() - b.float()).abs().max())
