"""What our nodes put on a ComfyUI model: an attention override, and who tells it where it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gen_accel.comfy.call import AttentionCall
from gen_accel.comfy.layout import bind, token_layout
from gen_accel.comfy.run import Forward, PercentToSigma, Run, Span
from gen_accel.layout import Unsupported

if TYPE_CHECKING:
    from gen_accel.processors import Policy

KEY = "gen_accel"
OVERRIDE = "optimized_attention_override"
_OPTIONS = "transformer_options"
Override = Callable[..., Tensor]


@dataclass(eq=False)
class Patch:
    """The settings of our nodes on one model, and its runs.

    Attributes:
        policy: What to run sparse, and how; None leaves all attention dense.
        span: When in the run.
        dense: What computes self-attention that stays dense: one of `gen_accel.dense.KINDS`, or a
            function with the signature of ``optimized_attention``.
        profile: Time the parts of a run on GPUs too.
        before: Override that stood on the model already, or None.
        run: The current run.
        last: The last run that is over.
    """

    policy: Policy | None = None
    span: Span = field(default_factory=Span)
    dense: str | Override = "stock"
    profile: bool = False
    before: Override | None = field(default=None, init=False)
    run: Run | None = field(default=None, init=False)
    last: Run | None = field(default=None, init=False)
    percent_to_sigma: PercentToSigma | None = field(default=None, init=False)
    said: set[str] = field(default_factory=set, init=False)

    def begin(self) -> Run:
        """The current run, or a new one."""
        if self.run is None:
            from gen_accel.processors import SparseProcessor

            # Without a policy all is dense, and the engine is there for the dense kernel alone.
            policy = self.policy or SparseProcessor(select="all", min_tokens=0)
            span = self.span if self.policy else Span(1.0, 1.0)
            if isinstance(self.dense, str):
                policy = replace(policy, dense=self.dense)
            self.run = Run(policy, span, self.percent_to_sigma, self.said, self.profile)
        return self.run

    def finish(self) -> None:
        """The sampler is done."""
        if self.run is not None:
            self.run.finish()
            self.last, self.run = self.run, None


def install(model: Any, **settings: Any) -> Any:
    """A clone of a ComfyUI model with our settings; the others stay as an earlier node set them.

    Args:
        model: ``ModelPatcher``; it is not changed.
        **settings: Fields of `Patch`: policy, span, dense, profile.
    """
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    model = model.clone()
    options = model.model_options.setdefault(_OPTIONS, {})
    earlier: Patch | None = model.get_attachment(KEY)
    patch = Patch(**settings) if earlier is None else replace(earlier, **settings)
    patch.before = _foreign(options.get(OVERRIDE))

    # clone() deep-copies the options: functions are what survives that as itself.
    options[OVERRIDE] = override = _override(patch)
    model.set_attachments(KEY, patch)
    model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _wrapper(patch, override))

    def prepare(patcher: Any, *_: Any) -> None:  # later versions pass more
        sampling = patcher.get_model_object("model_sampling")
        patch.percent_to_sigma = getattr(sampling, "percent_to_sigma", None)

    def finish(*_: Any) -> None:
        patch.finish()

    for event, function in (
        (CallbacksMP.ON_PRE_RUN, finish),  # of a run that was broken off
        (CallbacksMP.ON_PREPARE_STATE, prepare),
        (CallbacksMP.ON_CLEANUP, finish),
    ):
        model.remove_callbacks_with_key(event, KEY)
        model.add_callback_with_key(event, KEY, function)
    return model


def patch_of(model: Any) -> Patch:
    """What our nodes put on a model.

    Raises:
        ValueError: Nothing.
    """
    patch = model.get_attachment(KEY)
    if patch is None:
        raise ValueError("model: no gen_accel node has patched it; connect the MODEL of one")
    return patch


def last_run(model: Any) -> Run:
    """The last run of a model.

    Raises:
        ValueError: It was not sampled, or our nodes are not on it.
    """
    patch = patch_of(model)
    if patch.last is None:
        raise ValueError("model: it was not sampled yet; connect the sampler's LATENT to 'after'")
    return patch.last


def _override(patch: Patch) -> Override:
    # The engine looks at values of tensors, which torch.compile cannot follow.
    @torch.compiler.disable
    def override(
        func: Override,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **rest: Any,
    ) -> Tensor:
        options = rest.get(_OPTIONS) or {}
        forward: Forward | None = options.get(KEY)
        rest["attn_precision"] = attn_precision
        call = AttentionCall(func, q, k, v, heads, mask, skip_reshape, skip_output_reshape, rest)
        if forward is None or forward.run is not patch.run:
            call.attention = _around(patch.before, func)
            return call.dense()
        # An override that was put around ours may come back to us: then we only pass on.
        rest[_OPTIONS] = {name: value for name, value in options.items() if name != KEY}
        call.attention = _around(forward.override or patch.before, func)
        call.kernel = patch.dense if callable(patch.dense) else None
        return forward.run.attend(call, forward)

    setattr(override, KEY, patch)
    return override


def _wrapper(patch: Patch, override: Override) -> Callable[..., Any]:
    @torch.compiler.disable
    def enter(executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound, arguments = bind(executor.original, args, kwargs)
        options = arguments.get(_OPTIONS)
        if options is None:
            return args, kwargs
        run = patch.begin()
        forward = Forward(run, executor.class_obj, None, run.context(options))
        try:
            forward.layout = token_layout(forward.model, arguments)
        except Unsupported as reason:
            forward.reason = str(reason)
        found = _foreign(options.get(OVERRIDE))
        forward.override = None if found is patch.before else found
        # Every time, for a later node may have put its own in the place of ours.
        _put(bound, {**options, KEY: forward, OVERRIDE: override})
        return bound.args, bound.kwargs

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = enter(executor, args, kwargs)
        return executor(*args, **kwargs)

    return wrapper


def _foreign(override: Override | None) -> Override | None:
    """The override, or the nearest before it that is not ours."""
    while override is not None and hasattr(override, KEY):
        override = getattr(override, KEY).before
    return override


def _around(override: Override | None, func: Override) -> Override:
    if override is None:
        return func
    return lambda *args, **kwargs: override(func, *args, **kwargs)


def _put(bound: inspect.BoundArguments, options: dict[str, Any]) -> None:
    """Replace the ``transformer_options`` of a call."""
    if _OPTIONS in bound.arguments:
        bound.arguments[_OPTIONS] = options
        return
    for parameter in bound.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given = bound.arguments[parameter.name]
            bound.arguments[parameter.name] = {**given, _OPTIONS: options}
