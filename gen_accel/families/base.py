"""What a DiT family tells the house: which modules to take, and how its tokens stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from gen_accel.layout import TokenLayout


class Attend(Protocol):
    """The attention call a family hands its q, k, v to.

    Shapes: q, k, v and the result ``[batch, tokens, heads, head_dim]``, tokens in the model's own
    order (``TokenLayout``), RoPE already applied.
    """

    def __call__(  # noqa: D102
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, backend: Any
    ) -> Tensor: ...


class FamilyProcessor:
    """Attention processor of one module: project, normalise, RoPE, then ``attend``.

    Subclasses name every keyword of the stock processor in ``__call__``: diffusers filters keywords
    by that signature, and an unnamed ``image_rotary_emb`` would silently be lost.

    Args:
        attend: Attention implementation, see `Attend`.
        layer: Index of this module among the accelerated ones of its transformer.
        stock: The processor that stood here before; used for whatever is not self-attention.
    """

    # Read and set by diffusers: set_attention_backend() and enable_parallelism() skip processors
    # that lack them, and a skipped processor gives silently wrong output on sharded inputs.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, attend: Attend, layer: int, stock: Any) -> None:
        self.attend = attend
        self.layer = layer
        self.stock = stock


@dataclass(frozen=True)
class Family:
    """One DiT family.

    Attributes:
        name: Short name, e.g. ``"wan"``.
        transformers: Class names of the diffusers transformers it serves.
        processors: Stock processor class name -> the `FamilyProcessor` that replaces it.
        layout: ``(transformer, args, kwargs) -> TokenLayout`` from the arguments of the
            transformer's forward; raises `Unsupported` when the tokens are not one dense grid.
        keep: ``(module_name, module) -> reason`` for modules of a listed processor class that must
            stay stock (cross-attention, refiners), or None to take the module.
        parallel: Whether Ulysses context parallelism is supported.
    """

    name: str
    transformers: tuple[str, ...]
    processors: dict[str, type[FamilyProcessor]]
    layout: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], TokenLayout]
    keep: Callable[[str, nn.Module], str | None]
    parallel: bool = False
