"""Context parallelism: DeepSpeed-Ulysses around any attention function.

Every rank holds a shard of the tokens with all heads. Ulysses exchanges that for all tokens with a
shard of the heads, which is what block-sparse attention needs: orders and block lists are per head
and speak of the whole sequence. (Jacobs et al., arXiv:2309.14509)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol


def context_parallel(config: Any) -> Any | None:
    """The context-parallel part of diffusers' ``ParallelConfig``, or None when there is none."""
    return getattr(config, "context_parallel_config", None)


def ulysses_attention(
    attend: Callable[[Tensor, Tensor, Tensor, slice], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: Any,
) -> Tensor:
    """Self-attention over a sequence that is sharded across processes.

    Args:
        attend: ``(q, k, v, heads) -> out`` over the whole sequence, ``heads`` being the slice of
            the layer's heads that this rank was given.
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
    return _to_tokens(attend(q, k, v, slice(first, first + local)), group)


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
