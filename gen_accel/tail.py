"""What happens to the blocks that were dropped: a setting, and the tensors it makes per call."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.tail import (
    GAPR,
    BlockScores,
    Tail,
    block_scores,
    pool_keys,
    rectify,
)

KINDS = ("drop", "rectified", "joint")
PARTS = (1, 2, 4, 8, 16)  # of a block
NAMES = ("drop", "rectified", "rectified+gapr", "joint", "joint+variance")


def check_parts(parts: int) -> None:
    """Raise ValueError unless blocks of every size fall into so many equal parts."""
    if parts not in PARTS:
        raise ValueError(
            f"parts={parts}: one of {', '.join(map(str, PARTS))}, for the smallest blocks have 16 "
            "tokens"
        )


@dataclass(frozen=True)
class TailSetting:
    """What stands in for hidden blocks; see `gen_accel.kernels.tail` for the formulas.

    Args:
        kind: ``"drop"``, nothing; ``"rectified"``, a ratio and a shift per query block;
            ``"joint"``, mean keys in the same softmax.
        gapr: Of the rectified tail: which blocks are compensated, ``None`` (all), ``"code"`` or
            ``"paper"``.
        smooth: Subtract the mean key before GAPR's test, which otherwise depends on a constant
            that attention does not see. The authors do not.
        parts: Of the joint tail: stand-ins per block, one for each of so many equal parts of it; a
            power of two up to 16. Blocks that it does not divide (windows have some of 110 tokens)
            have half or a quarter as many.
        variance: Of the joint tail: add the second-order term of the keys' variance.
    """

    kind: str = "drop"
    gapr: str | None = None
    smooth: bool = True
    parts: int = 1
    variance: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: choose from {', '.join(map(repr, KINDS))}")
        if self.gapr not in (None, *GAPR):
            raise ValueError(f"gapr={self.gapr!r}: choose None, 'code' or 'paper'")
        if self.gapr is not None and self.kind != "rectified":
            raise ValueError(f"gapr={self.gapr!r} belongs to kind='rectified', not {self.kind!r}")
        if (self.parts != 1 or self.variance) and self.kind != "joint":
            raise ValueError(f"parts and variance belong to kind='joint', not {self.kind!r}")
        check_parts(self.parts)

    @classmethod
    def parse(cls, value: str | TailSetting) -> TailSetting:
        """A setting from one of `NAMES`, or the setting itself.

        ``"joint/4"`` makes four stand-ins of every block, ``"joint/4+variance"`` with variances.

        Raises:
            ValueError: An unknown name.
            TypeError: Neither a name nor a setting.
        """
        if isinstance(value, TailSetting):
            return value
        if not isinstance(value, str):
            raise TypeError(f"tail={value!r}: give one of {', '.join(NAMES)} or a TailSetting")
        words, _, extra = value.partition("+")
        kind, slash, parts = words.partition("/")
        plain = f"{kind}+{extra}" if extra else kind
        if plain not in NAMES or (slash and not (kind == "joint" and parts.isdigit())):
            near = difflib.get_close_matches(value, NAMES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"tail={value!r}: choose from {', '.join(map(repr, NAMES))}, 'joint/4' for "
                f"four stand-ins per block{hint}"
            )
        return cls(
            kind,
            gapr="code" if extra == "gapr" else None,
            parts=int(parts) if slash else 1,
            variance=extra == "variance",
        )

    def make(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Blocks,
        *,
        pooled: int,
        real: Tensor | None = None,
        scores: BlockScores | None = None,
    ) -> Tail | None:
        """The tail of one call, or None where nothing stands in.

        Args:
            q: ``[B, Sq, H, D]``, ordered.
            k: ``[B, Skv, H, D]``.
            v: Shape of k.
            blocks: What the call sees.
            pooled: Leading keys that may be hidden.
            real: bool ``[pooled]``, those of them that exist; None: all.
            scores: Scores of whole blocks that the selection already has.

        """
        if self.kind == "drop" or pooled == 0:
            return None
        if self.kind == "joint":
            return pool_keys(
                k[:, :pooled],
                v[:, :pooled],
                blocks.block_kv,
                per_block=math.gcd(self.parts, blocks.block_kv),
                real=real,
                variance=self.variance,
            )
        if scores is None or self.gapr is not None:
            keys = k - k.mean(1, keepdim=True) if self.gapr is not None and self.smooth else k
            scores = block_scores(
                q,
                keys,
                blocks.block_q,
                blocks.block_kv,
                pooled=pooled,
                scale=q.shape[-1] ** -0.5,
                real=real,
                gapr=self.gapr is not None,
            )
        return rectify(v, blocks, scores, pooled=pooled, gapr=self.gapr, real=real)
