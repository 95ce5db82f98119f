"""Context parallelism: DeepSpeed-Ulysses around any attention function.

Every rank holds a shard of the tokens with all heads. Ulysses exchanges that for all tokens with a
shard of the heads, which is what block-sparse attention needs: orders and block lists are per head
and speak of the whole sequence. (Jacobs et al., arXiv:2309.14509)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from gen_accel.layout import TokenLayout


def context_parallel(config: Any) -> Any | None:
    """The context-parallel part of diffusers' ``ParallelConfig``, or None when there is none."""
    return getattr(config, "context_parallel_config", None)


def ulysses_attention(
    attend: Callable[[Tensor, Tensor, Tensor, slice, int], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: Any,
) -> Tensor:
    """Self-attention over a sequence that is sharded across processes.

    Args:
        attend: ``(q, k, v, heads, ranks) -> out`` over the whole sequence, one shard behind the
            other, ``heads`` being the slice of the layer's heads that this rank was given.
        q: ``[batch, tokens / ranks, heads, head_dim]``, rank r holding the r-th part of the tokens.
        k: Like ``q``.
        v: Like ``q``.
        config: diffusers' ``ContextParallelConfig``, set up by ``enable_parallelism``.

    Returns:
        This rank's tokens with all heads, shaped like ``q``.

    Raises:
        ValueError: Ring attention, uneven shards, or heads that do not divide by the ranks.
    """
    if config.ring_degree > 1:
        raise ValueError(
            f"ring_degree={config.ring_degree}: sparse attention needs the whole sequence of a "
            "head on one rank; use ContextParallelConfig(ulysses_degree=...) alone"
        )
    if getattr(config, "ulysses_anything", False):
        raise ValueError(
            "ulysses_anything=True: uneven shards are not supported; choose a size whose tokens "
            "divide by ulysses_degree and leave ulysses_anything off"
        )
    group = config._ulysses_mesh.get_group()
    ranks, heads = dist.get_world_size(group), q.shape[2]
    if heads % ranks:
        raise ValueError(f"{heads} heads on {ranks} ranks: ulysses_degree must divide the heads")
    local = heads // ranks
    first = dist.get_rank(group) * local
    q, k, v = (_to_heads(x, group) for x in (q, k, v))
    return _to_tokens(attend(q, k, v, slice(first, first + local), ranks), group)


def by_part(x: Tensor, layout: TokenLayout, ranks: int) -> Tensor:
    """Shards ``[text_0, video_0, text_1, video_1, ...]`` as ``[text, video]``.

    Joint models put text and video of a shard together, so that after the exchange the sequence is
    not the model's.

    Args:
        x: ``[batch, tokens, heads, head_dim]``.
        layout: Of the whole sequence.
        ranks: Number of shards.

    Raises:
        ValueError: Text or video do not divide by the ranks.
    """
    sizes = [size // ranks for size in _sizes(layout, ranks)]
    parts = x.unflatten(1, (ranks, -1)).split(sizes, 2)
    return torch.cat([part.flatten(1, 2) for part in parts], 1)


def by_rank(x: Tensor, layout: TokenLayout, ranks: int) -> Tensor:
    """The inverse of `by_part`."""
    parts = x.split(_sizes(layout, ranks), 1)
    return torch.cat([part.unflatten(1, (ranks, -1)) for part in parts], 2).flatten(1, 2)


def _sizes(layout: TokenLayout, ranks: int) -> list[int]:
    sizes = [layout.text_before, layout.grid.numel, layout.text_after]
    if any(size % ranks for size in sizes):
        raise ValueError(
            f"{layout.grid.numel} video and {layout.text} text tokens on {ranks} ranks: both must "
            "divide by ulysses_degree"
        )
    return sizes


def enable_context_parallelism(transformer: Any, config: Any) -> None:
    """``transformer.enable_parallelism`` for every family, also where diffusers has no plan.

    diffusers knows how to shard Wan and FLUX; HunyuanVideo and Cosmos are sharded by ours. These
    two need gen_accel's processors: their stock ones stay on their shard.

    Args:
        transformer: A transformer of one of the families.
        config: diffusers' ``ContextParallelConfig(ulysses_degree=...)``.

    Raises:
        ValueError: The model knows where tokens stand in a way that cannot be sharded.
    """
    from gen_accel.families import family_of

    family = family_of(transformer)
    transformer.enable_parallelism(config=config, cp_plan=family.shards(transformer))
    for name, module in transformer.named_modules():
        # diffusers tells only processors that ask for it; those of Cosmos do not.
        if hasattr(module, "processor") and family.keep(name, module) is None:
            module.processor._parallel_config = transformer._parallel_config


def _to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[B, S/P, H, D] -> [B, S, H/P, D]``."""
    ranks = dist.get_world_size(group)
    x = x.unflatten(2, (ranks, -1)).movedim(2, 0)
    return _exchange(x, group).movedim(0, 1).flatten(1, 2)


def _to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[B, S, H/P, D] -> [B, S/P, H, D]``."""
    ranks = dist.get_world_size(group)
    x = x.unflatten(1, (ranks, -1)).movedim(1, 0)
    return _exchange(x, group).movedim(0, 2).flatten(2, 3)


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send part r of dim 0 to rank r, receive its part for us in the same place."""
    return funcol.wait_tensor(funcol.all_to_all_single_autograd(x.contiguous(), None, None, group))
