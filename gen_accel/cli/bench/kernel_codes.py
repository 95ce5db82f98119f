"""Quantised calls beside those in 16 bits, on the same lists: a piece of ``bench kernel``."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.kernel_around import AXES
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
        allowed = piece.lossy(name, blocks, None)
        found += [
            Candidate(f"triton, {name}", partial(call, name), error, own, allowed),
            Candidate(f"triton, {name}, codes given", kernel, error, own, allowed),
        ]
    if blocks is not None:
        found += _ordering(piece, blocks, config)
    if density is None and piece.suite.device == "cuda":
        own = {**config, "precision": "sage"}
        run = partial(sage, *tensors)
        found.append(Candidate("sageattention", run, error, own, LOSSY, ours=False))
    return found


def _ordering(piece: Piece, blocks: Blocks, config: dict[str, Any]) -> list[Candidate]:
    """Whole calls on tokens in the model's order, as PARO makes them.

    The kernels put them into the order of the lists as they quantise, and back as they store.
    """
    from gen_accel.kernels.api import block_sparse_attention
    from gen_accel.kernels.prepare import AxisPlaces, restore

    case, device = piece.case, piece.suite.device
    axes = [order for order, _ in zip(itertools.cycle(AXES), range(case.heads))]
    places = AxisPlaces.from_axes(axes, case.grid, 0, device)
    at = places.places(case.tokens).argsort(-1)[None, :, :, None]  # token of each place
    tensors = [restore(x.transpose(1, 2), places) for x in (piece.q, piece.k, piece.v)]

    def call(precision: str) -> Tensor:
        options: dict[str, Any] = {"precision": precision, "places": places, "impl": "triton"}
        return block_sparse_attention(*tensors, blocks, **options)

    def error(out: Tensor) -> float:
        ordered = out.transpose(1, 2).gather(2, at.expand(-1, -1, -1, case.dim))
        return piece.error(blocks, None, ordered.transpose(1, 2))

    found = []
    for name in ("auto", *piece.suite.precisions):
        label = "triton" if name == "auto" else f"triton, {name}"
        own = {**config, "places": True}
        allowed = None
        if name != "auto":
            own, allowed = {**own, "precision": name}, piece.lossy(name, blocks, None)
        run = partial(call, name)
        found.append(Candidate(f"{label}, from the model's order", run, error, own, allowed))
    return found


def on_codes(piece: Piece, codes: Operands, blocks: Blocks | None, **options: Any) -> Tensor:
    """The kernel alone."""
    from gen_accel.kernels.triton.launch import attend_codes

    return attend_codes(codes, blocks, piece.scale, **options)[0]
