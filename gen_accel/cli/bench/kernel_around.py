"""What surrounds the kernel in a call, and in calibration: a piece of ``bench kernel``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.kernel_pieces import Candidate, Piece, relative

if TYPE_CHECKING:
    from torch import Tensor

AXES = tuple(itertools.permutations(range(3)))


def around(piece: Piece) -> list[Candidate]:
    """Plan, order and inverse of one call, and the mass that a calibration measures."""
    import torch

    from gen_accel.kernels.mass import block_mass
    from gen_accel.kernels.pool import group_means
    from gen_accel.kernels.prepare import AxisPlaces, Norm, Rope, prepare, restore
    from gen_accel.kernels.route import _choose, route, to_lists

    case, heads, device = piece.case, piece.sample.heads, piece.suite.device
    q, k, v = piece.q, piece.k, piece.v
    axes = [order for order, _ in zip(itertools.cycle(AXES), range(case.heads))]
    places = AxisPlaces.from_axes(axes, case.grid, 0, device)
    angle = torch.rand(case.video, case.dim // 2, generator=piece.generator, device=device)
    rope = Rope(angle.cos(), angle.sin())
    norms = {  # of each head, and as in Wan across a token's heads
        kind: Norm(torch.ones(width, dtype=q.dtype, device=device), 1e-6)
        for kind, width in (("each", case.dim), ("all", case.heads * case.dim))
    }

    def pool(*tensors: Tensor) -> Tensor:
        q, k = (group_means(x, case.block).mean.transpose(1, 2) for x in tensors)
        return q @ k.transpose(2, 3)

    scores, ordered = pool(q, k), prepare(q, places)
    keep = max(1, scores.shape[-1] // 5)

    def orders() -> list[Tensor]:
        return [prepare(q, places, rope), prepare(k, places, rope), prepare(v, places)]

    def norm_then_rope() -> list[Tensor]:
        norm = norms["each"]
        normed = (torch.rms_norm(x, norm.weight.shape, norm.weight, norm.eps) for x in (q, k))
        return [prepare(x, None, rope) for x in normed]

    def norm_rope(kind: str) -> list[Tensor]:
        return [prepare(x, None, rope, norms[kind]) for x in (q, k)]

    def whole() -> Tensor:
        route(pool(q, k), keep=keep)
        return restore(orders()[0], places)

    def mass(*tensors: Tensor) -> Tensor:
        sizes = {"block": case.block, "blocks": case.pooled // case.block}
        return block_mass(*tensors, rows_per_block=8, **sizes)

    # In fp64 the functions above are their definitions: of some heads, that is what is right.
    def some(x: Tensor) -> Tensor:
        return x[:, :, heads].double()

    def pool_error(found: Tensor) -> float:
        return relative(found[:, heads], pool(some(q), some(k)))

    def route_error(found: tuple[Tensor, Tensor]) -> float:
        right = to_lists(_choose(scores[:, heads], keep, None, None), keep)
        return float(any(not torch.equal(a[:, heads], b) for a, b in zip(found, right)))

    def order_error(found: list[Tensor]) -> float:
        right = prepare(some(k), AxisPlaces(places.strides[heads], case.grid), rope)
        return relative(found[1][:, heads], right)

    def norm_error(found: list[Tensor], kind: str = "each") -> float:
        norm = Norm(norms[kind].weight.double(), norms[kind].eps)
        tokens = slice(0, 64)  # a norm across heads wants them all
        few = Rope(rope.cos[tokens], rope.sin[tokens])
        return relative(found[1][:, :, tokens], prepare(k[:, tokens].double(), None, few, norm))

    def whole_error(found: Tensor) -> float:
        return relative(found[:, :, heads], prepare(some(q), None, rope).transpose(1, 2))

    def mass_error(found: Tensor) -> float:
        return relative(found[heads], mass(some(q), some(k)))

    found: list[tuple[str, Callable[[], Any], Callable[[Any], float], float]] = [
        ("pooled scores of q and k", lambda: pool(q, k), pool_error, 1e-4),
        ("block lists from scores", lambda: route(scores, keep=keep), route_error, 0.0),
        ("norm, then RoPE of q and k", norm_then_rope, norm_error, 2**-7),
        ("norm and RoPE of q and k in one", lambda: norm_rope("each"), norm_error, 2**-8),
        (
            "norm across heads and RoPE of q and k in one",
            lambda: norm_rope("all"),
            lambda found: norm_error(found, "all"),
            2**-8,
        ),
        ("RoPE and order of q, k and v", orders, order_error, 2**-8),
        ("inverse order", lambda: restore(ordered, places), lambda x: relative(x, q), 0.0),
        ("plan, order and inverse", whole, whole_error, 2**-8),
        ("softmax mass of blocks", lambda: mass(q, k), mass_error, 1e-3),
    ]
    config = {"lists": "around", "density": 1.0}
    return [Candidate(name, fn, error, config, limit) for name, fn, error, limit in found]
