"""Attention calls with ugly shapes and masks, and how exact a carrier has to be on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.reference import attention

# ---- block masks: (rows, columns) -> bool [1 | B, 1 | H, rows, columns] --------------------------


def every(rows: int, columns: int) -> Tensor:
    return torch.ones(1, 1, rows, columns, dtype=torch.bool)


def one_per_row(rows: int, columns: int) -> Tensor:
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[torch.arange(rows), torch.arange(rows) * 5 % columns] = True
    return mask[None, None]


def skip_runs(*lengths: int) -> Callable[[int, int], Tensor]:
    """Keep one block, skip ``lengths[0]``, keep one, skip ``lengths[1]``, ..., again and again."""

    def pattern(rows: int, columns: int) -> Tensor:
        period = torch.cat([torch.tensor([True] + [False] * n) for n in lengths])
        shifts = torch.arange(rows)[:, None] + torch.arange(columns)
        return period[shifts % len(period)][None, None]

    return pattern


def without(rows: slice = slice(None), columns: slice = slice(None)) -> Callable:
    def pattern(num_rows: int, num_columns: int) -> Tensor:
        mask = every(num_rows, num_columns)
        mask[..., rows, columns] = False
        return mask

    return pattern


def random(batch: int, heads: int, density: float) -> Callable[[int, int], Tensor]:
    """Lists that differ per head; some rows may keep nothing."""

    def pattern(rows: int, columns: int) -> Tensor:
        generator = torch.Generator().manual_seed(rows * 1000 + columns)
        return torch.rand(batch, heads, rows, columns, generator=generator) < density

    return pattern


def unbalanced(rows: int, columns: int) -> Tensor:
    """Three heads from nearly empty to dense, as calibrated masks have them."""
    generator = torch.Generator().manual_seed(columns)
    share = torch.tensor([0.05, 0.4, 1.0])[:, None, None]
    mask = torch.rand(1, 3, rows, columns, generator=generator) < share
    mask[..., 0, :] = True  # as text rows
    return mask


# ---- element rules -------------------------------------------------------------------------------


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def banded(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A band whose width depends on the head, shifted per sample; some queries see nothing."""
    return ((q - k).abs() <= 9 + 4 * h + b) & (q % 7 != 3)


