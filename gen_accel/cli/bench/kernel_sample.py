"""The part of an attention call's result that a benchmark compares with the definition."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gen_accel.kernels.blocks import Blocks
    from gen_accel.kernels.quant import Precision
    from gen_accel.kernels.tail import Tail

_HEADS = 3
_BLOCKS = 3  # besides the first and the last


class Sample:
    """Some heads and query blocks, drawn anew for every seed; the first and last block always.

    Args:
        tokens: Queries of the call.
        block: Queries per block.
        heads: Heads of the call.
        seed: Of the draw.
        also: Query blocks that belong to it in any case.
    """

    def __init__(
        self, tokens: int, block: int, heads: int, seed: int, also: Iterable[int] = ()
    ) -> None:
        draw = random.Random(seed)
        last = -(-tokens // block) - 1
        drawn = draw.sample(range(last + 1), min(_BLOCKS, last + 1))
        self.size, self.block = tokens, block
        self.blocks = sorted({0, last, *drawn, *also})
        self.heads = sorted(draw.sample(range(heads), min(_HEADS, heads)))

    def tokens(self, device: torch.device) -> Tensor:
        """The queries, int64."""
        import torch

        block, end = self.block, self.size
        starts = [torch.arange(b * block, min(end, (b + 1) * block)) for b in self.blocks]
        return torch.cat(starts).to(device)

    def right(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None, tail: Tail | None,
        scale: float, precision: Precision | None = None,
    ) -> Tensor:  # fmt: skip
        """By the definition: ``[B, queries of the sample, its heads, head_dim]``.

        Args:
            q: ``[B, Sq, H, D]``.
            k: ``[B, Skv, H, D]``.
            v: Shape of k.
            blocks: What the call sees.
            tail: What stands in for the rest.
            scale: Factor of the scores.
            precision: Quantised like this, in fp32; None: in fp64.
        """
        from gen_accel.kernels import reference

        tokens, heads = self.tokens(q.device), self.heads
        some = None if blocks is None else self._some(blocks, q.shape[2])
        tensors = [x[:, :, heads] for x in (q[:, tokens], k, v)]
        if precision is None:
            tensors = [x.double() for x in tensors]
        tail = self._tail(tail)
        return reference.attention(*tensors, some, scale, tail, precision)[0]

    def plain(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """By dense SDPA in the inputs' dtype, whose error says how near is right; all keys seen."""
        import torch.nn.functional as F

        queries = q[:, self.tokens(q.device)]
        q, k, v = (x[:, :, self.heads].transpose(1, 2) for x in (queries, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    def pick(self, out: Tensor) -> Tensor:
        """The sample's part of a result ``[B, Sq, H, D]``."""
        return out[:, self.tokens(out.device)][:, :, self.heads]

    def error(self, found: Tensor, right: Tensor) -> float:
        """Relative L2 error of the worst head and block; NaN where a number is.

        A fault in one block would vanish in the mean over all of them.

        Args:
            found: The sample's part, see `pick`.
            right: What `right` returned.
        """
        import torch

        parts, start = [], 0
        for block in self.blocks:
            stop = start + min(self.block, self.size - block * self.block)
            some, exact = found[:, start:stop].double(), right[:, start:stop].double()
            norm = exact.norm(dim=(1, 3)).clamp_min(1e-30)  # queries may see nothing
            parts.append((some - exact).norm(dim=(1, 3)) / norm)
            start = stop
        return float(torch.stack(parts).max())  # which is NaN when one is

    def _some(self, blocks: Blocks, heads: int) -> Blocks:
        """The lists of the sample, whose queries stand one after the other."""
        from gen_accel.kernels.blocks import Blocks

        def pick(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            return x.expand(-1, heads, *x.shape[2:])[:, self.heads][:, :, self.blocks]

        full = pick(blocks.full_kv_num_blocks), pick(blocks.full_kv_indices)
        assert full[0] is not None and full[1] is not None
        tokens = self.tokens(blocks.device)
        sizes = (len(tokens), blocks.kv_len, blocks.block_q, blocks.block_kv)
        rule, number = blocks.mask_mod, tokens.new_tensor(self.heads)

        def of_sample(b: Any, h: Any, q: Any, k: Any) -> Any:
            assert rule is not None
            return rule(b, number[h], tokens[q], k)

        partial = pick(blocks.kv_num_blocks), pick(blocks.kv_indices)
        return Blocks(*full, *sizes, *partial, None if rule is None else of_sample)

    def _tail(self, tail: Tail | None) -> Tail | None:
        from gen_accel.kernels.tail import Pooled

        if tail is None:
            return None
        heads = self.heads
        if isinstance(tail, Pooled):
            variance = None if tail.variance is None else tail.variance[:, :, heads]
            own = {"key": tail.key[:, :, heads], "value": tail.value[:, :, heads]}
            return replace(tail, **own, variance=variance)
        ratio, shift = (x[:, heads][:, :, self.blocks] for x in (tail.ratio, tail.shift))
        return replace(tail, ratio=ratio, shift=shift)
