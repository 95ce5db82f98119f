"""How long a forward of a published model takes, from counted work and the rates of a device.

A forward is matrix products, attention, and element-wise passes over activations; each is counted
from the architecture and divided by what the device does per second. Launch costs, the VAE and the
text encoder are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gen_accel.layout import TokenGrid
from gen_accel.published import Published

# Reads and writes of an activation [tokens, width] by the eager operations of one block: norms,
# modulation, RoPE, gates and residuals, counted in diffusers' code; the feed-forward network's
# activation comes on top.
_PASSES = {"wan": 48, "cosmos": 48, "hunyuan_video": 40, "flux": 40}
# Order of q, k and v, and the inverse of the result: each is read and written.
_ORDER_PASSES = 8


@dataclass(frozen=True)
class Rates:
    """What a device does per second.

    Attributes:
        linear: FLOP/s of matrix products.
        attention: FLOP/s of dense attention.
        sparse: Density -> FLOP/s on kept blocks.
        windows: The same where neighbouring rows share their lists, as in windows, which a carrier
            may read once; empty says no different.
        memory: Bytes/s that element-wise operations read and write.
        bytes: Bytes per number.
        source: Where these come from.
    """

    linear: float
    attention: float
    sparse: Mapping[float, float]
    memory: float
    bytes: int = 2
    source: str = ""
    windows: Mapping[float, float] = field(default_factory=dict)

    def sparse_at(self, density: float, windows: bool = False) -> float:
        """Rate at a density, linear between those known, constant outside."""
        known = sorted((windows and self.windows or self.sparse).items())
        for (d0, r0), (d1, r1) in zip(known, known[1:]):
            if d0 <= density <= d1:
                return r0 + (r1 - r0) * (density - d0) / (d1 - d0)
        return known[0][1] if density < known[0][0] else known[-1][1]


# Nothing of ours has run on a GPU. torch alone reached 770 to 800 TFLOP/s and 4.3 TB/s on one H200;
# models reach less. Attention is the rate published for cuDNN, the sparse one our kernel's target.
ASSUMED = {"h200": Rates(650e12, 576e12, {1.0: 480e12}, 3.4e12, source="assumed, see docs/cli.md")}


@dataclass(frozen=True)
class Forecast:
    """Seconds of one forward, by part.

    Attributes:
        linear: Matrix products.
        elementwise: Norms, RoPE, gates, activations.
        attention: Self-attention, dense.
        sparse: Self-attention at the density, with its token order.
    """

    linear: float
    elementwise: float
    attention: float
    sparse: float

    @property
    def dense_forward(self) -> float:
        """Seconds of a dense forward."""
        return self.linear + self.elementwise + self.attention

    @property
    def sparse_forward(self) -> float:
        """Seconds of a sparse one."""
        return self.linear + self.elementwise + self.sparse

    @property
    def attention_share(self) -> float:
        """Share of attention in a dense forward."""
        return self.attention / self.dense_forward

    def run(self, steps: int, dense_steps: int, forwards: int = 1) -> float:
        """Seconds of a run with so many dense steps."""
        dense = dense_steps * self.dense_forward
        return forwards * (dense + (steps - dense_steps) * self.sparse_forward)


def matrix_flop(model: Published, tokens: int) -> float:
    """FLOP of the matrix products of one forward, without embeddings and modulation.

    Args:
        model: The model.
        tokens: Of the video.
    """
    d, text = model.width, model.text
    joint = tokens + text
    if model.family in ("hunyuan_video", "flux"):
        # q, k, v, out and both sides of a network four times as wide; fused in the single blocks.
        return 2.0 * sum(model.layers.values()) * (4 * d + 2 * model.ffn) * d * joint
    text_width = 1024 if model.family == "cosmos" else d
    per_layer = (4 * d * d + 2 * d * d + 2 * d * model.ffn) * tokens + 2 * d * text_width * text
    cross = 2 * d * tokens * text
    return 2.0 * model.depth * (per_layer + cross)


def attention_flop(model: Published, tokens: int) -> float:
    """FLOP of dense self-attention of one forward."""
    length = tokens + (model.text if model.family in ("hunyuan_video", "flux") else 0)
    return 4.0 * model.depth * model.width * length**2


def forecast(
    model: Published, grid: TokenGrid, density: float, rates: Rates, windows: bool = False
) -> Forecast:
    """Seconds of one forward.

    Args:
        model: The model, maybe `Published.cut`.
        grid: Its tokens.
        density: Kept share of all pairs of tokens in a sparse call, text included.
        rates: Of the device.
        windows: The blocks kept are those of windows.
    """
    tokens = grid.numel
    flop = attention_flop(model, tokens)
    pass_seconds = tokens * model.width * rates.bytes / rates.memory
    feed = 2 * model.ffn / model.width
    return Forecast(
        linear=matrix_flop(model, tokens) / rates.linear,
        elementwise=model.depth * (_PASSES[model.family] + feed) * pass_seconds,
        attention=flop / rates.attention,
        sparse=density * flop / rates.sparse_at(density, windows)
        + model.depth * _ORDER_PASSES * pass_seconds,
    )


def _plain(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``bench kernel`` is of 16-bit attention alone: not quantised or ordered."""
    config = row["config"]
    other = {"precision", "places"} & config.keys() or row["name"].startswith("sageattention")
    return "tflop" in config and not other


