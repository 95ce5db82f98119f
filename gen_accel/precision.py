"""Precisions per head: who is quantised how, chosen by the error it makes.

Heads differ in how much rounding they bear: one that averages many values hardly shows it, one that
picks a few keys by large scores does. So each head has the cheapest precision whose measured error
stays below a limit; none of the published methods does that.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from gen_accel.kernels.api import block_sparse_attention, check_name, check_options
from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.quant import PRECISIONS
from gen_accel.kernels.tail import Rectified, Tail

EXACT = "auto"  # not quantised: at least as exact as the model's dtype
# Cheapest first: two products of 8 bits, then one. Nothing multiplies 4 bits any faster than 8 on
# current GPUs, so those are tried on request only.
CHEAPEST = ("int8+int8", "int8+fp8", "int8")


def pays(device: torch.device) -> bool:
    """Whether quantised products are expected to beat those of 16 bits on this device.

    Not on sm_100: its tensor cores take no int8 from Triton 3.6, which multiplies them by the older
    ``mma.sync``.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 10


@dataclass(frozen=True)
class HeadPrecisions:
    """The precision of each head of a layer.

    Args:
        names: For each head a ``precision`` of `block_sparse_attention`.

    Raises:
        ValueError: An unknown name.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in set(self.names):
            check_options(name, "auto")

    def heads(self, heads: slice) -> HeadPrecisions:
        """Those of some of the heads (tensor and context parallelism)."""
        return HeadPrecisions(self.names[heads])

    def groups(self) -> dict[str, list[int]]:
        """Precision -> the heads that have it."""
        found: dict[str, list[int]] = defaultdict(list)
        for head, name in enumerate(self.names):
            found[name].append(head)
        return dict(found)


def split_heads(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, tail: Tail | None, heads: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Blocks, Tail | None]:
    """One call for some of its heads.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Skv, H, D]``.
        v: Shape of k.
        blocks: Lists without an element rule, which would have to know the heads' numbers.
        tail: What stands in for hidden blocks.
        heads: Ascending.
    """
    index = head_index(tuple(heads), q.device)
    if list(heads) == list(range(heads[0], heads[-1] + 1)):
        q, k, v = (x[:, :, heads[0] : heads[-1] + 1] for x in (q, k, v))
    else:  # in the memory that carriers read fastest, as orders leave it
        q, k, v = (x.transpose(1, 2)[:, index].transpose(1, 2) for x in (q, k, v))
    return q, k, v, _blocks_of(blocks, tuple(heads)), _tail_of(tail, index)


@lru_cache(maxsize=1024)
def head_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of heads on a device; kept, because a GPU waits for each such copy."""
    with torch.inference_mode(False):
        return torch.tensor(heads, device=device)


# Lists of a plan serve many calls, and so do their parts.
_parts: weakref.WeakKeyDictionary[Blocks, dict[tuple[int, ...], Blocks]] = (
    weakref.WeakKeyDictionary()
)


def _blocks_of(blocks: Blocks, heads: tuple[int, ...]) -> Blocks:
    if blocks.mask_mod is not None:
        raise ValueError("precisions per head need block lists without an element rule")
    if blocks.full_kv_indices.shape[1] == 1:
        return blocks
    parts = _parts.setdefault(blocks, {})
    if heads not in parts:
        index = head_index(heads, blocks.device)
        parts[heads] = replace(
            blocks,
            full_kv_num_blocks=blocks.full_kv_num_blocks[:, index],
            full_kv_indices=blocks.full_kv_indices[:, index],
        )
    return parts[heads]


def _tail_of(tail: Tail | None, index: Tensor) -> Tail | None:
    if tail is None:
        return None
    if isinstance(tail, Rectified):
        return Rectified(tail.ratio[:, index], tail.shift[:, index])
    variance = None if tail.variance is None else tail.variance[:, :, index]
    return replace(
        tail, key=tail.key[:, :, index], value=tail.value[:, :, index], variance=variance
    )


class PrecisionMeter:
    """Measures what precisions cost in accuracy, and chooses by it.

    Args:
        candidates: Quantised precisions, cheapest first.
        max_error: Relative L2 error of a head's output that is still accepted.

    Raises:
        ValueError: A candidate is unknown, or the limit is not positive.
    """

    def __init__(self, candidates: Iterable[str] = CHEAPEST, max_error: float = 0.02) -> None:
        self.candidates = tuple(candidates)
        for name in self.candidates:
            check_name("precision", name, ("auto", *PRECISIONS))
        if not self.candidates:
            raise ValueError("precision=(): give at least one to try, or 'auto'")
        if not max_error > 0:
            raise ValueError(f"max_error={max_error}: it is a relative error above 0, such as 0.02")
        self.max_error = max_error
        # Layer -> precision -> worst error so far of each head.
        self.errors: dict[int, dict[str, Tensor]] = {}

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> None:
        """Compare every candidate with the exact result of a call, tokens in their order.

        Args:
            layer: Layer index.
            q: ``[B, Sq, H, D]``.
            k: ``[B, Skv, H, D]``.
            v: Shape of k.
            blocks: What the call sees.
        """
        worst = self.errors.setdefault(layer, {})
        exact = block_sparse_attention(q.float(), k.float(), v.float(), blocks, precision="fp32")
        for name in self.candidates:
            error = head_errors(block_sparse_attention(q, k, v, blocks, precision=name), exact)
            worst[name] = torch.maximum(worst[name], error) if name in worst else error

    def choose(self, layer: int) -> HeadPrecisions:
        """The first candidate of each head that keeps the limit; `EXACT` where none does."""
        errors = self.errors[layer]
        heads = len(next(iter(errors.values())))
        return HeadPrecisions(
            tuple(
                next((n for n in self.candidates if errors[n][head] <= self.max_error), EXACT)
                for head in range(heads)
            )
        )


def head_errors(out: Tensor, exact: Tensor) -> Tensor:
    """Relative L2 error of each head, that of the worst sample.

    Args:
        out: ``[B, S, H, D]``.
        exact: Same shape; a head of zeros has the norm of ``out`` as its error.

    Returns:
        ``[H]`` on the CPU.
    """
    wrong = torch.linalg.vector_norm(out.to(exact.dtype) - exact, dim=(1, 3))
    norm = torch.linalg.vector_norm(exact, dim=(1, 3))
    return (wrong / norm.masked_fill(norm == 0, 1)).amax(0).cpu()
