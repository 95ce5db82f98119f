"""Published windows, and windows that fit the grids of well-known models."""

from __future__ import annotations

from typing import Any, NamedTuple

from gen_accel.select.window import WHOLE, Window


class Preset(NamedTuple):
    """A setting for one model at one resolution.

    Attributes:
        model: Family and resolution.
        grid: Token grid (frames, height, width).
        size: Window.
        stride: Stride.
        tile_q: Query tile it is perfectly block-sparse on.
        tile_kv: Key tile.
        dense: Denoising steps that were left dense, and all steps; None where nothing is known.
        source: ``"paper"`` (measured there), or ``"ours"`` (fits the grid, quality not measured).
    """

    model: str
    grid: tuple[int, int, int]
    size: tuple[int, int, int]
    stride: tuple[int, int, int]
    tile_q: tuple[int, int, int]
    tile_kv: tuple[int, int, int]
    dense: tuple[int, int] | None
    source: str

    @property
    def window(self) -> Window:
        """The setting on its grid."""
        return Window(self.grid, self.size, self.stride)


def _ours(
    model: str,
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    *settings: tuple[tuple[int, int, int], tuple[int, int, int]],
) -> list[Preset]:
    return [Preset(model, grid, w, s, tile, tile, None, "ours") for w, s in settings]


PRESETS: tuple[Preset, ...] = (
    # GNA, arXiv 2504.16922, tables 2-4: the perfectly block-sparse rows.
    Preset("flux 4096x4096", (1, 256, 256), (WHOLE, 80, 80), (1, 16, 16),
           (1, 16, 16), (1, 16, 8), (9, 28), "paper"),
    Preset("hunyuan_video 768x1280", (30, 48, 80), (18, 24, 24), (16, 8, 8),
           (4, 8, 8), (2, 8, 8), (15, 50), "paper"),
    Preset("hunyuan_video 768x1280", (30, 48, 80), (30, 40, 40), (1, 32, 8),
           (4, 8, 8), (2, 8, 8), (0, 50), "paper"),
    Preset("cosmos 704x1280", (16, 44, 80), (16, 32, 48), (1, 8, 16),
           (8, 4, 8), (4, 4, 8), (12, 35), "paper"),
    Preset("cosmos 704x1280", (16, 44, 80), (16, 24, 16), (1, 8, 16),
           (8, 4, 8), (4, 4, 8), (12, 35), "paper"),
    # One tile for queries and keys that divides the grid; densities of about 1/2, 1/4 and 1/10.
    *_ours("hunyuan_video 720x1280", (33, 45, 80), (3, 5, 8),
           ((27, 35, 64), (3, 5, 16)), ((21, 30, 48), (3, 10, 16)), ((15, 20, 40), (3, 10, 8))),
    *_ours("hunyuan_video 768x1280", (30, 48, 80), (2, 8, 8),
           ((24, 40, 64), (4, 8, 16)), ((18, 32, 48), (2, 16, 16)), ((14, 24, 40), (2, 8, 8))),
    *_ours("wan 720x1280", (21, 45, 80), (3, 5, 8),
           ((18, 35, 64), (6, 5, 16)), ((12, 30, 48), (6, 10, 16)), ((9, 20, 32), (3, 10, 16))),
    *_ours("wan 480x832", (21, 30, 52), (3, 10, 4),
           ((18, 20, 44), (6, 20, 4)), ((12, 20, 32), (6, 20, 8)), ((9, 10, 24), (3, 10, 8))),
    *_ours("cosmos 704x1280", (16, 44, 80), (4, 4, 8),
           ((12, 28, 48), (4, 4, 16)), ((8, 20, 40), (8, 4, 8))),
    *_ours("flux 2048x2048", (1, 128, 128), (1, 16, 8),
           ((WHOLE, 64, 64), (1, 32, 16)), ((WHOLE, 32, 32), (1, 32, 16))),
)  # fmt: skip


# Rectified SpaAttn's scripts: what its authors ran. Steps are shares of their 50 (40 for Wan 2.2
# A14B, whose second expert also had its first step dense, which one share cannot say).
_FIRST_TWO = (0, 1)
SPAATTN: dict[str, dict[str, Any]] = {
    "hunyuan-video": {"density": 0.20, "dense_steps": 0.0},
    "wan2.1-t2v-14b": {"density": 0.25, "dense_steps": 0.1, "dense_layers": _FIRST_TWO},
    "wan2.1-i2v-14b": {"density": 0.25, "dense_steps": 0.0, "dense_layers": _FIRST_TWO},
    "wan2.2-ti2v-5b": {"density": 0.25, "dense_steps": 0.1, "dense_layers": _FIRST_TWO},
    "wan2.2-t2v-a14b": {"density": 0.15, "dense_steps": 0.075, "dense_layers": _FIRST_TWO},
    "wan2.2-i2v-a14b": {"density": 0.15, "dense_steps": 0.0, "dense_layers": _FIRST_TWO},
    "flux-4k": {"density": 0.10, "dense_steps": 0.0, "dense_layers": tuple(range(37, 57))},
}


def spaattn_preset(model: str) -> dict[str, Any]:
    """Settings of `gen_accel.SpaAttnProcessor` for a model.

    Raises:
        ValueError: There is none; the message lists the models.
    """
    if model not in SPAATTN:
        raise ValueError(f"model={model!r}: there are presets for {', '.join(SPAATTN)}")
    wan = {"first_frame": True} if model.startswith("wan") else {}
    return {"top_p": 0.3, "block": 128, **wan, **SPAATTN[model]}


def presets(model: str) -> tuple[Preset, ...]:
    """The presets whose model begins with a name, the densest first.

    Raises:
        ValueError: There is none; the message lists the models.
    """
    found = [p for p in PRESETS if p.model.startswith(model)]
    if not found:
        known = ", ".join(sorted({p.model.split()[0] for p in PRESETS}))
        raise ValueError(f"model={model!r}: presets exist for {known}; see suggest() for others")
    return tuple(sorted(found, key=lambda preset: -preset.window.density))
