"""PARO, its plans as files, and the report: nodes that look at a run that is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from gen_accel.comfy import widgets
from gen_accel.comfy.patch import install, last_run
from gen_accel.comfy.report import density_map, report

_CALIBRATE = "none: calibrate"
_SUFFIX = ".safetensors"


class Paro(io.ComfyNode):
    """PAROAttention."""

    @classmethod
    def define_schema(cls) -> Any:  # noqa: D102
        return io.Schema(
            node_id="GenAccelParo",
            display_name="PARO Attention",
            category=widgets.ATTENTION,
            description="A token order per head and a static mask (arXiv 2506.16054). Without a "
            "plan the last dense step of every run is watched to make one.",
            inputs=[
                widgets.model_input(),
                widgets.density(0.3),
                io.Combo.Input(
                    "plan",
                    options=[
                        _CALIBRATE,
                        *sorted(p.name for p in _plan_folder().glob("*" + _SUFFIX)),
                    ],
                    default=_CALIBRATE,
                    tooltip="A plan that Save Attention Plan wrote, for this model and resolution.",
                ),
                io.Combo.Input(
                    "order",
                    options=["axis", "curve", "raster"],
                    default="axis",
                    tooltip="One of six axis orders per head (the paper's), or one order for all.",
                ),
                widgets.tail("drop"),
                *widgets.schedule(),
            ],
            outputs=[widgets.model_output()],
        )

    @classmethod
    def execute(  # noqa: D102
        cls, model: Any, density: float, plan: str, order: str, tail: str, **schedule: Any
    ) -> Any:
        from gen_accel.plan import AttentionPlan
        from gen_accel.processors import ParoProcessor

        shared, patch = widgets.settings(**schedule)
        policy = ParoProcessor(
            density=density,
            plan=None if plan == _CALIBRATE else AttentionPlan.load(_plan_file("plan", plan)),
            order=order,
            tail=tail,
            **shared,
        )
        return io.NodeOutput(install(model, policy=policy, **patch))


class SavePlan(io.ComfyNode):
    """The plan of the last run as a file."""

    @classmethod
    def define_schema(cls) -> Any:  # noqa: D102
        return io.Schema(
            node_id="GenAccelSavePlan",
            display_name="Save Attention Plan",
            category=widgets.ATTENTION,
            description="Writes the plan that PARO Attention made in the last run, for its plan "
            "input: calibrate once per model and resolution.",
            inputs=[
                io.Model.Input("model", tooltip="Model that PARO Attention patched."),
                _after(),
                io.String.Input("name", default="plan", tooltip="Name of the file, no folders."),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="Where the plan is.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, after: Any, name: str) -> Any:  # noqa: D102
        plan = last_run(model).plan
        if plan is None:
            raise ValueError(
                "model: its last run made no plan; use PARO Attention, with a sparse step or more"
            )
        path = plan.save(_plan_file("name", name))
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"{path}\n{plan!r}"))


class Report(io.ComfyNode):
    """What attention did in the last run."""

    @classmethod
    def define_schema(cls) -> Any:  # noqa: D102
        return io.Schema(
            node_id="GenAccelReport",
            display_name="Attention Report",
            category=widgets.ATTENTION,
            description="What our nodes did in the last run of a model: kept density by step and "
            "block, why calls stayed dense, and the time.",
            inputs=[
                io.Model.Input("model", tooltip="Model that a gen_accel node patched."),
                _after(),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The latent, unchanged."),
                io.String.Output("report", display_name="report", tooltip="The report as text."),
                io.Image.Output(
                    "density_map",
                    display_name="density_map",
                    tooltip="Kept density: steps downwards, blocks to the right; white is dense.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, after: Any) -> Any:  # noqa: D102
        run = last_run(model)
        text = report(run)
        return io.NodeOutput(after, text, density_map(run), ui=ui.PreviewText(text))


def _after() -> Any:
    return io.Latent.Input("after", tooltip="The sampler's LATENT: this node runs after it.")


def _plan_folder() -> Path:
    import folder_paths

    folder = Path(folder_paths.models_dir) / "attention_plans"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _plan_file(widget: str, name: str) -> Path:
    """A file of that folder and of no other, whatever a workflow says."""
    name = name.removesuffix(_SUFFIX)
    if not name or name.startswith(".") or not all(c.isalnum() or c in "-_. " for c in name):
        raise ValueError(f"{widget}={name!r}: use letters, digits, spaces, dots, - and _")
    return _plan_folder() / (name + _SUFFIX)


NODES = [Paro, SavePlan, Report]
