"""What a DiT family tells the house: which modules to take, and how its tokens stand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gen_accel.kernels.fused import fused
from gen_accel.kernels.prepare import Norm, Rope, prepare
from gen_accel.layout import TokenGrid, TokenLayout, Unsupported
from gen_accel.parallel import context_parallel, ulysses_attention

T = TypeVar("T")


class Attend(Protocol):
    """The attention call a family hands its q, k, v to.

    Shapes: q, k, v and the result ``[batch, tokens, heads, head_dim]``, tokens in the model's own
    order (``TokenLayout``), RoPE already applied. ``layer`` counts the accelerated modules,
    ``backend`` is diffusers' attention backend or None, ``mask`` is the model's own attention mask
    (what counts when the layout is not known; otherwise ``text_valid`` says the same),
    ``heads`` tells which of the layer's heads these are when a rank holds only some of them, and
    ``ranks`` of how many ranks' shards the sequence consists (`gen_accel.parallel.by_part`).
    """

    def __call__(  # noqa: D102
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int | Tensor,
        backend: Any,
        mask: Tensor | None = None,
        heads: slice | None = None,
        ranks: int = 1,
    ) -> Tensor: ...


class FamilyProcessor:
    """Attention processor of one module: project, normalise, RoPE, then ``attend``.

    Subclasses name every keyword of the stock processor in ``__call__``: diffusers filters keywords
    by that signature, and an unnamed ``image_rotary_emb`` would silently be lost. RoPE is always
    the fifth parameter, after ``attention_mask``.

    Args:
        attend: Attention implementation, see `Attend`.
        layer: Index of this module among the accelerated ones of its transformer; a tensor on the
            CPU where blocks are compiled, so that all of them share one graph.
        stock: The processor that stood here before; used for whatever is not self-attention.
    """

    ulysses: ClassVar[bool] = False
    """Whether a shard holds equal pieces of the video's raster and of the text, in their order."""

    def __init__(self, attend: Attend, layer: int | Tensor, stock: Any) -> None:
        self.attend = attend
        self.layer = layer
        self.stock = stock

    # set_attention_backend() and enable_parallelism() write these two on the processor they find.
    # They live on the stock processor: it obeys them when we delegate, and keeps them when we go.
    @property
    def _attention_backend(self) -> Any:
        return getattr(self.stock, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.stock._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.stock, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.stock._parallel_config = config

    @classmethod
    def layout(
        cls,
        grid: TokenGrid,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> TokenLayout:
        """Token layout of one call of this processor, from its own arguments and a known grid.

        For processors set by hand; under ``apply`` the layout comes from the transformer's
        arguments (`Family.layout`).
        """
        return TokenLayout(grid)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """``attend``, across processes where diffusers' context parallelism is on."""
        config = context_parallel(self._parallel_config)
        if config is None:
            return self.attend(
                q, k, v, layer=self.layer, backend=self._attention_backend, mask=mask
            )
        if not self.ulysses:
            raise ValueError(
                f"context parallelism with {type(self).__name__}: how its shards stand is not "
                "known; remove() the processors before enable_parallelism()"
            )

        def on_heads(q: Tensor, k: Tensor, v: Tensor, heads: slice, ranks: int) -> Tensor:
            options = {"layer": self.layer, "backend": self._attention_backend, "mask": mask}
            return self.attend(q, k, v, heads=heads, ranks=ranks, **options)

        return ulysses_attention(on_heads, q, k, v, config)


class Match(NamedTuple):
    """What an attention module called by hand turned out to be.

    Attributes:
        processor: The `FamilyProcessor` for this call, or None when the stock one must do it.
        stock: A fresh stock processor.
    """

    processor: type[FamilyProcessor] | None
    stock: Any


@dataclass(frozen=True)
class TokenPath:
    """Where the video tokens of a transformer enter and leave its blocks.

    Between these places everything but attention is per token, so that an order may be applied
    here instead of in every layer (`gen_accel.hoist`).

    Attributes:
        entries: Module -> axis of its output on which the tokens stand, or on which their grid
            begins.
        exits: Module -> the same; what comes out of it is no longer mixed with anything.
        extra: Further entries, of modules that only some of the family's transformers have.
        arguments: Argument of the transformer's forward that may come per token -> the same.
        refuse: ``(transformer, args, kwargs)`` -> why this forward has something else in between
            that knows where tokens stand, or None.
    """

    entries: Mapping[str, int]
    exits: Mapping[str, int]
    extra: Mapping[str, int] = field(default_factory=dict)
    arguments: Mapping[str, int] = field(default_factory=dict)
    refuse: Callable[[Any, tuple[Any, ...], dict[str, Any]], str | None] = lambda *_: None


@dataclass(frozen=True)
class Family:
    """One DiT family.

    Attributes:
        name: Short name, e.g. ``"wan"``.
        transformers: Class names of the diffusers transformers it serves.
        processors: Stock processor class name -> the `FamilyProcessor` that replaces it.
        layout: ``(transformer, args, kwargs) -> TokenLayout`` from the arguments of the
            transformer's forward; raises `Unsupported` when the tokens are not one dense grid.
        match: ``(attn, encoder_hidden_states, attention_mask, rope) -> Match`` for an attention
            module met without its transformer, or None when it is not this family's.
        path: Where the video tokens enter and leave the blocks.
        kept: Stock processor class name -> why it always stays.
        shards: Transformer -> how context parallelism splits it, for
            ``enable_parallelism(cp_plan=...)``; None is diffusers' own plan.
        pure_noise: The transformer's timestep at noise level 1.
    """

    name: str
    transformers: tuple[str, ...]
    processors: Mapping[str, type[FamilyProcessor]]
    layout: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], TokenLayout]
    match: Callable[[nn.Module, Any, Tensor | None, Any], Match | None]
    path: TokenPath
    kept: Mapping[str, str] = field(default_factory=dict)
    shards: Callable[[nn.Module], dict[str, Any] | None] = lambda transformer: None
    pure_noise: float = 1000.0

    def keep(self, name: str, module: nn.Module) -> str | None:
        """Why attention module ``name`` must stay stock, or None to take it."""
        processor: Any = module.processor
        if isinstance(processor, FamilyProcessor):
            return "already accelerated"
        stock = type(processor).__name__
        if stock not in self.processors:
            return self.kept.get(stock, f"{stock} is not known to the {self.name} family")
        return "cross-attention" if getattr(module, "is_cross_attention", False) else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool = False) -> Tensor:
    """RoPE on the first tokens of ``[B, S, H, D]``: one read and one write.

    On a GPU in one kernel, elsewhere with temporaries of half the width; diffusers' own functions
    make several copies in fp32. What is compiled is left to the compiler.

    Args:
        x: Queries or keys.
        cos: ``[tokens, D / 2]``, a number per pair of channels; what follows stays as it is.
        sin: Same.
        halves: Channels i and ``i + D / 2`` are a pair, else 2i and 2i + 1.
    """
    if fused(x) and not torch.compiler.is_compiling():
        return prepare(x, None, Rope(cos, sin, 0, halves)).transpose(1, 2)
    tokens, axis = len(cos), -2 if halves else -1
    pairs = (2, -1) if halves else (-1, 2)
    real, imag = x[:, :tokens].unflatten(-1, pairs).unbind(axis)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([real * cos - imag * sin, imag * cos + real * sin], axis)
    turned = turned.flatten(-2).to(x.dtype)
    return turned if tokens == x.shape[1] else torch.cat([turned, x[:, tokens:]], 1)


