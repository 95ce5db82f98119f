"""Where the tokens of a ComfyUI diffusion model stand, from the arguments of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gen_accel.layout import TokenGrid, TokenLayout, Unsupported

# Which side of the video joint attention has its text on, by class of the diffusion model.
_TEXT_BEFORE = ("Flux",)
_TEXT_AFTER = ("HunyuanVideo",)

# Plan files name models as diffusers does, where the layers of both stand in the same order.
_DIFFUSERS_NAMES = {
    "WanModel": "WanTransformer3DModel",
    "HunyuanVideo": "HunyuanVideoTransformer3DModel",
    "Flux": "FluxTransformer2DModel",
    "GeneralDIT": "CosmosTransformer3DModel",
    "MiniTrainDIT": "CosmosTransformer3DModel",
}
_BLOCK_LISTS = ("blocks", "vace_blocks", "double_blocks", "single_blocks")


def bind(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[inspect.BoundArguments, dict[str, Any]]:
    """The call bound to the signature, and all its arguments by name.

    Raises:
        TypeError: The arguments do not fit.
    """
    signature = inspect.signature(forward)
    bound = signature.bind(*args, **kwargs)
    named = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return bound, named


def token_layout(model: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """Layout of the self-attention of one forward; text padding is not known here.

    Args:
        model: The diffusion model, e.g. ComfyUI's ``WanModel``.
        arguments: Of its forward, by name; ``x`` are the latents before they are padded to whole
            patches, ``[batch, channels, frames, height, width]`` or without frames.

    Raises:
        Unsupported: The tokens are not one dense grid with text on one known side.
    """
    grid = token_grid(model, arguments)
    classes = {cls.__name__ for cls in type(model).__mro__}
    if not hasattr(model, "double_blocks"):
        return TokenLayout(grid)
    if arguments.get("ref_latents") is not None or arguments.get("ref_latent") is not None:
        raise Unsupported("reference images in the sequence have grids of their own")
    text = _length(arguments.get("context")) + _length(arguments.get("txt_byt5"))
    if classes & set(_TEXT_BEFORE):
        return TokenLayout(grid, text_before=text)
    if classes & set(_TEXT_AFTER):
        return TokenLayout(grid, text_after=text)
    raise Unsupported(
        f"{type(model).__name__}: it is not known on which side of the image its text stands"
    )


def layer_count(model: Any) -> int:
    """Number of blocks, each with one self-attention; 0 where they are not found."""
    return sum(len(getattr(model, name, ())) for name in _BLOCK_LISTS)


def replaced_blocks(options: Mapping[str, Any]) -> bool:
    """Whether a node has put something in the place of blocks, which may skip their attention."""
    return bool(options.get("patches_replace", {}).get("dit"))


def block_number(model: Any, options: Mapping[str, Any]) -> int | None:
    """Number of the block that calls, where ComfyUI says it (0.3.64 does not)."""
    if "block_index" not in options:
        return None
    single = options.get("block_type") == "single"
    return options["block_index"] + (len(getattr(model, "double_blocks", ())) if single else 0)


def model_string(model: Any, layers: int, q: Tensor) -> str:
    """See `gen_accel.plan.ComponentPlan`; q is ``[batch, tokens, heads, head_dim]``."""
    names = (cls.__name__ for cls in type(model).__mro__)
    name = next((_DIFFUSERS_NAMES[n] for n in names if n in _DIFFUSERS_NAMES), None)
    return f"{name or type(model).__name__}/{layers}x{q.shape[2]}x{q.shape[3]}"


def patch_size(model: Any) -> tuple[int, int, int]:
    """Latents per token as (frames, height, width).

    Raises:
        Unsupported: The model does not say.
    """
    if hasattr(model, "patch_spatial"):  # Cosmos
        return model.patch_temporal, model.patch_spatial, model.patch_spatial
    size = getattr(model, "patch_size", None)
    if isinstance(size, int):
        return 1, size, size
    if isinstance(size, (tuple, list)) and len(size) in (2, 3):
        return (1, *size) if len(size) == 2 else tuple(size)  # type: ignore[return-value]
    raise Unsupported(f"{type(model).__name__} does not say how many latents make a token")


def token_grid(model: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    """The video tokens of `token_layout`."""
    x = arguments.get("x")
    if not isinstance(x, Tensor) or x.ndim not in (4, 5):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise Unsupported(f"latents {shape}: neither an image nor a video")
    frames, height, width = x.shape[2:] if x.ndim == 5 else (1, *x.shape[2:])
    # Wan takes further frames in, before and behind the video, on the same grid.
    frames += _frames(arguments.get("time_dim_concat"))
    patch = patch_size(model)
    rounded = [-(-size // each) for size, each in zip((frames, height, width), patch)]
    if getattr(model, "ref_conv", None) is not None:
        rounded[0] += arguments.get("reference_latent") is not None
    return TokenGrid(*rounded)


def _length(x: Any) -> int:
    return x.shape[1] if isinstance(x, Tensor) else 0


def _frames(x: Any) -> int:
    return x.shape[2] if isinstance(x, Tensor) else 0
