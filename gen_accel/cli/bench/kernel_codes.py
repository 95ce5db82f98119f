"""Quantised calls beside those in 16 bits, on the same lists: a piece of ``bench kernel``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.kernel_pieces import LOSSY, Candidate, Piece, sage

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.kernels.blocks import Blocks
    from gen_accel.kernels.operands import Operands

LISTS = "quantised"


def quantised(piece: Piece, density: float | None) -> list[Candidate]:
    """Calls with each precision, and what is left of them when the codes are given.

    Without a density everything is visible, and SageAttention, where it is installed, is beside.
    """
    from gen_accel.kernels.api import block_sparse_attention
    from gen_accel.kernels.operands import operands
    from gen_accel.kernels.quant import PRECISIONS

    tensors = (piece.q, piece.k, piece.v)
    blocks = None if density is None else piece.blocks("realistic", density)
    config: dict[str, Any] = {"lists": LISTS, "tail": "drop", "tflop": piece.tflop(blocks)}
    config["density"] = 1.0 if blocks is None else blocks.density()
    error = partial(piece.error, blocks, None)

    def call(precision: str) -> Tensor:
        return block_sparse_attention(*tensors, blocks, precision=precision, impl="triton")

    found = [Candidate("triton", partial(call, "auto"), error, config)]
    for name in piece.suite.precisions:
        own = {**config, "precision": name}
        codes = operands(*tensors, PRECISIONS[name])
        kernel = partial(on_codes, piece, codes, blocks)
        found += [
            Candidate(f"triton, {name}", partial(call, name), error, own, LOSSY),
            Candidate(f"triton, {name}, codes given", kernel, error, own, LOSSY),
        ]
    if density is None and piece.suite.device == "cuda":
        own = {**config, "precision": "sage"}
        run = partial(sage, *tensors)
        found.append(Candidate("sageattention", run, error, own, LOSSY, ours=False))
    return found


def on_codes(piece: Piece, codes: Operands, blocks: Blocks | None, **options: Any) -> Tensor:
    """The kernel alone."""
    from gen_accel.kernels.triton.launch import attend_codes

    return attend_codes(codes, blocks, piece.scale, **options)[0]
