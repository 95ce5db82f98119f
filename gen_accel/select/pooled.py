"""Pooled selection: per call, the key blocks whose means say that they get attention.

After Rectified SpaAttn (arXiv 2511.19835), whose rule is that of Jenga; our reconstruction from the
public code. Beyond it: sub-block scores, a threshold instead of ranks, one budget for all rows of a
layer, lists that are kept for some steps, densities that change in the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.kernels.route import route
from gen_accel.kernels.tail import BlockScores
from gen_accel.tail import check_parts

BUDGETS = ("row", "layer")


@dataclass(frozen=True)
class PooledSetting:
    """How blocks are chosen.

    Args:
        density: Share of the video key blocks to choose, in (0, 1]; or pairs ``(from, density)``,
            each for the part of the run that begins there, e.g. ``((0, 0.3), (0.5, 0.2))``.
        top_p: Also choose until this share of the estimated mass is reached; 0 never does.
        beta: Choose what scores above ``mean + beta * std`` of the row's log scores instead; the
            density then follows from the data. Needs no sort.
        parts: Means per block the scores are made of: 1, the paper's; 4, 16 scores per pair.
        budget: ``"row"``, every query block chooses as many; ``"layer"``, all rows and heads of a
            call share one budget, and the heaviest blocks win wherever they are.
        neighbours: Always see blocks that hold a neighbour (of 26) of one's own tokens.
        first_frame: Blocks with tokens of the first frame see each other.
        inside: Forced blocks count towards the density; the paper's come on top.
        refresh: Denoising steps that share their lists.
    """

    density: float | Sequence[tuple[float, float]] = 0.25
    top_p: float = 0.0
    beta: float | None = None
    parts: int = 1
    budget: str = "row"
    neighbours: bool = True
    first_frame: bool = False
    inside: bool = True
    refresh: int = 1

    def __post_init__(self) -> None:
        for _, density in self._densities():
            if not 0 < density <= 1:
                raise ValueError(
                    f"density={density}: the kept share lies in (0, 1]; 0.25 keeps a quarter"
                )
        if not 0 <= self.top_p < 1:
            raise ValueError(f"top_p={self.top_p}: a share of the mass, 0 <= top_p < 1")
        check_parts(self.parts)
        if self.refresh < 1:
            raise ValueError(f"refresh={self.refresh}: lists serve at least the step they are of")
        if self.budget not in BUDGETS:
            raise ValueError(f"budget={self.budget!r}: choose 'row' or 'layer'")
        if self.budget == "layer" and (self.top_p or self.beta is not None):
            raise ValueError("budget='layer' chooses by rank: leave top_p=0 and beta=None")

    @property
    def by_rank(self) -> bool:
        """Whether every row chooses as many blocks, those with the most mass."""
        return self.budget == "row" and not self.top_p and self.beta is None

    def _densities(self) -> list[tuple[float, float]]:
        if isinstance(self.density, (int, float)):
            return [(0.0, float(self.density))]
        pairs = [(float(start), float(density)) for start, density in self.density]
        if not pairs or pairs[0][0] > 0 or pairs != sorted(pairs):
            raise ValueError(
                f"density={self.density}: pairs (from, density) begin at 0 and ascend, as in "
                "((0, 0.3), (0.5, 0.2))"
            )
        return pairs

    def density_at(self, progress: float) -> float:
        """The density at a share of the run, 0..1."""
        return [density for start, density in self._densities() if start <= progress][-1]


def choose_blocks(
    scores: BlockScores, setting: PooledSetting, density: float, forced: Tensor | None = None
) -> Tensor:
    """Which pooled key blocks each query block sees.

    Args:
        scores: Estimated masses, ``[B, H, rows, N]``, and those of the text.
        setting: The rule.
        density: Share of the N blocks to choose.
        forced: bool, broadcasts to the masses; blocks that are seen in any case.

    Returns:
        bool ``[B, H, rows, N]``; every row sees at least one block.
    """
    mass = scores.video
    number = mass.shape[-1]
    ranked = mass
    if forced is not None and setting.inside:
        ranked = mass.masked_fill(forced, 2.0)  # ahead of every mass
    keep = max(1, round(density * number))
    if keep >= number:  # the text must not take a block's place
        return torch.ones_like(mass, dtype=torch.bool)
    if setting.beta is not None:
        chosen = _above(mass, setting.beta)
    elif setting.budget == "layer":
        chosen = _heaviest(ranked, density)
    else:
        chosen = _first(ranked, scores, keep, setting.top_p)
    return chosen if forced is None else chosen | forced


def choose_lists(
    scores: BlockScores,
    setting: PooledSetting,
    density: float,
    forced: Tensor | None,
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor]:
    """`choose_blocks` for settings that choose by rank alone (`PooledSetting.by_rank`), as lists.

    Nothing is sorted and no mask is made where `route` is a kernel. Of equal masses the first block
    is chosen.

    Args:
        scores: As above.
        setting: The rule.
        density: Share of the N blocks to choose.
        forced: As above.
        rows: Query blocks of the sequence; those behind the video's see everything.
        columns: Key blocks; those behind the video's are seen by everything.

    Returns:
        Counts and lists of a `gen_accel.kernels.blocks.Blocks`.
    """
    mass, number = scores.video.float(), scores.video.shape[-1]
    if forced is not None and setting.inside:
        mass = mass.masked_fill(forced, 2.0)  # ahead of every mass
    mass = F.pad(mass, (0, columns - number, 0, rows - number), value=-torch.inf)
    seen = torch.ones(rows, columns, dtype=torch.bool, device=mass.device)
    seen[:number, :number] = False if forced is None else forced
    return route(mass, keep=max(1, round(density * number)), forced=seen)


def _first(ranked: Tensor, scores: BlockScores, keep: int, top_p: float) -> Tensor:
    """The first ``max(keep, count of top_p)`` of every row; the text competes as one column."""
    number = ranked.shape[-1]
    if not top_p:
        return torch.zeros_like(ranked, dtype=torch.bool).scatter_(
            -1, ranked.topk(min(keep, number), -1).indices, True
        )
    columns = torch.cat([ranked, scores.text[..., None]], -1)
    order = columns.argsort(dim=-1, descending=True, stable=True)
    mass = torch.cat([scores.video, scores.text[..., None]], -1).gather(-1, order)
    # A column is chosen while the mass before it has not passed top_p, which is the paper's count
    # of prefixes plus one.
    place = torch.arange(number + 1, device=ranked.device)
    before = mass.cumsum(-1) - mass
    first = (place < keep) | (before <= top_p)
    chosen = torch.zeros_like(columns, dtype=torch.bool).scatter_(-1, order, first)
    return chosen[..., :number]


def _above(mass: Tensor, beta: float) -> Tensor:
    score = mass.clamp_min(torch.finfo(mass.dtype).tiny).log()
    std, mean = torch.std_mean(score, -1, correction=0, keepdim=True)
    best = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.argmax(-1, True), True)
    return best | (score > mean + beta * std)


def _heaviest(ranked: Tensor, density: float) -> Tensor:
    """One budget per sample; every row keeps its heaviest block."""
    ranked = ranked.scatter(-1, ranked.argmax(-1, True), 3.0)
    flat = ranked.flatten(1)
    keep = max(flat.shape[1] // ranked.shape[-1], round(density * flat.shape[1]))
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    return chosen.scatter_(-1, flat.topk(keep, -1).indices, True).view_as(ranked)
