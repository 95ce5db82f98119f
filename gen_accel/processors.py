"""The policies users install: what to run sparse, and how. They are settings, not modules."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from gen_accel import natten, sage
from gen_accel.dense import KINDS
from gen_accel.kernels.api import check_name, check_options
from gen_accel.order.curve import CurveOrder
from gen_accel.order.raster import RasterOrder
from gen_accel.plan import BLOCK_SIZES, AttentionPlan
from gen_accel.planner.base import Planner
from gen_accel.planner.calibrated import CalibratedPlanner
from gen_accel.planner.every import EveryPlanner
from gen_accel.planner.pooled import PooledPlanner
from gen_accel.planner.window import WindowPlanner, WindowSetting
from gen_accel.recorder import Measurement
from gen_accel.schedule import Schedule
from gen_accel.select.gna import RIMS
from gen_accel.select.pooled import PooledSetting
from gen_accel.select.presets import spaattn_preset
from gen_accel.tail import TailSetting


@dataclass(eq=False, repr=False, kw_only=True)
class Policy:
    """What all policies share; use `ParoProcessor` or `GnaProcessor`.

    Args:
        dense_steps: First share of the denoising steps that stays dense.
        dense_last_steps: Last share of the steps that stays dense.
        dense_layers: Layers that stay dense; negative indices count from the last.
        min_tokens: Shorter sequences stay dense.
        precision: Numbers the carrier computes in: ``"auto"``, ``"fp32"``, ``"bf16"``, ``"fp16"``,
            or quantised: ``"int8"``, ``"int8+fp8"``, ``"int8+int8"``, ``"int4"``, ``"int4+int4"``
            (docs/precision.md). ``"auto"`` is what the plan says, or the model's dtype.
        tail: What stands in for the blocks that were dropped: ``"drop"`` (nothing),
            ``"rectified"``, ``"rectified+gapr"``, ``"joint"``, ``"joint/4"`` (four
            stand-ins per block), ``"joint+variance"``, or a `gen_accel.tail.TailSetting`.
        impl: Carrier; ``"auto"`` picks the fastest that runs here.
        dense: What computes the dense steps and layers: ``"stock"`` (the pipeline's own kernel),
            ``"sage"`` (SageAttention, on CUDA), or a quantised precision such as ``"int8+int8"``.
        check_finite: Raise at the first attention call whose q, k or v hold a NaN or an infinity,
            naming tensor and layer; costs a pass over them.
        grid: Token grid ``(frames, height, width)`` after patchify, needed only when the processor
            is set on a transformer directly, where the grid cannot be seen.
    """

    dense_steps: float = 0.2
    dense_last_steps: float = 0.0
    dense_layers: tuple[int, ...] = ()
    min_tokens: int = 4096
    tail: str | TailSetting = "drop"
    precision: str = "auto"
    impl: str = "auto"
    dense: str = "stock"
    check_finite: bool = False
    grid: tuple[int, int, int] | None = None
    preferred: ClassVar[str] = "auto"  # what precision="auto" is where a kernel for it runs
    _libraries: ClassVar[tuple[str, ...]] = ()  # beside the carriers, what impl may name
    _direct: Any = field(default=None, init=False, repr=False)

    # diffusers writes these on whatever processor stands on a module; see FamilyProcessor.
    _attention_backend = None
    _parallel_config = None

    def __post_init__(self) -> None:
        self.dense_layers = tuple(self.dense_layers)
        self.schedule()
        self.tail_setting()
        check_options(self.precision, self.impl, self._libraries)
        check_name("dense", self.dense, KINDS)
        if self.dense == "sage" and (reason := sage.missing()):
            raise ValueError(f"dense='sage': {reason}")
        if self.grid is not None and (len(self.grid) != 3 or min(self.grid) < 1):
            raise ValueError(f"grid={self.grid}: give (frames, height, width), each at least 1")

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

    def tail_setting(self) -> TailSetting:
        """What stands in for hidden blocks."""
        return TailSetting.parse(self.tail)

    def engine_settings(self) -> dict[str, Any]:
        """The arguments of an `Engine` that follow from the policy alone."""
        return {
            "schedule": self.schedule(),
            "tail": self.tail_setting(),
            "precision": self.precision,
            "preferred": self.preferred,
            "impl": self.impl,
            "dense": self.dense,
            "check_finite": self.check_finite,
        }

    def planner(
        self, name: str, model: str, layers: int, plan: AttentionPlan | None = None
    ) -> Planner:
        """What decides for one transformer.

        Args:
            name: Component name in the pipeline.
            model: Model string, see `gen_accel.plan.ComponentPlan`.
            layers: Number of attention modules.
            plan: The policy's plan, loaded.
        """
        raise NotImplementedError

    def load_plan(self) -> AttentionPlan | None:
        """The plan to execute, or None where there is none to load."""
        return None

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
        denoising steps: a layer that has to calibrate is dense in its first call.
        """
        from gen_accel.direct import DirectCalls

        if self._direct is None:
            self._direct = DirectCalls(self)
        rope = rotary_emb if rotary_emb is not None else image_rotary_emb
        return self._direct(attn, hidden_states, encoder_hidden_states, attention_mask, rope)


@dataclass(eq=False, repr=False, kw_only=True)
class ParoProcessor(Policy):
    """PAROAttention: an axis order per head and a static block mask (arXiv 2506.16054).

    ``pipe.set_attn_processor(ParoProcessor())`` is all a user writes. Without a plan the processor
    calibrates itself: the first steps run dense, and the last of them is watched for the order and
    the blocks of every head. The rest of the run is sparse; later runs reuse the plan.

    On a GPU, ``precision="auto"`` without a plan that says otherwise is ``"int8"`` for models in
    half precision, where the kernel takes the call.

    The calibration is our reconstruction: the authors published their kernels, not the code that
    chooses orders and masks.

    Args:
        density: Share of the video-to-video blocks to keep, in (0, 1]. Text is always attended to.
        plan: An `AttentionPlan` or the path of one; None calibrates during the run.
        block: Tokens per block (16, 32, 64, 128); None picks by length.
        order: ``"axis"``, the paper's, one of six for each head; ``"curve"``, a space-filling curve
            for all; ``"raster"``, the model's own, for comparison.
        criterion: How an order is chosen, ``"mass"`` or ``"paper"``.
        rows_per_block: Query rows sampled per block when calibrating; None takes all.

    The other arguments are those of `Policy`.
    """

    preferred: ClassVar[str] = "int8"

    density: float = 0.3
    plan: AttentionPlan | str | os.PathLike[str] | None = None
    block: int | None = None
    order: str = "axis"
    criterion: str = "mass"
    rows_per_block: int | None = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.measurement()
        if self.plan is not None and not isinstance(self.plan, (AttentionPlan, str, os.PathLike)):
            raise TypeError(f"plan={self.plan!r}: give an AttentionPlan, a path, or None")

    def measurement(self) -> Measurement:
        """How to calibrate."""
        return Measurement(
            self.density, self.block, self.order, self.criterion, self.rows_per_block
        )

    def planner(  # noqa: D102
        self, name: str, model: str, layers: int, plan: AttentionPlan | None = None
    ) -> Planner:
        return CalibratedPlanner(name, model, layers, self.schedule(), self.measurement(), plan)

    def load_plan(self) -> AttentionPlan | None:
        """The plan to execute, read from its file when it was given as a path."""
        if self.plan is None or isinstance(self.plan, AttentionPlan):
            return self.plan
        return AttentionPlan.load(self.plan)


@dataclass(eq=False, repr=False, kw_only=True)
class GnaProcessor(Policy):
    """Generalized neighborhood attention: a window on the token grid (arXiv 2504.16922).

    Needs no calibration: the blocks follow from the geometry. Tokens are put into tiles, so that a
    window is a box of whole blocks.

    Args:
        window: Keys per axis, as ``(frames, height, width)``, ``(height, width)`` for an image or
            one number for all; ``-1`` is a whole axis. ``"auto"`` takes a perfectly block-sparse
            window of the density. A sequence of `gen_accel.select.window.Window` gives each head
            its own; a mapping from layer to any of these gives each layer its own, the others
            being ``"auto"``.
        stride: Queries per axis that share a window.
        dilation: Distance of neighbouring keys per axis.
        causal: No key after the query, per axis.
        density: Share of the video keys to see where ``window`` is ``"auto"``.
        tile: Tokens per tile, ``"auto"`` picks.
        block: Places per tile; None takes the tile's volume.
        border: ``"shift"``, GNA's rule, or ``"snap"``, which stays block-sparse on ragged grids and
            is not GNA.
        rim: ``"mask"``, GNA; ``"whole"`` sees the blocks that a window touches whole. None: whole
            where a tail stands in for the rest, for then dense attention is what is wanted.
        impl: Also ``"natten"``: NATTEN's kernels, where it is installed with them, for calls on
            CUDA without text and with one window for all heads.

    The other arguments are those of `Policy`.
    """

    _libraries = ("natten",)

    window: Any = "auto"
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    causal: bool | Sequence[bool] = False
    density: float = 0.25
    tile: str | Sequence[int] = "auto"
    block: int | None = None
    border: str = "shift"
    rim: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(
                f"density={self.density}: the kept share lies in (0, 1]; 0.25 keeps a quarter"
            )
        if isinstance(self.window, str) and self.window != "auto":
            raise ValueError(f"window={self.window!r}: give sizes per axis, Windows, or 'auto'")
        if self.rim not in (None, *RIMS):
            raise ValueError(f"rim={self.rim!r}: choose from {', '.join(map(repr, RIMS))}, or None")
        if self.impl == "natten":
            for name, given, only in (
                ("precision", self.precision, "auto"),
                ("border", self.border, "shift"),
                ("tail", self.tail_setting().kind, "drop"),
                ("rim", self.rim or "mask", "mask"),
            ):
                if given != only:
                    raise ValueError(
                        f"{name}={given!r}: NATTEN has {name}={only!r} only; use impl='auto'"
                    )

    def planner(  # noqa: D102
        self, name: str, model: str, layers: int, plan: AttentionPlan | None = None
    ) -> Planner:
        settings = {f.name: getattr(self, f.name) for f in fields(WindowSetting)}
        settings["rim"] = self.rim or ("mask" if self.tail_setting().kind == "drop" else "whole")
        setting = WindowSetting(**settings)
        if self.impl == "natten" and (reason := natten.missing()):  # before the dense steps
            raise ValueError(f"impl='natten': {reason}")
        return WindowPlanner(setting, layers, self.impl != "natten", self.min_tokens)


_SHARED_ORDERS = {"curve": CurveOrder, "raster": RasterOrder}


@dataclass(eq=False, repr=False, kw_only=True)
class SpaAttnProcessor(Policy):
    """Rectified SpaAttn: blocks chosen per call from pooled means, the rest compensated.

    After arXiv 2511.19835; our reconstruction from the authors' public code, with its faults mended
    (docs/spaattn.md lists them). Tokens stand on a space-filling curve. `preset` has the authors'
    settings of each model.

    Args:
        density: Share of the video key blocks that every query block chooses, in (0, 1]; or pairs
            ``(from, density)`` over the run. The authors' "drop rate" is one minus that.
        top_p: Also choose until this share of the estimated mass is reached.
        block: Tokens per block; None picks by length, the authors have 128.
        order: ``"curve"``, or ``"raster"`` for comparison.
        parts: Means per block that the scores are made of; 1 is the authors'.
        budget: ``"row"``, the authors'; ``"layer"``, all rows and heads of a call share one.
        neighbours: Always see blocks that hold a neighbour of one's own tokens.
        first_frame: Blocks with tokens of the first frame see each other.
        inside: Neighbours count towards the density; the authors' come on top.
        refresh: Denoising steps that share their lists.

    The other arguments are those of `Policy`; ``tail`` is ``"rectified+gapr"`` here.
    """

    density: float | Sequence[tuple[float, float]] = 0.25
    top_p: float = 0.3
    block: int | None = None
    order: str = "curve"
    parts: int = 1
    budget: str = "row"
    neighbours: bool = True
    first_frame: bool = False
    inside: bool = False
    refresh: int = 1
    tail: str | TailSetting = "rectified+gapr"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pooled_setting()
        _check_block(self.block)
        if self.order not in _SHARED_ORDERS:
            raise ValueError(f"order={self.order!r}: choose 'curve' or 'raster'")

    @classmethod
    def preset(cls, model: str, **changes: Any) -> SpaAttnProcessor:
        """The authors' setting of a model, e.g. ``"wan2.1-t2v-14b"``.

        Args:
            model: One of `gen_accel.select.presets.SPAATTN`.
            **changes: Settings to change.

        Raises:
            ValueError: There is no such preset; the message lists them.
        """
        return cls(**{**spaattn_preset(model), **changes})

    def pooled_setting(self) -> PooledSetting:
        """How blocks are chosen."""
        names = [f.name for f in fields(PooledSetting) if hasattr(self, f.name)]
        return PooledSetting(**{name: getattr(self, name) for name in names})

    def planner(  # noqa: D102
        self, name: str, model: str, layers: int, plan: AttentionPlan | None = None
    ) -> Planner:
        order = _SHARED_ORDERS[self.order]()
        return PooledPlanner(self.pooled_setting(), order, self.block, layers)


@dataclass(eq=False, repr=False, kw_only=True)
class SparseProcessor(Policy):
    """Any order, with any selection, with any tail.

    The defaults were among the nearest to dense clips on our trained toy, and need no calibration;
    docs/methods.md has the tables. No published checkpoint was measured.

    Args:
        order: ``"axis"``, one of six for each head (static selection); ``"curve"`` or ``"raster"``,
            one for all; ``"tile"`` (windows). None takes the first of these that the selection has.
        select: ``"pooled"``, chosen per call; ``"static"``, masks calibrated in the dense first
            steps; ``"window"``, geometry; ``"all"``, no block is dropped.
        density: Share of the video blocks to see, in (0, 1].
        block: Tokens per block; None picks by length.
        plan: Of static selection: an `AttentionPlan` or the path of one; None calibrates.
        parts: Of pooled selection: means per block that the scores are made of.
        budget: Of pooled selection: ``"row"`` or ``"layer"``, see
            `gen_accel.select.pooled.PooledSetting`.
        neighbours: Of pooled selection: always see blocks that hold a neighbour of one's own
            tokens; few blocks have room for that.
        refresh: Of pooled selection: denoising steps that share their lists.

    The other arguments are those of `Policy`.
    """

    order: str | None = None
    select: str = "pooled"
    density: float = 0.2
    block: int | None = None
    plan: AttentionPlan | str | os.PathLike[str] | None = None
    parts: int = 4
    budget: str = "row"
    neighbours: bool = False
    refresh: int = 1
    tail: str | TailSetting = "joint/4"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select not in _MIXTURES:
            raise ValueError(f"select={self.select!r}: choose {', '.join(map(repr, _MIXTURES))}")
        if self.order is None:
            self.order = _MIXTURES[self.select][0]
        if self.order not in _MIXTURES[self.select]:
            raise ValueError(
                f"order={self.order!r} with select={self.select!r}: its orders are "
                f"{', '.join(map(repr, _MIXTURES[self.select]))}"
            )
        if self.plan is not None and self.select != "static":
            raise ValueError(f"plan=... with select={self.select!r}: only static masks have a plan")
        _check_block(self.block)
        self._as_policy()

    def _as_policy(self) -> Policy:
        """The policy that does this."""
        assert self.order is not None
        shared = {f.name: getattr(self, f.name) for f in fields(Policy) if f.init}
        shared["tail"] = self.tail
        if self.select == "static":
            return ParoProcessor(
                order=self.order, density=self.density, block=self.block, plan=self.plan, **shared
            )
        if self.select == "window":
            return GnaProcessor(density=self.density, block=self.block, **shared)
        return SpaAttnProcessor(
            order=self.order,
            density=self.density,
            block=self.block,
            parts=self.parts,
            budget=self.budget,
            neighbours=self.neighbours,
            refresh=self.refresh,
            top_p=0.0,
            inside=True,
            **shared,
        )

    def load_plan(self) -> AttentionPlan | None:
        """The plan to execute, read from its file when it was given as a path."""
        return self._as_policy().load_plan()

    def planner(  # noqa: D102
        self, name: str, model: str, layers: int, plan: AttentionPlan | None = None
    ) -> Planner:
        if self.select == "all":
            return EveryPlanner(self.block, layers)
        return self._as_policy().planner(name, model, layers, plan)


_MIXTURES = {
    "static": ("axis", "curve", "raster"),
    "pooled": ("curve", "raster"),
    "window": ("tile",),
    "all": ("raster",),
}


def _check_block(block: int | None) -> None:
    if block is not None and block not in BLOCK_SIZES:
        raise ValueError(
            f"block={block}: choose one of {', '.join(map(str, BLOCK_SIZES))}, or None"
        )


def add_pipeline_method() -> None:
    """Give `DiffusionPipeline` a ``set_attn_processor``, unless diffusers has grown one.

    This runs when a processor class is first imported from gen_accel, so that the line
    ``pipe.set_attn_processor(ParoProcessor())`` works on every stock pipeline.
    """
    if importlib.util.find_spec("diffusers") is None:  # in ComfyUI
        return
    from diffusers import DiffusionPipeline

    if hasattr(DiffusionPipeline, "set_attn_processor"):
        return

    def set_attn_processor(self: Any, processor: Any) -> Any:
        """Install a gen_accel processor on every transformer; returns its `gen_accel.Handle`."""
        from gen_accel.install import apply

        return apply(self, processor)

    DiffusionPipeline.set_attn_processor = set_attn_processor  # type: ignore[attr-defined]