def norm_rotate(
    norm: nn.Module | None, x: Tensor, cos: Tensor, sin: Tensor, *,
    halves: bool = False, across: bool = False,
) -> Tensor:  # fmt: skip
    """``rotate(norm(x), cos, sin)``; on a GPU both in one read and one write.

    There the norm is not rounded to half precision before it is rotated, as the stock one is.

    Args:
        norm: The model's own module, or None.
        x: Queries or keys ``[B, S, H, D]``.
        cos: As in `rotate`.
        sin: Same.
        halves: Same.
        across: The norm runs over the heads of a token together, not over each.
    """
    known = None if torch.compiler.is_compiling() else _rms_norm(norm, x, across)
    if known is not None and fused(x, known.weight):
        return prepare(x, None, Rope(cos, sin, 0, halves), known).transpose(1, 2)
    if norm is not None:
        x = norm(x.flatten(2)).view(x.shape) if across else norm(x)
    return rotate(x, cos, sin, halves)


def _rms_norm(norm: Any, x: Tensor, across: bool) -> Norm | None:
    """What a module does to x if that is a plain RMS norm and nothing else, or None."""
    if type(norm).__name__ != "RMSNorm" or getattr(norm, "bias", None) is not None:
        return None
    # Offloading puts a wrapper into the instance, which brings the weight when it is called.
    hooked = "forward" in vars(norm) or norm._forward_hooks or norm._forward_pre_hooks
    weight, width = norm.weight, x.shape[-1] * (x.shape[-2] if across else 1)
    if hooked or norm.eps is None or weight is None or weight.shape != (width,):
        return None
    return Norm(weight, norm.eps) if (weight.device, weight.dtype) == (x.device, x.dtype) else None


