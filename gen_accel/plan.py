"""The plan: what was decided for every layer and head, and the file it is kept in."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_accel.kernels.blocks import Blocks
from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.axis import AXIS_ORDERS, AxisOrder, axis_order
from gen_accel.order.curve import CurveOrder
from gen_accel.precision import HeadPrecisions

FORMAT = "gen_accel.plan"
VERSION = 3  # 1: axis orders only; 2: curves; 3: precisions. Written: the oldest that is enough
BLOCK_SIZES = (16, 32, 64, 128)


class PlanError(ValueError):
    """A plan that is damaged, foreign, or made for another model or grid."""


def default_block_size(grid: TokenGrid) -> int:
    """Largest block that still cuts the video into at least 64 blocks."""
    return max((b for b in BLOCK_SIZES if grid.numel >= 64 * b), default=BLOCK_SIZES[0])


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer: an order per head, and per step group the video blocks each head keeps.

    Attributes:
        orders: Axis order of each head, or the curve they share.
        masks: bool ``[groups, heads, n, n]`` on the CPU, ``n`` whole video blocks.
        mass_kept: Softmax mass the kept blocks hold, one number per step group, 0..1.
        precision: Of each head, or None: the processor says.
    """

    orders: AxisOrder | CurveOrder
    masks: Tensor
    mass_kept: tuple[float, ...]
    precision: HeadPrecisions | None = None

    @property
    def order_names(self) -> list[str]:
        """Name of each head's order."""
        if isinstance(self.orders, AxisOrder):
            return [AXIS_ORDERS[order] for order in self.orders.heads]
        return ["curve"] * self.masks.shape[1]

    def heads(self, heads: slice) -> LayerPlan:
        """The same layer for some of its heads (tensor and context parallelism)."""
        orders = self.orders
        if isinstance(orders, AxisOrder):
            orders = AxisOrder(orders.heads[heads])
        precision = None if self.precision is None else self.precision.heads(heads)
        return LayerPlan(orders, self.masks[:, heads], self.mass_kept, precision)

    def blocks(
        self, group: int, layout: TokenLayout, block: int, device: torch.device, text: int
    ) -> Blocks:
        """Block lists for the ordered sequence ``[video, text]``.

        Whatever is not a whole video block (the ragged tail, blocks with text in them) is kept in
        both directions: text sees everything and is seen by everything.

        Args:
            group: Step group.
            layout: Layout of the call.
            block: Tokens per block.
            device: Where the lists are needed.
            text: Text tokens that keys run to; padding behind them is not attended to.
        """
        video = layout.grid.numel // block
        kv_len = layout.grid.numel + text
        rows, cols = -(-layout.tokens // block), -(-kv_len // block)
        mask = self.masks[group].to(device)
        full = torch.ones(1, mask.shape[0], rows, cols, dtype=torch.bool, device=device)
        full[0, :, :video, :video] = mask
        # Where a row keeps all there is, the longest list is known, and a GPU is not asked for it.
        width = cols if rows > video else None
        return Blocks.from_mask(
            full, q_len=layout.tokens, kv_len=kv_len, block_size=block, width=width
        )


@dataclass(eq=False)
class ComponentPlan:
    """The layers of one transformer.

    Attributes:
        model: Transformer class and attention shape the plan belongs to, e.g.
            ``WanTransformer3DModel/30x12x128``.
        sigmas: Lowest noise level of each step group, descending; group ``g`` serves the steps with
            ``sigma >= sigmas[g]`` that no earlier group serves, the last one all the rest.
        layers: Layer index -> plan. Layers that stay dense are absent.
    """

    model: str
    sigmas: tuple[float, ...]
    layers: dict[int, LayerPlan] = field(default_factory=dict)

    def group(self, sigma: float | None) -> int:
        """Step group that serves this noise level."""
        if sigma is not None:
            for index, low in enumerate(self.sigmas):
                if sigma >= low - 1e-6 * abs(low):
                    return index
        return len(self.sigmas) - 1


@dataclass(eq=False, repr=False)
class AttentionPlan:
    """Everything a sparse run needs to know, for one token grid.

    Attributes:
        grid: Token grid the masks were made for.
        block: Tokens per block.
        density: Kept share of the video-to-video blocks that was asked for.
        components: Component name in the pipeline (``"transformer"``) -> its layers.
        info: How it was made: prompts, steps, criterion, seconds, versions.
    """

    grid: TokenGrid
    block: int
    density: float
    components: dict[str, ComponentPlan]
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{name}: {len(part.layers)} layers x {len(part.sigmas)} step groups"
            for name, part in self.components.items()
        )
        return f"AttentionPlan({self.grid}, block={self.block}, density={self.density}, {parts})"

    @property
    def order(self) -> str:
        """``"axis"``, or ``"curve"``."""
        layers = [p for c in self.components.values() for p in c.layers.values()]
        curve = layers and all(isinstance(p.orders, CurveOrder) for p in layers)
        return "curve" if curve else "axis"

    def mass_kept(self) -> float:
        """Mean softmax mass that the kept blocks hold, over components, layers and groups."""
        kept = [m for c in self.components.values() for p in c.layers.values() for m in p.mass_kept]
        return float(np.mean(kept)) if kept else 1.0

    def check(self, models: Mapping[str, str]) -> None:
        """Raise `PlanError` unless the plan was made for these transformers.

        Args:
            models: Component name -> its model string, as in `ComponentPlan.model`.
        """
        for name, model in models.items():
            if name not in self.components:
                raise PlanError(
                    f"plan has no part for {name!r} (it has {', '.join(self.components)}): "
                    "calibrate with the pipeline it is used on"
                )
            if self.components[name].model != model:
                raise PlanError(
                    f"plan was made for {self.components[name].model}, {name} is {model}: "
                    "calibrate again with gen_accel.calibrate(pipe, prompts, ...)"
                )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan: safetensors with masks as bits, and a JSON header. All or nothing.

        Raises:
            OSError: The folder is missing or not writable.
        """
        from safetensors.numpy import save

        tensors: dict[str, np.ndarray] = {}
        parts: dict[str, Any] = {}
        for name, component in self.components.items():
            layers = sorted(component.layers)
            for layer in layers:
                plan = component.layers[layer]
                if isinstance(plan.orders, AxisOrder):
                    orders = np.asarray(plan.orders.heads, dtype=np.uint8)
                    tensors[f"{name}.{layer}.orders"] = orders
                tensors[f"{name}.{layer}.masks"] = np.packbits(plan.masks.numpy().reshape(-1))
            parts[name] = {
                "model": component.model,
                "sigmas": list(component.sigmas),
                "layers": {str(layer): _entry(component.layers[layer]) for layer in layers},
            }
        header: dict[str, Any] = {
            "format": FORMAT,
            "version": self._version(),
            "grid": list(self.grid),
            "block": self.block,
            "density": self.density,
            "components": parts,
            "info": self.info,
        }
        if self.order != "axis":
            header["order"] = self.order
        header["digest"] = _digest(header, tensors)
        path = Path(path)
        data = save(tensors, metadata={FORMAT: json.dumps(header)})
        # A temporary file would be its owner's alone; one in a temporary folder is like any other.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            scratch = Path(folder) / path.name
            scratch.write_bytes(data)
            os.replace(scratch, path)
        return path

    def _version(self) -> int:
        layers = [plan for c in self.components.values() for plan in c.layers.values()]
        if any(plan.precision is not None for plan in layers):
            return 3
        return 1 if self.order == "axis" else 2

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionPlan:
        """Read a plan file.

        Raises:
            FileNotFoundError: There is no such file.
            PlanError: It is not a plan, it is damaged, or a newer version wrote it.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"plan {path}: no such file; make one with gen-accel calibrate")
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get(FORMAT, "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise PlanError(f"plan {path}: not a readable plan file ({error})") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise PlanError(f"plan {path}: a safetensors file, but not one that gen_accel wrote")
        if header.get("version") not in range(1, VERSION + 1):
            raise PlanError(
                f"plan {path}: format version {header.get('version')}, this gen_accel reads "
                f"1 to {VERSION}; update gen_accel or calibrate again"
            )
        if header.pop("digest", None) != _digest(header, tensors):
            raise PlanError(f"plan {path}: damaged (checksum differs); calibrate again")
        try:
            return cls._from_parts(header, tensors)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise PlanError(f"plan {path}: damaged header ({error!r}); calibrate again") from error

    @classmethod
    def _from_parts(cls, header: dict[str, Any], tensors: dict[str, np.ndarray]) -> AttentionPlan:
        grid, block = TokenGrid(*header["grid"]), int(header["block"])
        video = grid.numel // block
        order = header.get("order", "axis")
        if order not in ("axis", "curve"):
            raise ValueError(f"order {order!r} is unknown")
        components = {}
        for name, part in header["components"].items():
            component = ComponentPlan(part["model"], tuple(part["sigmas"]))
            for layer, entry in part["layers"].items():
                groups, heads, rows, cols = entry["shape"]
                orders: AxisOrder | CurveOrder = CurveOrder()
                known = heads
                if order == "axis":
                    orders = axis_order(tensors[f"{name}.{layer}.orders"].tolist())
                    known = len(orders.heads)
                if [groups, heads, rows, cols] != [len(component.sigmas), known, video, video]:
                    raise ValueError(f"layer {layer} of {name} does not fit grid {grid}")
                bits = np.unpackbits(
                    tensors[f"{name}.{layer}.masks"], count=groups * heads * rows * cols
                )
                masks = torch.from_numpy(bits.astype(bool)).view(groups, heads, rows, cols)
                precision = None
                if "precision" in entry:
                    precision = HeadPrecisions(tuple(entry["precision"]))
                    if len(precision.names) != heads:
                        raise ValueError(f"layer {layer} of {name} has {heads} heads")
                component.layers[int(layer)] = LayerPlan(
                    orders, masks, tuple(entry["mass_kept"]), precision
                )
            components[name] = component
        return cls(grid, block, float(header["density"]), components, header["info"])


def _entry(plan: LayerPlan) -> dict[str, Any]:
    """What the header says of a layer."""
    entry = {"shape": list(plan.masks.shape), "mass_kept": list(plan.mass_kept)}
    return entry if plan.precision is None else {**entry, "precision": list(plan.precision.names)}


def _digest(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].tobytes())
    return digest.hexdigest()
