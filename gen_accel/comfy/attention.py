"""Nodes that change how a model attends: MODEL in, MODEL out."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from gen_accel.comfy import widgets
from gen_accel.comfy.layout import token_grid
from gen_accel.comfy.patch import install

_OWN, _CARRIER = "ComfyUI's", "gen_accel "  # prefixes of dense backends
_NO_PRESET = "none"


class SparseAttention(io.ComfyNode):
    """Any order, selection and tail."""

    @classmethod
    def define_schema(cls) -> Any:  # noqa: D102
        return io.Schema(
            node_id="GenAccelSparseAttention",
            display_name="Sparse Attention",
            category=widgets.ATTENTION,
            description="Lets each block of video tokens attend to a share of the others. The "
            "defaults were among the nearest to dense on our toy model; see docs/methods.md.",
            inputs=[
                widgets.model_input(),
                io.Combo.Input(
                    "select",
                    options=["pooled", "static", "window", "all"],
                    default="pooled",
                    tooltip="How blocks are chosen: in every call from pooled queries and keys, "
                    "once in the dense steps (static), by geometry (window), or not at all.",
                ),
                io.Combo.Input(
                    "order",
                    options=[widgets.AUTO, "axis", "curve", "raster", "tile"],
                    default=widgets.AUTO,
                    tooltip="Token order that blocks are cut from: axis goes with static, tile "
                    "with window; auto takes the one that suits the selection.",
                ),
                widgets.density(0.2),
                widgets.tail("joint/4"),
                *widgets.schedule(),
            ],
            outputs=[widgets.model_output()],
        )

    @classmethod
    def execute(  # noqa: D102
        cls, model: Any, select: str, order: str, density: float, tail: str, **schedule: Any
    ) -> Any:
        from gen_accel.processors import SparseProcessor

        shared, patch = widgets.settings(**schedule)
        policy = SparseProcessor(
            select=select,
            order=None if order == widgets.AUTO else order,
            density=density,
            tail=tail,
            **shared,
        )
        return io.NodeOutput(install(model, policy=policy, **patch))


class SpaAttn(io.ComfyNode):
    """Rectified SpaAttn."""

    @classmethod
    def define_schema(cls) -> Any:  # noqa: D102
        from gen_accel.select.presets import SPAATTN

        return io.Schema(
            node_id="GenAccelSpaAttn",
            display_name="Rectified SpaAttn",
            category=widgets.ATTENTION,
            description="Blocks chosen in every call from pooled queries and keys, the rest "
            "compensated (arXiv 2511.19835, reconstructed; docs/spaattn.md).",
            inputs=[
                widgets.model_input(),
                io.Combo.Input(
                    "preset",
                    options=[_NO_PRESET, *SPAATTN],
                    default=_NO_PRESET,
                    tooltip="The authors' setting of a model. It overrides density, top_p, "
                    "first_frame, block, start_percent and dense_blocks.",
                ),
                widgets.density(0.25),
                io.Float.Input(
                    "top_p",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Also choose blocks until this share of the estimated mass is reached.",
                ),
                widgets.tail("rectified+gapr"),
                io.Boolean.Input(
                    "neighbours",
                    default=True,
                    tooltip="Always see blocks that hold a neighbour of one's own tokens.",
                ),
                io.Boolean.Input(
                    "first_frame",
                    default=False,
                    tooltip="Blocks with tokens of the first frame see each other.",
                ),
                io.Int.Input(
                    "refresh",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Denoising steps that share their block lists.",
                ),
                *widgets.schedule(),
            ],
            outputs=[widgets.model_output()],
        )

    @classmethod
    def execute(cls, model: Any, preset: str, **given: Any) -> Any:  # noqa: D102
        from gen_accel.comfy.run import Span
        from gen_accel.processors import SpaAttnProcessor
        from gen_accel.select.presets import spaattn_preset

        own = {
            name: given.pop(name)
            for name in ("density", "top_p", "tail", "neighbours", "first_frame", "refresh")
        }
        shared, patch = widgets.settings(**given)
        own |= shared
        if preset != _NO_PRESET:
            own |= {"dense_layers": (), **spaattn_preset(preset)}
            patch["span"] = Span(own.pop("dense_steps"), patch["span"].end)
        return io.NodeOutput(install(model, policy=SpaAttnProcessor(**own), **patch))


class Gna(io.ComfyNode):
    """Generalized neighborhood attention."""

    @classmethod
    def define_schema(cls) -> Any:  # noqa: D102
        return io.Schema(
            node_id="GenAccelGna",
            display_name="GNA Window",
            category=widgets.ATTENTION,
            description="Each token sees a window around itself on the grid of frames, rows and "
            "columns (generalized neighborhood attention, arXiv 2504.16922). No calibration.",
            inputs=[
                widgets.model_input(),
                io.String.Input(
                    "window",
                    default="auto",
                    tooltip="Tokens per axis, such as 12, 24, 24 (F, H, W); -1 is a whole axis. "
                    "auto takes a block-sparse window of the density. GNA Suggest lists some.",
                ),
                io.String.Input(
                    "stride",
                    default="1",
                    tooltip="Queries per axis that share a window, one number or one per axis.",
                ),
                io.String.Input(
                    "dilation",
                    default="1",
                    tooltip="Distance of neighbouring keys, one number or one per axis.",
                ),
                widgets.density(0.25),
                io.String.Input(
                    "tile", default="auto", tooltip="Tokens per tile and axis; auto fits the grid."
                ),
                io.Combo.Input(
                    "border",
                    options=["shift", "snap"],
                    default="shift",
                    tooltip="At the border windows shift inwards (GNA), or snap to whole tiles, "
                    "which stays block-sparse on any grid and is not GNA.",
                ),
                widgets.tail("drop"),
                *widgets.schedule(),
            ],
            outputs=[widgets.model_output()],
        )

    @classmethod
    def execute(  # noqa: D102
        cls,
        model: Any,
        window: str,
        stride: str,
        dilation: str,
        density: float,
        tile: str,
        border: str,
        tail: str,
        **schedule: Any,
    ) -> Any:
        from gen_accel.processors import GnaProcessor

        shared, patch = widgets.settings(**schedule)
        policy = GnaProcessor(
            window=widgets.numbers("window", window),
            stride=widgets.numbers("stride", stride),
            dilation=widgets.numbers("dilation", dilation),
            density=density,
            tile=widgets.numbers("tile", tile),
            border=border,
            tail=tail,
            **shared,
        )
        return io.NodeOutput(install(model, policy=policy, **patch))


class GnaSuggest(io.ComfyNode):
    """Windows that fit a latent."""

    @classmethod
    def define_schema(cls) -> Any:  # noqa: D102
        return io.Schema(
            node_id="GenAccelGnaSuggest",
            display_name="GNA Suggest",
            category=widgets.ATTENTION,
            description="Windows that are exactly block-sparse on the grid of this latent, nearest "
            "to the density. Connect window and stride to GNA Window.",
            inputs=[
                io.Model.Input("model", tooltip="Tells how many latents make a token."),
                io.Latent.Input("latent", tooltip="The latent that will be sampled."),
                widgets.density(0.25),
                io.Combo.Input(
                    "border",
                    options=["shift", "snap"],
                    default="shift",
                    tooltip="As in GNA Window.",
                ),
                io.Int.Input(
                    "choice",
                    default=1,
                    min=1,
                    max=5,
                    tooltip="Which of the suggestions to hand out, 1 is the best.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "window", display_name="window", tooltip="For the window input of GNA Window."
                ),
                io.String.Output(
                    "stride", display_name="stride", tooltip="For the stride input of GNA Window."
                ),
                io.String.Output(
                    "table", display_name="table", tooltip="All suggestions with their densities."
                ),
            ],
        )

    @classmethod
    def execute(  # noqa: D102
        cls, model: Any, latent: Any, density: float, border: str, choice: int
    ) -> Any:
        from gen_accel.select.suggest import suggest

        grid = token_grid(model.get_model_object("diffusion_model"), {"x": latent["samples"]})
        if grid.numel == 1:
            raise ValueError("latent: one token has no window; take a larger latent")
        found = suggest(grid, density, border=border)
        lines = [f"grid {grid}, windows for density {density:g}:"]
        for number, window in enumerate(found, 1):
            sizes, strides = (_axes(x) for x in (window.size, window.stride))
            lines.append(f"{number}. {sizes} stride {strides}: density {window.density:.3f}")
        best = found[min(choice, len(found)) - 1]
        return io.NodeOutput(_axes(best.size), _axes(best.stride), "\n".join(lines))


def _axes(sizes: Any) -> str:
    return ", ".join(map(str, sizes))


class DenseBackend(io.ComfyNode):
    """What computes the self-attention that stays dense."""

    @classmethod
    def define_schema(cls) -> Any:  # noqa: D102
        from comfy.ldm.modules.attention import REGISTERED_ATTENTION_FUNCTIONS

        from gen_accel.dense import KINDS

        options = [_OWN, *REGISTERED_ATTENTION_FUNCTIONS]
        return io.Schema(
            node_id="GenAccelDenseBackend",
            display_name="Dense Attention Backend",
            category=widgets.ATTENTION,
            description="What computes video self-attention that stays dense: the dense steps and "
            "blocks of a sparse node before or after this one, or everything without one. "
            "Cross-attention and masked attention are left to ComfyUI.",
            inputs=[
                widgets.model_input(),
                io.Combo.Input(
                    "backend",
                    options=[*options, *(_CARRIER + kind for kind in KINDS[1:])],
                    default=_OWN,
                    tooltip="A kernel that ComfyUI found on this machine, guarded SageAttention, "
                    "or our kernel with quantised numbers.",
                ),
            ],
            outputs=[widgets.model_output()],
        )

    @classmethod
    def execute(cls, model: Any, backend: str) -> Any:  # noqa: D102
        from comfy.ldm.modules.attention import REGISTERED_ATTENTION_FUNCTIONS

        from gen_accel.processors import SparseProcessor

        dense: Any = "stock"
        if backend.startswith(_CARRIER):
            dense = SparseProcessor(dense=backend.removeprefix(_CARRIER)).dense  # checks it
        elif backend in REGISTERED_ATTENTION_FUNCTIONS:
            dense = REGISTERED_ATTENTION_FUNCTIONS[backend]
        elif backend != _OWN:
            raise ValueError(
                f"backend={backend!r}: this ComfyUI has {', '.join(REGISTERED_ATTENTION_FUNCTIONS)}"
            )
        return io.NodeOutput(install(model, dense=dense))


NODES = [SparseAttention, SpaAttn, Gna, GnaSuggest, DenseBackend]
