"""Order the video once per forward of a transformer, not q, k, v and the output of every layer.

Attention does not see in which order its keys come, and all else in a DiT block is per token. So an
order that all heads of all layers share may be applied to what enters the blocks (patch embeddings,
RoPE tables, what else comes per token) and undone on what leaves them.

It holds in every forward, dense ones too: caches that carry activations from step to step
(first-block cache, TeaCache) would otherwise mix two orders.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gen_accel.families import family_of
from gen_accel.families.base import argument
from gen_accel.layout import TokenGrid, TokenLayout, Unsupported
from gen_accel.order.axis import inverse_permutation
from gen_accel.order.hoisted import Hoisted, Permuting
from gen_accel.parallel import context_parallel


def hoist_order(transformer: nn.Module, order: Permuting) -> Hoist:
    """Keep the video tokens of a transformer in an order while they pass its blocks.

    Inputs and outputs of the transformer stay as they are. Where a forward has something between
    embedding and output that knows where tokens stand, it is left alone (`Hoist.reason`), and the
    order remains to be applied per call: always take it from `Hoist.remaining`.

    Args:
        transformer: A diffusers transformer of one of the families.
        order: One order for all heads, without padding places.

    Returns:
        The `Hoist`, installed; its ``remove()`` restores the transformer.

    Raises:
        ValueError: No family serves this transformer.
    """
    return Hoist(getattr(transformer, "_orig_mod", transformer), order)


class Hoist:
    """The hooks of one transformer, and what they do in the forward in progress.

    Attributes:
        order: The order.
        reason: Why the order is not hoisted in this (or the last) forward; "" when it is.
    """

    def __init__(self, transformer: nn.Module, order: Permuting) -> None:
        self.order = order
        self.reason = "no forward yet"
        self._transformer = transformer
        self._family = family_of(transformer)
        self._layout: TokenLayout | None = None
        self._waiting: set[str] = set()
        self._passed: dict[str, tuple[nn.Module, RemovableHandle]] = {}
        self._handles = (
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.register_forward_hook(self._end, always_call=True),
        )

    @property
    def active(self) -> bool:
        """Whether a forward is in progress whose video tokens are in the order."""
        return self._layout is not None

    @property
    def remaining(self) -> Permuting:
        """What an attention call of the forward in progress still has to apply."""
        return Hoisted(self.order) if self.active else self.order

    def remove(self) -> None:
        """Take the hooks off. Safe to call twice."""
        self._layout = None
        for handle in (*self._handles, *(handle for _, handle in self._passed.values())):
            handle.remove()
        self._passed.clear()

    # -- hooks ---------------------------------------------------------------------------------

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._layout = None
        try:
            self._layout = self._check(args, kwargs)
        except Unsupported as reason:
            self.reason = str(reason)
            return None
        self.reason = ""
        self._attach()
        self._waiting = set(self._passed)
        ordered = {
            name: self._move(value, axis, back=False)
            for name, (value, axis) in self._per_token(args, kwargs).items()
        }
        names = list(inspect.signature(type(module).forward).parameters)[1:]  # self
        args = tuple(ordered.get(name, value) for name, value in zip(names, args))
        return args, {**kwargs, **{name: ordered[name] for name in kwargs if name in ordered}}

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        waiting, active = self._waiting, self.active
        self._layout, self._waiting = None, set()
        # Without output the forward failed, and its own error is the one to see.
        if active and waiting and output is not None:
            raise RuntimeError(
                f"{type(module).__name__}.forward did not call {', '.join(sorted(waiting))}: its "
                "output is in the wrong order; remove() the hoist before replacing forward"
            )

    def _pass(
        self, name: str, axis: int, back: bool, module: nn.Module, args: Any, output: Any
    ) -> Any:
        if not self.active:
            return None
        self._waiting.discard(name)
        return self._move(output, axis, back)

    # -- what they do --------------------------------------------------------------------------

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout:
        """The layout of a forward that can be hoisted."""
        transformer: Any = self._transformer
        if torch.compiler.is_compiling():
            raise Unsupported("the whole transformer is compiled; compile its blocks instead")
        if context_parallel(getattr(transformer, "_parallel_config", None)) is not None:
            raise Unsupported("tokens are sharded across processes")
        layout = self._family.layout(transformer, args, kwargs)
        path = self._family.path
        reason = path.refuse(transformer, args, kwargs)
        for name in (*path.entries, *path.exits):
            if getattr(transformer, name, None) is None:
                reason = f"{type(transformer).__name__} has no module {name}"
        if reason is None and _indices(self.order, layout.grid, torch.device("cpu")) is None:
            reason = "the order has padding places"
        for name, (value, axis) in self._per_token(args, kwargs).items():
            for x in value if isinstance(value, Sequence) else [value]:
                if x.shape[axis] != layout.grid.numel:
                    reason = f"{name} {tuple(x.shape)} does not have the {layout.grid} tokens"
        if reason is not None:
            raise Unsupported(reason)
        return layout

    def _per_token(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, tuple[Any, int]]:
        """Arguments that come per token this time, with their token axis."""
        found = {}
        for name, axis in self._family.path.arguments.items():
            if name in inspect.signature(type(self._transformer).forward).parameters:
                value = argument(self._transformer, args, kwargs, name)
                if isinstance(value, Sequence) or (value is not None and value.ndim > axis):
                    found[name] = value, axis
        return found

    def _attach(self) -> None:
        """Put the hooks on the modules that are there now: loading a LoRA replaces some."""
        path = self._family.path
        for back, places in ((False, {**path.entries, **path.extra}), (True, path.exits)):
            for name, axis in places.items():
                module = getattr(self._transformer, name, None)
                known, handle = self._passed.get(name, (None, None))
                if module is None or module is known:
                    continue
                if handle is not None:
                    handle.remove()
                hook = partial(self._pass, name, axis, back)
                self._passed[name] = module, module.register_forward_hook(hook)

    def _move(self, x: Any, axis: int, back: bool) -> Any:
        """Order the video tokens of a tensor, or of each of several."""
        if isinstance(x, (tuple, list)):
            return type(x)(self._move(part, axis, back) for part in x)
        layout = self._layout
        assert layout is not None
        indices = _indices(self.order, layout.grid, x.device)
        assert indices is not None
        index, grid = indices[back], layout.grid
        if tuple(x.shape[axis : axis + 3]) == grid:
            # Tokens as one axis, right behind the batch: that is how the model goes on.
            flat = x.flatten(axis, axis + 2).movedim(axis, 1)
            return flat.index_select(1, index).movedim(1, axis).unflatten(axis, grid)
        if x.shape[axis] == grid.numel:
            return x.index_select(axis, index)
        if x.shape[axis] == layout.tokens:
            sizes = [layout.text_before, grid.numel, layout.text_after]
            before, video, after = x.split(sizes, axis)
            return torch.cat([before, video.index_select(axis, index), after], axis)
        raise RuntimeError(
            f"tensor {tuple(x.shape)} does not have the tokens of grid {grid} on axis {axis}"
        )


@lru_cache(maxsize=32)
def _indices(
    order: Permuting, grid: TokenGrid, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Raster token at each place, and place of each raster token; None where some are padding."""
    permutation = order.permutation(grid)
    if len(permutation) != grid.numel:
        return None
    # Cached: made under inference_mode, they could never serve a call that needs a gradient.
    with torch.inference_mode(False):
        index = torch.tensor(permutation, device="cpu")
        return index.to(device), inverse_permutation(index).to(device)
