"""The knobs of Object-WIPER. The paper's values are not known: see docs/object_wiper.md."""

from __future__ import annotations

from dataclasses import dataclass, field

from gen_accel.pipelines.checks import check_flag, check_layers, check_number
from gen_accel.pipelines.effects import EffectSetting
from gen_accel.pipelines.flow import SOLVERS, check_solver
from gen_accel.pipelines.surgery import SCALINGS
from gen_accel.pipelines.value_store import Call

PRESERVES = ("none", "attn_v", "attn_kv", "latent", "freeze")
REINITS = ("none", "effects", "adaptive")


@dataclass(frozen=True, kw_only=True)
class WipeSetting:
    """How a removal runs.

    Args:
        steps: Steps of the inversion, and of the way back.
        solver: ``"midpoint"`` (two evaluations per step) or ``"euler"``.
        shift: Of the noise levels; None: the scheduler's. A large one makes the first steps from
            the data coarse, which an inversion of few steps does not survive; 1 spaces evenly.
        guidance_scale: Embedded guidance on the way back (HunyuanVideo's distilled models).
        inversion_guidance: Embedded guidance of the inversion.
        true_cfg_scale: Classifier-free guidance on the way back against ``negative_prompt``; 1 is
            off. The inversion has none.
        preserve: How the background is kept on the way back: ``"none"``; ``"attn_v"``, its
            attention values are those of the inversion (the paper's, as we read it);
            ``"attn_kv"``, its keys as well; ``"latent"``, its latents are; ``"freeze"``, keys,
            values and latents.
        scaling: What a scale multiplies: ``"key"``, the keys (the paper's), or ``"bias"``, the
            share of attention before normalisation.
        background_scale: For what the background sees of the object during inversion; 1 is off.
        foreground_scale: For what the foreground sees of the background on the way back; 1 is off.
        adaptive: Let the foreground grow with the noise, by how tokens respond to the object.
        growth: It grows only by tokens that respond this many times as much as the rest.
        reinit: Which tokens begin from fresh noise: ``"effects"``, the object and its effects;
            ``"adaptive"``, the grown foreground too; ``"none"``.
        find_effects: Look for effects; without, only what the mask covers is removed.
        effects: How effects are found.
        value_layers: Layers whose values are kept; None: all.
        value_steps: Of how many of the noisiest steps values are kept, at least 1; None: of all.
        offload_cache: Keep values in CPU memory.
        cache_limit: GiB that they may take; None: four fifths of what is free.
    """

    steps: int = 50
    solver: str = "midpoint"
    shift: float | None = None
    guidance_scale: float = 6.0
    inversion_guidance: float = 1.0
    true_cfg_scale: float = 1.0
    preserve: str = "attn_v"
    scaling: str = "key"
    background_scale: float = 0.8
    foreground_scale: float = 1.2
    adaptive: bool = True
    growth: float = 0.0
    reinit: str = "effects"
    find_effects: bool = True
    effects: EffectSetting = field(default_factory=EffectSetting)
    value_layers: tuple[int, ...] | None = None
    value_steps: int | None = None
    offload_cache: bool = True
    cache_limit: float | None = None

    def __post_init__(self) -> None:
        check_solver(self.solver)
        choices = {"preserve": PRESERVES, "scaling": SCALINGS, "reinit": REINITS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}"
                )
        check_number("steps", self.steps, low=1, whole=True)
        check_number("shift", self.shift, above=0, optional=True)
        for name in ("guidance_scale", "inversion_guidance", "true_cfg_scale"):
            check_number(name, getattr(self, name))
        for name in ("background_scale", "foreground_scale"):
            check_number(name, getattr(self, name), above=0)  # 1 is off
        check_number("growth", self.growth, low=0)
        # None kept would be preserve="none" by another name.
        check_number("value_steps", self.value_steps, low=1, whole=True, optional=True)
        check_number("cache_limit", self.cache_limit, low=0, optional=True)
        check_layers("value_layers", self.value_layers)
        for name in ("adaptive", "find_effects", "offload_cache"):
            check_flag(name, getattr(self, name))
        if not isinstance(self.effects, EffectSetting):
            raise TypeError(f"effects={self.effects!r}: give an EffectSetting")

    @property
    def evaluations(self) -> int:
        """Per step."""
        return 1 + SOLVERS.index(self.solver)

    def calls(self) -> frozenset[Call]:
        """The evaluations of the inversion whose values are kept."""
        if self.preserve not in ("attn_v", "attn_kv", "freeze"):
            return frozenset()
        kept = self.steps if self.value_steps is None else min(self.value_steps, self.steps)
        intervals = range(self.steps - kept, self.steps)
        return frozenset(Call(i, s) for i in intervals for s in range(self.evaluations))