# ---- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call; blocks of ``partial`` rows x columns go through ``mask_mod``."""

    name: str
    pattern: Callable[[int, int], Tensor]
    q_len: int = 512
    kv_len: int = 512
    heads: int = 3
    dim: int = 64
    batch: int = 1
    block: tuple[int, int] = (64, 64)
    partial: Callable[[int, int], Tensor] | None = None
    mask_mod: Callable[..., Tensor] | None = None
    contiguous: bool = True
    loud: float = 1.0  # factor of q and k: large ones need the softmax's maximum

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(len(self.name))

        def make(tokens: int, factor: float) -> Tensor:
            shape = (self.batch, tokens, self.heads, self.dim)
            x = factor * torch.randn(shape, generator=generator)
            # A tensor that was sliced out of a fused projection, heads first.
            return x if self.contiguous else _scattered(x)

        q, k = make(self.q_len, self.loud), make(self.kv_len, self.loud)
        v = make(self.kv_len, 1.0)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def blocks(self) -> Blocks:
        rows, columns = -(-self.q_len // self.block[0]), -(-self.kv_len // self.block[1])
        full = self.pattern(rows, columns)
        partial = None if self.partial is None else self.partial(rows, columns)
        if partial is not None:
            full, partial = torch.broadcast_tensors(full, partial)
            full = full & ~partial
        return Blocks.from_mask(
            full,
            q_len=self.q_len,
            kv_len=self.kv_len,
            block_size=self.block,
            partial=partial,
            mask_mod=self.mask_mod,
        )

    @property
    def scale(self) -> float:
        return self.dim**-0.5


def _scattered(x: Tensor) -> Tensor:
    batch, tokens, heads, dim = x.shape
    wide = torch.full((batch, heads, 3 * dim, tokens), torch.nan).permute(0, 3, 1, 2)
    wide[..., dim : 2 * dim] = x
    return wide[..., dim : 2 * dim]


_RANDOM = random(1, 3, 0.4)

CASES = [
    Case("all blocks", every),
    Case("one block per row", one_per_row),
    Case("alternate", skip_runs(1)),
    Case("runs of 1, 2, 3 and 5 skipped", skip_runs(1, 2, 3, 5)),
    Case("first column off", without(columns=slice(0, 1))),
    Case("last column off", without(columns=slice(-1, None))),
    Case("whole rows off", without(rows=slice(2, 4))),
    Case("nothing at all", without()),
    Case("batch 2, lists per sample and head", random(2, 3, 0.4), batch=2),
    Case("batch 2, lists shared", random(1, 1, 0.4), batch=2),
    Case("unbalanced heads", unbalanced, q_len=1024, kv_len=1024),
    Case("head_dim 16", _RANDOM, dim=16),
    Case("head_dim 96", _RANDOM, dim=96),
    Case("head_dim 128", _RANDOM, dim=128),
    Case("blocks of 16", _RANDOM, q_len=200, kv_len=200, block=(16, 16)),
    Case("blocks of 32", _RANDOM, q_len=333, kv_len=333, block=(32, 32)),
    Case("blocks of 128", _RANDOM, q_len=777, kv_len=777, block=(128, 128)),
    Case("blocks of 128 x 64", _RANDOM, q_len=500, kv_len=500, block=(128, 64)),
    Case("blocks of 32 x 128", _RANDOM, q_len=500, kv_len=500, block=(32, 128)),
    Case("odd length", random(1, 3, 0.5), q_len=401, kv_len=401),
    Case("ragged tail visible everywhere", without(columns=slice(1, 3)), q_len=449, kv_len=449),
    Case("shorter than one block", every, q_len=7, kv_len=7),
    Case("one token", every, q_len=1, kv_len=1),
    Case("few queries, many keys", _RANDOM, q_len=65, kv_len=577),
    Case("many queries, few keys", _RANDOM, q_len=577, kv_len=65),
    Case("226 text tokens", skip_runs(2, 1), q_len=226 + 360, kv_len=226 + 360),
    Case("strided inputs", _RANDOM, q_len=401, kv_len=401, contiguous=False),
    Case("large scores", _RANDOM, loud=6.0),
    Case("causal", _RANDOM, q_len=401, kv_len=401, partial=random(1, 3, 0.4), mask_mod=causal),
    Case("only partial, ragged", without(), 401, 401, partial=every, mask_mod=banded),
    Case("rule per sample and head", random(2, 3, 0.1), 300, 260, batch=2, block=(32, 64),
         partial=random(2, 3, 0.6), mask_mod=banded),
    Case("large scores through a rule", without(), loud=6.0, partial=every, mask_mod=banded),
]  # fmt: skip


def expected(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The definition in fp64, on inputs rounded to ``dtype``."""
    return attention(*(x.double() for x in case.tensors(dtype)), case.blocks(), case.scale)


def tolerance(case: Case, dtype: torch.dtype) -> float:
    """Twice the largest error that dense masked attention of torch makes in ``dtype``.

    A rounding of the result is granted on top: a case with one key per query has no other error.
    """
    q, k, v = (x.transpose(1, 2) for x in case.tensors(dtype))
    visible = elements(case.blocks(), case.batch, case.heads)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=case.scale)
    exact = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=visible, scale=case.scale
    )
    # A query that sees nothing is undefined there.
    seen = visible.any(-1)
    error = (out.double() - exact)[seen].abs()
    if not error.numel():
        return 0.0
    return float(2 * error.max() + torch.finfo(dtype).eps * exact[seen].abs().max())


def elements(blocks: Blocks, batch: int, heads: int) -> Tensor:
    """Element mask ``[B, H, q_len, kv_len]``, made another way than the reference makes it."""

    def stretch(which: str) -> Tensor:
        mask = blocks.mask(which).repeat_interleave(blocks.block_q, -2)
        mask = mask.repeat_interleave(blocks.block_kv, -1)
        return mask[..., : blocks.q_len, : blocks.kv_len].expand(batch, heads, -1, -1)

    visible = stretch("full").clone()
    if blocks.mask_mod is not None:
        index = (torch.arange(n) for n in (batch, heads, blocks.q_len, blocks.kv_len))
        visible |= stretch("partial") & blocks.mask_mod(*torch.meshgrid(*index, indexing="ij"))
    return visible


def keep_all(case: Case) -> Case:
    """The same call with every block visible."""
    return replace(case, pattern=every, partial=None, mask_mod=None)
