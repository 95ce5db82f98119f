"""Inputs that several nodes share, and what their text means."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from gen_accel.comfy.run import Span
from gen_accel.kernels.quant import PRECISIONS
from gen_accel.plan import BLOCK_SIZES
from gen_accel.tail import NAMES

ATTENTION, QUALITY = "gen_accel/attention", "gen_accel/quality"
AUTO = "auto"
_TAILS = [*NAMES[:3], "joint", "joint/4", "joint+variance"]


def model_input() -> Any:
    """The model to patch."""
    return io.Model.Input("model", tooltip="Model to patch; a clone of it comes out.")


def model_output() -> Any:
    """The patched model."""
    return io.Model.Output("patched", display_name="model", tooltip="Clone of the model, patched.")


def density(default: float) -> Any:
    """Share of the blocks to see."""
    return io.Float.Input(
        "density",
        default=default,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="Share of the video blocks that attention sees. Less is faster and less faithful.",
    )


def tail(default: str) -> Any:
    """What stands in for hidden blocks."""
    return io.Combo.Input(
        "tail",
        options=_TAILS,
        default=default,
        tooltip="What stands in for blocks that are not seen: nothing (drop), a correction of the "
        "output (rectified), or mean keys and values in the same softmax (joint).",
    )


def schedule() -> list[Any]:
    """When and where attention stays dense, and how the rest is computed."""
    return [
        io.Float.Input(
            "start_percent",
            default=0.2,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Attention is dense before this point of the noise schedule. The first steps "
            "fix the composition; keep them dense.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Attention is dense after this point of the noise schedule.",
        ),
        io.String.Input(
            "dense_blocks",
            default="",
            optional=True,
            tooltip="Transformer blocks that stay dense: numbers and ranges, -1 is the last. "
            "Example: 0, 1, 37-56, -1",
        ),
        io.Int.Input(
            "min_tokens",
            default=4096,
            min=0,
            max=1 << 24,
            optional=True,
            tooltip="Shorter sequences stay dense: there the dense kernel is faster.",
        ),
        io.Combo.Input(
            "precision",
            options=["auto", "fp32", "bf16", "fp16", *PRECISIONS],
            default="auto",
            optional=True,
            tooltip="Numbers that sparse attention computes in; auto is the model's, with PARO "
            "INT8 where a kernel for it runs. Elsewhere quantised ones only show the accuracy.",
        ),
        io.Combo.Input(
            "block",
            options=[AUTO, *map(str, BLOCK_SIZES)],
            default=AUTO,
            optional=True,
            tooltip="Tokens per block; auto picks by the length of the video.",
        ),
        io.Combo.Input(
            "carrier",
            options=[AUTO, "triton", "gather", "flex"],
            default=AUTO,
            optional=True,
            tooltip="What computes sparse attention: auto is triton on a GPU, where calls it "
            "cannot run stay dense, and gather elsewhere.",
        ),
        io.Boolean.Input(
            "profile",
            default=False,
            optional=True,
            tooltip="Time the parts of every call for the Attention Report. Slows a GPU down.",
        ),
    ]


def settings(
    start_percent: float,
    end_percent: float,
    dense_blocks: str = "",
    min_tokens: int = 4096,
    precision: str = "auto",
    block: str = AUTO,
    carrier: str = AUTO,
    profile: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `schedule` asked for, as arguments of a policy and of a patch."""
    policy: dict[str, Any] = {
        "dense_layers": block_numbers(dense_blocks),
        "min_tokens": min_tokens,
        "precision": precision,
        "block": None if block == AUTO else numbers("block", block),
        "impl": carrier,
    }
    return policy, {"span": Span(start_percent, end_percent), "profile": profile}


def block_numbers(text: str) -> tuple[int, ...]:
    """Numbers of a list such as ``"0, 1, 37-56, -1"``.

    Raises:
        ValueError: Anything else is written there.
    """
    found: list[int] = []
    for part in text.replace(",", " ").split():
        first, dash, last = part[1:].partition("-")
        first = part[0] + first
        try:
            block = range(int(first), int(last) + 1) if dash else [int(part)]
        except ValueError:
            raise ValueError(
                f"dense_blocks={text!r}: {part!r} is neither a number nor a range such as 37-56"
            ) from None
        if not block:
            raise ValueError(
                f"dense_blocks={text!r}: {part!r} ends before it begins; write {last}-{first}"
            )
        found += block
    return tuple(found)


def numbers(name: str, text: str) -> Any:
    """``"auto"``, one number, or one per axis, of a text such as ``"12, 24, 24"``.

    Raises:
        ValueError: Anything else is written there.
    """
    if text.strip() == AUTO:
        return AUTO
    try:
        found = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        found = ()
    if not found:
        raise ValueError(
            f"{name}={text!r}: write auto, one whole number, or one per axis (F, H, W)"
        )
    return found[0] if len(found) == 1 else found
