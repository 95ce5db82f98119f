"""Where the tokens of one attention call stand, and when in the run it happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Unsupported(Exception):
    """A family cannot describe this call; it stays dense, and this is the reason."""


class TokenGrid(NamedTuple):
    """Video tokens after patchify, raster order: frames slowest, then height, then width.

    An image is a grid with ``frames=1``.
    """

    frames: int
    height: int
    width: int

    @property
    def numel(self) -> int:
        """Number of video tokens, F*H*W."""
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class TokenLayout:
    """The sequence of a joint attention call: ``[text_before, F*H*W video, text_after]``.

    Args:
        grid: Video tokens.
        text_before: Text tokens in front of the video (FLUX).
        text_after: Text tokens behind it (HunyuanVideo).
        text_valid: For each sample, how many of the text tokens are real; the real ones come first.
            None means all of them. Padding is never attended to.
    """

    grid: TokenGrid
    text_before: int = 0
    text_after: int = 0
    text_valid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise ValueError(f"grid={self.grid}: every axis needs at least one token")
        if self.text_before < 0 or self.text_after < 0:
            raise ValueError("text_before and text_after count tokens and cannot be negative")
        if self.text_valid is not None and self.text_before:
            raise ValueError("text_valid is for padded text behind the video (text_after)")

    @property
    def text(self) -> int:
        """Number of text tokens, padding included."""
        return self.text_before + self.text_after

    @property
    def tokens(self) -> int:
        """Length of the whole sequence."""
        return self.grid.numel + self.text


@dataclass
class ForwardContext:
    """What one forward of the transformer knows about itself: plain numbers, set once per call.

    Attributes:
        layout: Token layout of this forward, or None when the family could not tell.
        reason: Why ``layout`` is None.
        step: Index of the denoising step, or None when no scheduler is in sight.
        steps: Number of denoising steps of the run, or None.
        sigma: Noise level of the step, or None.
        branch: 0 for the first forward of a step (conditional), 1 for the second, ...
        run: Counts pipeline calls since the processors were installed.
    """

    layout: TokenLayout | None = None
    reason: str = ""
    step: int | None = None
    steps: int | None = None
    sigma: float | None = None
    branch: int = 0
    run: int = 0
