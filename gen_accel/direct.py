"""A policy that the user set on every module of a transformer, without `gen_accel.apply`."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gen_accel.engine import Engine
from gen_accel.families import processor_for
from gen_accel.layout import ForwardContext, TokenGrid, Unsupported

if TYPE_CHECKING:
    from gen_accel.processors import Policy


class DirectCalls:
    """Answers the attention calls of one transformer through the one object all modules share.

    No hook sees the transformer here, so there are no denoising steps: a layer is calibrated at its
    first call and sparse from its second on.
    """

    def __init__(self, policy: Policy) -> None:
        if policy.grid is None:
            raise ValueError(
                "grid=None: a transformer's modules do not see the token grid; write "
                "pipe.set_attn_processor(...), or give grid=(frames, height, width) here"
            )
        if any(layer < 0 for layer in policy.dense_layers):
            raise ValueError(
                f"dense_layers={policy.dense_layers}: a module does not know how many come after "
                "it; count from the first, or write pipe.set_attn_processor(...)"
            )
        if policy.load_plan() is not None:
            raise ValueError(
                "plan=...: a plan counts layers and steps, which modules do not see; write "
                "pipe.set_attn_processor(...) or gen_accel.apply(pipe, ...)"
            )
        self._policy = policy
        self._grid = TokenGrid(*policy.grid)
        self._planner = policy.planner("transformer", "direct", layers=0)
        self._engine = Engine(
            name="transformer",
            layers=0,
            planner=self._planner,
            **policy.engine_settings(),
        )
        self._processors: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        attention_mask: Tensor | None,
        rope: Any,
    ) -> Any:
        """One attention call; arguments as diffusers passes them."""
        if self._policy._parallel_config is not None:
            raise ValueError(
                "context parallelism: a processor set on modules directly does not see the shards; "
                "use gen_accel.apply(pipe, ...)"
            )
        match = processor_for(attn, encoder_hidden_states, attention_mask, rope)
        arguments = (attn, hidden_states, encoder_hidden_states, attention_mask, rope)
        if match.processor is None:
            match.stock._attention_backend = self._policy._attention_backend
            # A stock processor without RoPE (a token refiner's) has no place for it either.
            return match.stock(*(arguments if rope is not None else arguments[:-1]))
        if attn not in self._processors:
            self._processors[attn] = match.processor(
                self._engine.attend, self._engine.layers, match.stock
            )
            self._engine.layers += 1
            self._planner.layers += 1
        # It may have changed since the module was first met.
        self._processors[attn]._attention_backend = self._policy._attention_backend
        context = ForwardContext()
        try:
            context.layout = match.processor.layout(
                self._grid, hidden_states, encoder_hidden_states, attention_mask
            )
        except Unsupported as reason:
            context.reason = str(reason)
        if context.layout is not None and context.layout.grid != self._grid:
            context.layout, context.reason = None, "the call does not have the grid that was given"
        self._engine.enter(context)
        return self._processors[attn](*arguments)
