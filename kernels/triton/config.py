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
_KEYS = 64  # per tile of a quantised call, at most
_RUNGS = 4  # of a ladder that are worth timing: those below save registers that nobody lacks
DENSITIES = (0.15, 0.35, 1.0)  # upper ends of the bands a configuration is tuned for


class Config(NamedTuple):
    """How a launch is compiled.

    Attributes:
        rows: Queries per tile.
        keys: Keys per tile.
        warps: Warps per program.
        stages: Tiles of keys and values in flight.
        tma: Read keys and values through tensor descriptors.
        together: Wait for a tile's keys and values at once. No barrier stands between its two
            products then, so one warp group's softmax may overlap with another's products.
        programs: Programs that are to fit on a multiprocessor; more than 1 limits registers.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool
    together: bool = False
    programs: int = 1


class Key(NamedTuple):
    """What the choice depends on.

    Attributes:
        capability: 90 for Hopper; 0 for a device that is not NVIDIA's.
        head_dim: Padded to a power of two, 16..256.
        dtype: ``"bf16"`` or ``"fp16"``.
        block: Queries and keys per mask block, or the powers of two above them.
        masked: Whether some blocks need an element rule, or stand-ins carry variances: either takes
            registers.
        tail: Whether stand-ins are scored.
        precision: How the call is quantised, a name of `quant.PRECISIONS`, or ``""``.
    """

    capability: int
    head_dim: int
    dtype: str
    block: tuple[int, int]
    masked: bool = False
    tail: bool = False
    precision: str = ""


# Shared memory a program may take, in bytes.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
DEVICES = (80, 89, 90, 100, 120)  # what configurations are shipped and compiled for


class _Ladder(NamedTuple):
    """Tiles that need ever fewer registers, and the first that compiles without spilling them.

    ``first``: for lists alone, with an element rule, with stand-ins, with both.
    """

    tiles: tuple[tuple[int, ...], ...]  # rows, keys, warps, stages, and programs where not 1
    first: tuple[int, int, int, int]


_D64 = ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2))
_D128 = ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2),
         (64, 64, 8, 2), (64, 32, 8, 2))  # fmt: skip
_D256 = ((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2))
# On Hopper a tile that is loaded must be two steps away, or its way is waited for: three stages.
# Short of that, two programs wait in turn.
_H64 = ((128, 128, 8, 3, 2), (128, 128, 8, 3), *_D64)
_H128 = ((128, 128, 8, 3), (128, 64, 8, 2, 2), *_D128)
_LOW = ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2))
_LOW256 = _D256[2:]

# (family, padded head_dim): tiles of 128 queries where they fit, and of 64 for rows that do not
# merge. Families: mma (Ampere, Ada), wgmma (Hopper), tcgen05 (sm_100), mma with TMA (sm_120).
_LADDERS = {
    (80, 64): (_Ladder(_D64, (1, 1, 1, 3)), _Ladder(_LOW, (0, 0, 0, 0))),
    (80, 128): (_Ladder(_D128, (1, 2, 1, 5)), _Ladder(_LOW, (3, 2, 3, 2))),
    (80, 256): (_Ladder(_D256, (3, 3, 3, 3)), _Ladder(_LOW256, (1, 1, 1, 1))),
    (90, 64): (_Ladder(_H64, (0, 1, 1, 1)), _Ladder(_LOW, (0, 0, 0, 0))),
    (90, 128): (_Ladder(_H128, (0, 3, 0, 3)), _Ladder(_LOW, (0, 0, 0, 0))),
    (90, 256): (_Ladder(_D256, (0, 2, 1, 3)), _Ladder(_LOW256, (0, 0, 0, 1))),
    (100, 64): (_Ladder(_D64, (0, 0, 0, 0)), _Ladder(_LOW, (0, 0, 0, 0))),
    (100, 128): (_Ladder(_D128, (0, 1, 0, 1)), _Ladder(_LOW, (0, 0, 2, 0))),
    (100, 256): (_Ladder(_D256, (0, 2, 1, 4)), _Ladder(_LOW256, (0, 0, 0, 2))),
    (120, 64): (_Ladder(_D64, (0, 1, 0, 1)), _Ladder(_LOW, (0, 0, 0, 0))),
    (120, 128): (_Ladder(_D128, (1, 3, 3, 3)), _Ladder(_LOW, (0, 0, 0, 2))),
    (120, 256): (_Ladder(_D256, (3, 3, 3, 4)), _Ladder(_LOW256, (1, 1, 1, 2))),
}


# Quantised calls: tiles of keys are those that share a scale, whatever stands here; tiles of
# stand-ins are as given. Triton 3.6 knows no int8 tcgen05: sm_100 multiplies codes as sm_120 does.
_CODES = ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 3), (64, 64, 8, 2),
          (64, 32, 8, 2), (64, 16, 8, 2))  # fmt: skip
_LOW_CODES = ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), *_CODES[3:])
_QUANTISED = {
    (80, 64): (_Ladder(_CODES, (0, 0, 0, 2)), _Ladder(_LOW_CODES, (0, 0, 0, 0))),
    (80, 128): (_Ladder(_CODES, (0, 1, 0, 5)), _Ladder(_LOW_CODES, (3, 3, 3, 5))),
    (80, 256): (_Ladder(_CODES, (3, 3, 3, 5)), _Ladder(_LOW_CODES, (3, 3, 3, 5))),
    (90, 64): (_Ladder(_CODES, (0, 0, 0, 0)), _Ladder(_LOW_CODES, (0, 0, 0, 0))),
    (90, 128): (_Ladder(_CODES, (0, 0, 0, 0)), _Ladder(_LOW_CODES, (0, 0, 0, 0))),
    (90, 256): (_Ladder(_CODES, (3, 3, 3, 3)), _Ladder(_LOW_CODES, (3, 3, 3, 3))),
    (100, 64): (
        _Ladder(((128, 64, 4, 2), *_CODES), (0, 2, 2, 3)),
        _Ladder(_LOW_CODES, (0, 0, 0, 3)),
    ),
    (100, 128): (_Ladder(_CODES, (0, 0, 3, 3)), _Ladder(_LOW_CODES, (0, 0, 3, 3))),
    (100, 256): (_Ladder(_CODES, (3, 3, 3, 5)), _Ladder(_LOW_CODES, (3, 3, 3, 5))),
    (120, 64): (_Ladder(_CODES, (1, 1, 1, 0)), _Ladder(_LOW_CODES, (0, 0, 0, 0))),
    (120, 128): (_Ladder(_CODES, (0, 0, 3, 3)), _Ladder(_LOW_CODES, (0, 0, 3, 3))),
    (120, 256): (_Ladder(_CODES, (3, 3, 5, 6)), _Ladder(_LOW_CODES, (3, 3, 5, 6))),
}


def candidates(key: Key, rows: int | None = None) -> list[Config]:
    """Configurations worth timing, the best guess first.

    All have tiles of keys that divide the mask block. Tiles higher than the mask block are merged
    from several mask rows; those of 64 queries serve what does not merge.

    Args:
        key: The call.
        rows: Only tiles of this height.
    """
    family = max((f for f in (80, 90, 100, 120) if f <= key.capability), default=80)
    table, most = (_QUANTISED, _KEYS) if key.precision else (_LADDERS, key.block[1])
    ladders = table[family, max(64, key.head_dim)]
    together = family == 90 and key.head_dim <= 128  # plain lists spill at 256
    kind = key.masked + 2 * key.tail
    found = []
    for ladder in ladders if rows is None else ladders[::-1]:
        for height, keys, warps, stages, *programs in ladder.tiles[ladder.first[kind] :][:_RUNGS]:
            if rows in (None, height):
                if key.precision and not key.tail:
                    keys = most
                keys = min(keys, most, key.block[1])
                fixed = (height, keys, warps, stages, family >= 90, together)
                found.append(Config(*fixed, *programs))
    found += [config._replace(stages=config.stages + 1) for config in found]
    found = [c for c in found if _fits(c, key)]
    return list(dict.fromkeys(found))


def _fits(config: Config, key: Key) -> bool:
    """Whether a multiprocessor has the shared memory; each program costs it another 1024 bytes."""
    limit = SHARED[max((c for c in SHARED if c <= key.capability), default=80)]
    return config.programs * (_shared(config, key) + 1024) <= limit + 1024


def _shared(config: Config, key: Key) -> int:
    """Bytes of shared memory, roughly: tiles of keys and values, and what wgmma reads beside."""
    heavy = key.masked and key.tail  # may carry variances, which need the queries' squares
    row = {"": 4, "int8": 3}.get(key.precision, 2)  # bytes of a key's channel and its value's
    loops = row * config.stages * (_KEYS if key.precision else config.keys)
    tail = (3 if heavy else 2) * (2 if config.tma else 1) * min(64, config.keys)
    queries = (2 if heavy else 1) * config.rows if key.capability in (90, 100) else 0
    return key.head_dim * (2 * queries + max(loops, 2 * tail if key.tail else 0))


def choose(key: Key, rows: int | None = None, density: Callable[[], float] | None = None) -> Config:
    """The tuned configuration of this key, or the best guess.

    Args:
        key: The call.
        rows: Only tiles of this height, for mask rows that are not merged.
        density: Kept share of the call; asked only where the table's bands differ, because the
            answer may have to be waited for.
    """
    bands = tuned().get(key)
    if rows is not None or not bands:
        return candidates(key, rows)[0]
    if len(set(bands.values())) == 1 or density is None:
        return bands[max(bands)]
    kept = density()
    return bands[min((b for b in bands if kept <= b), default=max(bands))]


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
