"""Whether a sparse call inside a transformer computes what its lists say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from gen_accel.cli.bench.kernel_sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

_FACTOR, _LOSSY_FACTOR = 4, 2  # as in bench kernel
_ROUNDING = 1e-5  # of fp32, where SDPA happens to be exact


class Checked(NamedTuple):
    """What came of a comparison with the definition.

    Attributes:
        error: Relative L2 error of the worst of some heads and query blocks.
        allowed: Largest error that is right: a multiple of dense SDPA's own in the same dtype, or
            where the call is quantised, of what its definition loses.
    """

    error: float
    allowed: float


@contextmanager
def first_call(seed: int) -> Iterator[list[Checked]]:
    """Compare the first block-sparse call inside with the definition in fp64.

    Yields a list that takes the result; it stays empty where no such call is made.
    """
    from gen_accel import engine

    original = engine.block_sparse_attention
    found: list[Checked] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, blocks: Any, **options: Any) -> Any:
        out = original(q, k, v, blocks, **options)
        if not found:
            found.append(check(q, k, v, blocks, out, seed=seed, **options))
        return out

    setattr(engine, "block_sparse_attention", watched)  # noqa: B010 (mypy: it has overloads)
    try:
        yield found
    finally:
        setattr(engine, "block_sparse_attention", original)  # noqa: B010


def check(
    q: Tensor, k: Tensor, v: Tensor, blocks: Any, out: Tensor, *, seed: int, precision: str,
    tail: Any = None, places: Any = None, **_: Any,
) -> Checked:  # fmt: skip
    """Compare a result of `block_sparse_attention` with the definition; arguments as there."""
    from gen_accel.kernels.quant import PRECISIONS

    if places is not None:
        q, k, v, out = (_ordered(x, places) for x in (q, k, v, out))
    sample = Sample(q.shape[1], blocks.block_q, q.shape[2], seed)
    scale = q.shape[3] ** -0.5
    right = sample.right(q, k, v, blocks, tail, scale)
    error = sample.error(sample.pick(out), right)
    if precision in PRECISIONS:
        quantised = sample.right(q, k, v, blocks, tail, scale, PRECISIONS[precision])
        return Checked(error, _LOSSY_FACTOR * sample.error(quantised, right))
    dense = sample.right(q, k, v, None, None, scale)
    plain = sample.error(sample.plain(q, k, v, scale), dense)
    return Checked(error, max(_FACTOR * plain, _ROUNDING))


def _ordered(x: Tensor, places: Any) -> Tensor:
    """Tokens in the order of the lists, by nothing but an index."""
    token = places.places(x.shape[1]).argsort(-1)[None, :, :, None]
    heads_first = x.transpose(1, 2)
    return heads_first.gather(2, token.expand(heads_first.shape)).transpose(1, 2)