def split_plan(block: str, arguments: Sequence[str], embeddings: Mapping[str, int]) -> Any:
    """A context parallelism plan for diffusers.

    Args:
        block: First block; its ``arguments`` ``[batch, tokens, channels]`` are split.
        arguments: Names of them.
        embeddings: Module whose outputs, one tensor or two, come per token -> its token axis.
    """
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    plan: dict[str, Any] = {
        block: {
            name: ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
            for name in arguments
        },
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    for module, axis in embeddings.items():
        split = ContextParallelInput(split_dim=axis, expected_dims=axis + 2, split_output=True)
        plan[module] = {0: split, 1: split} if axis == 0 else {0: split}
    return plan


def is_a(module: nn.Module, class_name: str) -> bool:
    """Whether ``class_name`` is among the classes of ``module``, without importing it."""
    return any(cls.__name__ == class_name for cls in type(module).__mro__)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """``[B, S, H*D] -> [B, S, H, D]``.

    The width decides, not ``attn.heads``: under tensor parallelism a rank holds fewer heads.
    """
    return x.unflatten(-1, (-1, head_dim))


def argument(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The forward argument ``name`` of a call, however it was passed; None when it was not."""
    if name in kwargs:
        return kwargs[name]
    place = list(inspect.signature(type(module).forward).parameters).index(name) - 1  # self
    return args[place] if place < len(args) else None


def latent_grid(latents: Tensor, patch_size: tuple[int, int, int]) -> TokenGrid:
    """Grid after patchify of video latents ``[B, C, F, H, W]``."""
    if latents.ndim != 5:
        raise Unsupported(f"hidden_states {tuple(latents.shape)} is not [B, C, F, H, W]")
    return TokenGrid(*(size // patch for size, patch in zip(latents.shape[2:], patch_size)))


def video_layout(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout:
    """`Family.layout` of the models whose self-attention sees the video alone."""
    latents = argument(transformer, args, kwargs, "hidden_states")
    return TokenLayout(latent_grid(latents, transformer.config.patch_size))


_FACTS = WeakTensorKeyDictionary()


def read_once(tensor: Tensor, read: Callable[[Tensor], T]) -> T:
    """``read(tensor)``, remembered while the tensor lives unchanged: reading waits for the GPU.

    Pipelines pass the same ids and masks to every step, so this is one wait per run.
    """
    version = 0 if tensor.is_inference() else tensor._version
    known = _FACTS.get(tensor)
    if known is None or known[:2] != (version, read):
        known = (version, read, read(tensor))
        _FACTS[tensor] = known
    return known[2]


def prefix_lengths(mask: Tensor) -> tuple[int, ...]:
    """Number of leading True of each row of ``[B, ..., N]``; -1 where a row is no prefix."""
    rows = mask.flatten(1) != 0
    broken = (rows[:, 1:] & ~rows[:, :-1]).any(1)
    return tuple(rows.sum(1).masked_fill(broken, -1).tolist())
