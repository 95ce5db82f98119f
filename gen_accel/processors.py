"""The policies users install: what to run sparse, and how. They are settings, not modules."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from gen_accel.plan import AttentionPlan
from gen_accel.planner import CalibratedPlanner
from gen_accel.recorder import Measurement
from gen_accel.schedule import Schedule


@dataclass(eq=False, repr=False)
class ParoProcessor:
    """PAROAttention: an axis order per head and a static block mask (arXiv 2506.16054).

    ``pipe.set_attn_processor(ParoProcessor())`` is all a user writes. Without a plan the processor
    calibrates itself: the first steps run dense, and the last of them is watched for the order and
    the blocks of every head. The rest of the run is sparse; later runs reuse the plan.

    The calibration is our reconstruction: the authors published their kernels, not the code that
    chooses orders and masks.

    Args:
        density: Share of the video-to-video blocks to keep, in (0, 1]. Text is always attended to.
        plan: An `AttentionPlan` or the path of one; None calibrates during the run.
        dense_steps: First share of the denoising steps that stays dense.
        dense_last_steps: Last share of the steps that stays dense.
        dense_layers: Layers that stay dense; negative indices count from the last.
        min_tokens: Shorter sequences stay dense.
        block: Tokens per block (16, 32, 64, 128); None picks by length.
        reorder: False keeps raster order, for comparison.
        criterion: How an order is chosen, ``"mass"`` or ``"paper"``.
        rows_per_block: Query rows sampled per block when calibrating; None takes all.
        precision: Numbers the carrier computes in: ``"auto"`` (the model's), ``"fp32"``,
            ``"bf16"``, ``"fp16"``.
        impl: Carrier; ``"auto"`` picks the fastest that runs here.
        grid: Token grid ``(frames, height, width)`` after patchify, needed only when the processor
            is set on a transformer directly, where the grid cannot be seen.
    """

    density: float = 0.3
    plan: AttentionPlan | str | os.PathLike[str] | None = None
    dense_steps: float = 0.2
    dense_last_steps: float = 0.0
    dense_layers: tuple[int, ...] = ()
    min_tokens: int = 4096
    block: int | None = None
    reorder: bool = True
    criterion: str = "mass"
    rows_per_block: int | None = 16
    precision: str = "auto"
    impl: str = "auto"
    grid: tuple[int, int, int] | None = None
    _direct: Any = field(default=None, init=False, repr=False)

    # diffusers writes these on whatever processor stands on a module; see FamilyProcessor.
    _attention_backend = None
    _parallel_config = None

    def __post_init__(self) -> None:
        self.dense_layers = tuple(self.dense_layers)
        self.schedule()
        self.measurement()
        if self.grid is not None and (len(self.grid) != 3 or min(self.grid) < 1):
            raise ValueError(f"grid={self.grid}: give (frames, height, width), each at least 1")
        if self.plan is not None and not isinstance(self.plan, (AttentionPlan, str, os.PathLike)):
            raise TypeError(f"plan={self.plan!r}: give an AttentionPlan, a path, or None")

    def __repr__(self) -> str:
        changed = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.init and getattr(self, f.name) != f.default
        )
        return f"{type(self).__name__}({', '.join(changed)})"

    def schedule(self) -> Schedule:
        """Which calls stay dense."""
        return Schedule(self.dense_steps, self.dense_last_steps, self.dense_layers, self.min_tokens)

    def measurement(self) -> Measurement:
        """How to calibrate."""
        return Measurement(
            self.density, self.block, self.reorder, self.criterion, self.rows_per_block
        )

    def planner(
        self, name: str, model: str, layers: int, plan: AttentionPlan | None = None
    ) -> CalibratedPlanner:
        """What decides for one transformer; arguments as `CalibratedPlanner`."""
        return CalibratedPlanner(name, model, layers, self.schedule(), self.measurement(), plan)

    def load_plan(self) -> AttentionPlan | None:
        """The plan to execute, read from its file when it was given as a path."""
        if self.plan is None or isinstance(self.plan, AttentionPlan):
            return self.plan
        return AttentionPlan.load(self.plan)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Serve as a diffusers attention processor that was set on a transformer directly.

        `gen_accel.apply` and ``pipe.set_attn_processor`` do not come here: they put one processor
        of the right family on each module. Here the module's family is found per call,
        cross-attention and token refiners go to their stock processor, and there is no view of the
        denoising steps: a layer's first call is dense and calibrates, the next ones are sparse.
        """
        from gen_accel.direct import DirectCalls

        if self._direct is None:
            self._direct = DirectCalls(self)
        rope = rotary_emb if rotary_emb is not None else image_rotary_emb
        return self._direct(attn, hidden_states, encoder_hidden_states, attention_mask, rope)


def _add_pipeline_method() -> None:
    """Give `DiffusionPipeline` a ``set_attn_processor``, unless diffusers has grown one.

    This runs when a processor class is first imported from gen_accel, so that the line
    ``pipe.set_attn_processor(ParoProcessor())`` works on every stock pipeline.
    """
    from diffusers import DiffusionPipeline

    if hasattr(DiffusionPipeline, "set_attn_processor"):
        return

    def set_attn_processor(self: Any, processor: Any) -> Any:
        """Install a gen_accel processor on every transformer; returns its `gen_accel.Handle`."""
        from gen_accel.install import apply

        return apply(self, processor)

    DiffusionPipeline.set_attn_processor = set_attn_processor  # type: ignore[attr-defined]


_add_pipeline_method()
