"""Which tile sizes the forward kernel runs with on which device.

Nothing here has been timed: `tuned.json` is written by ``gen-accel bench tune`` on a GPU and is
empty so far. Until then a call takes the first of `candidates`, an educated guess of which is only
known that it compiles without spilling registers and fits the device (docs/kernels.md).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

TUNED = Path(__file__).with_name("tuned.json")
DENSITIES = (0.15, 0.35, 1.0)  # upper ends of the bands a configuration is tuned for


class Config(NamedTuple):
    """How a launch is compiled.

    Attributes:
        rows: Queries per tile.
        keys: Keys per tile.
        warps: Warps per program.
        stages: Software pipeline of the loops over listed blocks. Where the compiler prefetches the
            index list too, it keeps one tile of keys and values fewer than this.
        tma: Read keys and values through tensor descriptors.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool


class Key(NamedTuple):
    """What the choice depends on.

    Attributes:
        capability: 90 for Hopper; 0 for a device that is not NVIDIA's.
        head_dim: Padded to a power of two, 16..256.
        dtype: ``"bf16"`` or ``"fp16"``.
        block: Queries and keys per mask block.
        masked: Whether some blocks need an element rule.
        tail: Whether stand-ins are scored.
    """

    capability: int
    head_dim: int
    dtype: str
    block: tuple[int, int]
    masked: bool = False
    tail: bool = False


# Shared memory a program may take, in bytes.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
DEVICES = (80, 89, 90, 100, 120)  # what configurations are shipped and compiled for


def candidates(key: Key) -> list[Config]:
    """Configurations worth timing, the best guess first.

    All have tiles of keys that divide the mask block. Tiles higher than the mask block are merged
    from several mask rows; those of 64 queries serve what does not merge.
    """
    tma = key.capability >= 90
    wide = key.head_dim > 128
    roomy = key.capability in (80, 90, 100)
    # Where scores are masked or stand-ins follow, 128 x 128 scores leave too few registers.
    heavy = key.masked or key.tail or wide or not tma or not roomy
    if wide and not roomy:
        shapes = [(64, 32, 4), (64, 32, 8)]
    elif wide:
        shapes = [(128, 32 if key.capability == 80 else 64, 8), (64, 64, 4)]
    elif heavy:
        shapes = [(128, 64, 8), (128, 32, 8), (64, 64, 4)]
    else:
        shapes = [(128, 128, 8), (128, 64, 8), (64, 64, 4)]
    stages = (2, 3) if wide or not roomy else (3, 2, 4)
    found = [
        Config(rows, min(keys, key.block[1]), warps, depth, tma)
        for depth in stages
        for rows, keys, warps in shapes
    ]
    limit = SHARED[max((c for c in SHARED if c <= key.capability), default=80)]
    return list(dict.fromkeys(c for c in found if _shared(c, key) <= limit))


def _shared(config: Config, key: Key) -> int:
    """Bytes of shared memory, an upper bound: queries, and a tile of K and of V per buffer."""
    buffers = max(1, config.stages - 1) + key.masked
    return 2 * key.head_dim * (config.rows + 2 * buffers * config.keys) + 1024


def choose(key: Key, rows: int | None = None, density: Callable[[], float] | None = None) -> Config:
    """The tuned configuration of this key, or the best guess.

    Args:
        key: The call.
        rows: Only tiles of this height, for those that are not merged.
        density: Kept share of the call; asked only where the table has more than one band, because
            the answer may have to be waited for.
    """
    fits = [c for c in candidates(key) if rows is None or c.rows == rows]
    bands = tuned().get(key, {})
    if rows is None and bands:
        if len(bands) == 1 or density is None:
            return bands[max(bands)]
        kept = density()
        return bands[min((b for b in bands if kept <= b), default=max(bands))]
    if not fits:  # no guess has this height
        best = candidates(key)[0]
        return best._replace(rows=rows or best.rows, warps=4 if rows and rows <= 64 else best.warps)
    return fits[0]


@functools.cache
def tuned() -> dict[Key, dict[float, Config]]:
    """Timed configurations: key -> upper end of a density band -> configuration."""
    table: dict[Key, dict[float, Config]] = {}
    for row in read(TUNED):
        key = Key(**{**row["key"], "block": tuple(row["key"]["block"])})
        table.setdefault(key, {})[row["density"]] = Config(**row["config"])
    return table


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a table, none where there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def entry(key: Key, density: float, config: Config, **about: Any) -> dict[str, Any]:
    """An entry of a table, with whatever says where it comes from."""
    key_fields = {**key._asdict(), "block": list(key.block)}
    return {"key": key_fields, "density": density, "config": config._asdict(), **about}


def dump(entries: Iterable[dict[str, Any]]) -> str:
    """The text of `TUNED`, one entry a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in entries) + "\n]\n"