def read_rates(rows: Iterable[Mapping[str, Any]], case: str | None = None) -> Rates:
    """Rates from result rows: of ``bench e2e`` (kind ``"rate"``) or of ``bench kernel``.

    Args:
        rows: Result rows; of those alike the last counts, and only the device measured last.
        case: Of ``bench kernel``: the case whose calls are meant; None takes the fastest.

    Raises:
        ValueError: Something is missing.
    """
    found: dict[str, float] = {}
    sparse: dict[float, float] = {}
    windows: dict[float, float] = {}
    number, source = 2, ""
    rows = list(rows)
    for row in rows:
        config = row["config"]
        if row["device"] != rows[-1]["device"]:
            continue
        if row["kind"] == "rate":
            lists = {"sparse": sparse, "windows": windows}.get(row["name"].split()[0])
            if lists is not None:
                lists[round(config["density"], 4)] = row["value"]
            else:
                found[row["name"]] = row["value"]
            number = {"fp32": 4}.get(config["dtype"], 2)
            source = f"measured on {row['device']}"
        elif row["kind"] == "kernel" and case in (None, config["case"]) and _plain(row):
            rate = 1e15 * config["tflop"] / row["value"]
            if config["lists"] == "dense":
                found["attention"] = max(rate, found.get("attention", 0.0))
            elif config["lists"] == "realistic" and config.get("tail") == "drop":
                sparse[round(config["density"], 4)] = rate
            source = f"kernels measured on {row['device']}, the rest assumed"
    if "attention" in found and sparse:
        # `bench kernel` times attention alone.
        linear = found.get("linear", ASSUMED["h200"].linear)
        memory = found.get("memory", ASSUMED["h200"].memory)
        return Rates(linear, found["attention"], sparse, memory, number, source, windows)
    missing = [
        n for n, there in (("attention", "attention" in found), ("sparse", sparse)) if not there
    ]
    raise ValueError(
        f"no rate of {', '.join(missing)} in these rows; run gen-accel bench e2e first"
    )


def describe(
    model: Published, grid: TokenGrid, density: float, steps: int, dense: int, rates: Rates,
    windows: bool = False,
) -> str:  # fmt: skip
    """A forecast as text."""
    found = forecast(model, grid, density, rates, windows)
    length = grid.numel + (model.text if model.family in ("hunyuan_video", "flux") else 0)
    whole = forecast(model, grid, 1.0, rates).run(steps, steps, model.forwards)
    run = found.run(steps, dense, model.forwards)
    digits = max(0, 3 - math.ceil(math.log10(found.dense_forward)))
    seconds = {
        "matrix products": found.linear,
        "element-wise": found.elementwise,
        "attention, dense": found.attention,
        f"attention, density {density:g}": found.sparse,
        "dense forward": found.dense_forward,
        "sparse forward": found.sparse_forward,
    }
    lines = [f"{model.name}, grid {grid}, {length:,} tokens; rates {rates.source}"]
    lines += [f"  {name:28}{value:12.{digits}f} s" for name, value in seconds.items()]
    lines.append(f"  attention is {found.attention_share:.0%} of a dense forward")
    lines.append(
        f"  {steps} steps of {model.forwards} forward(s), {dense} of them dense: "
        f"{run:,.1f} s, dense {whole:,.1f} s, {whole / run:.2f}x"
    )
    return "\n".join(lines)
