"""``gen-accel bench ground``: how well RefAM's maps answer expressions, and what each part adds.

Choices (noise level, blocks, blur) are made on validation scenes and frozen in
``pipelines/refam/chosen.json`` (``--choose``); numbers come from held-out scenes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.options import TOY_MODEL, add, positive

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.cli.bench.ground_score import Item
    from gen_accel.pipelines.refam.backbone import Backbone
    from gen_accel.pipelines.refam.reading import Reading

SIGMAS = (0.1, 0.25, 0.5, 0.75)
BLURS = (0.0, 0.5, 1.0)
BATCH = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, *TOY_MODEL, "table")
    parser.add_argument("--expressions", type=positive, default=520, help="how many")
    parser.add_argument(
        "--choose", action="store_true", help="choose layers and noise on validation scenes"
    )


def run(args: argparse.Namespace) -> int:
    """Choose on validation scenes, or measure on held-out ones."""
    import torch

    from gen_accel.eval.toys import load_toy, toy_call
    from gen_accel.pipelines.refam.backbone import Backbone

    length = toy_call(args.model)["max_sequence_length"]
    backbone = Backbone(load_toy(args.model, args.folder), max_sequence_length=length)
    with torch.no_grad():
        return _choose(backbone, args) if args.choose else _measure(backbone, args)


# -- choices -----------------------------------------------------------------------------------


def _choose(backbone: Backbone, args: argparse.Namespace) -> int:
    """Noise level, blocks and blur of each direction, by mean average precision on ``val``."""
    from tqdm import tqdm

    from gen_accel.cli.bench.ground_score import Readout, heat, items, only, pixels, read_batch
    from gen_accel.eval.files import write_text
    from gen_accel.eval.grounding import average_precision
    from gen_accel.pipelines.probe import block_names
    from gen_accel.pipelines.refam import pipeline
    from gen_accel.pipelines.refam.heatmap import DIRECTIONS

    blocks = len(block_names(backbone.transformer))
    windows = [tuple(range(a, b)) for a in range(blocks) for b in range(a + 1, blocks + 1)]
    found = items("val", args.expressions, pictures=backbone.flow is None)
    maps: dict[tuple[str, float, tuple[int, ...]], list[Tensor]] = {}
    bar = tqdm(total=len(SIGMAS) * len(found), desc="validation", unit="forward")
    for sigma in SIGMAS:
        every = pipeline.Choice(dict.fromkeys(range(blocks)), sigma=sigma)
        for first in range(0, len(found), BATCH):
            part = found[first : first + BATCH]
            prompts, reading = read_batch(backbone, part, "appended", every, rows=True)
            for i, prompt in enumerate(prompts):
                for window in windows:
                    one = only(reading.sample(i), dict.fromkeys(window))
                    for direction in DIRECTIONS:
                        readout = Readout("", "", direction=direction)
                        key = direction, sigma, window
                        maps.setdefault(key, []).append(heat(backbone, one, prompt, readout))
            bar.update(len(part))
    bar.close()

    def precision(key: tuple[str, float, tuple[int, ...]], blur: float) -> float:
        values = []
        for heatmap, item in zip(maps[key], found):
            assert item.target is not None
            answer = pixels(backbone, heatmap, item, blur)
            values.append(float(average_precision(answer, item.target)))
        return statistics.fmean(values)

    chosen: dict[str, dict[str, Any]] = {}
    for direction in DIRECTIONS:
        plain = {key: precision(key, 0.0) for key in maps if key[0] == direction}
        best = max(plain, key=lambda key: plain[key])
        blurred = {blur: precision(best, blur) for blur in BLURS}
        blur = max(blurred, key=lambda b: blurred[b])
        chosen[direction] = {
            "sigma": best[1], "blocks": list(best[2]), "blur": blur,
            "average_precision": round(blurred[blur], 4),
        }  # fmt: skip
        print(direction, chosen[direction], {b: round(v, 4) for b, v in blurred.items()})
        for sigma in SIGMAS:
            top = max(windows, key=lambda w: plain[direction, sigma, w])
            everything = plain[direction, sigma, tuple(range(blocks))]
            print(
                f"  sigma {sigma}: blocks {list(top)} {plain[direction, sigma, top]:.3f}, "
                f"all {everything:.3f}"
            )
    best_direction = max(chosen, key=lambda d: chosen[d]["average_precision"])
    path = Path(pipeline.__file__).parent / "chosen.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    table["models"][pipeline.model_key(backbone.transformer)] = {
        "from": f"toy-{args.model}, {len(found)} expressions of validation scenes",
        "direction": best_direction, **chosen,
    }  # fmt: skip
    write_text(path, json.dumps(table, indent=2) + "\n")
    return 0


# -- measurement -------------------------------------------------------------------------------


def _measure(backbone: Backbone, args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from gen_accel.cli.bench import ground_report
    from gen_accel.cli.bench.ground_checks import abstention, overhead, planted
    from gen_accel.cli.bench.ground_score import (
        BASELINES,
        READOUTS,
        Readout,
        attention_mass,
        baseline,
        heat,
        items,
        only,
        pixels,
        read_batch,
        score,
    )
    from gen_accel.eval.files import write_text
    from gen_accel.eval.harness import append_rows
    from gen_accel.pipelines.refam.pipeline import Choice, choose

    started = time.perf_counter()
    pictures = backbone.flow is None
    found = items("test", args.expressions, pictures=pictures)
    directions = dict.fromkeys(r.direction for r in READOUTS)
    choices = {d: choose(backbone.transformer, "auto", d) for d in directions}
    groups: dict[tuple[str, float], list[Readout]] = {}  # what one forward serves
    for readout in READOUTS:
        key = readout.prompt, choices[readout.direction].sigma
        groups.setdefault(key, []).append(readout)
    records: list[dict[str, Any]] = []
    masses: list[tuple[float, float]] = []
    scores: list[tuple[str, float]] = []
    sinks = 0
    bar = tqdm(total=len(found), desc="held out", unit="expression")
    for first in range(0, len(found), BATCH):
        part = found[first : first + BATCH]
        shares: dict[str, list[tuple[float, float]]] = {}
        for (kind, sigma), readouts in groups.items():
            union = {b: None for r in readouts for b in choices[r.direction].heads}
            rows = any(r.direction == "rows" for r in readouts)
            prompts, reading = read_batch(backbone, part, kind, Choice(union, sigma=sigma), rows)
            for i, item in enumerate(part):
                one = reading.sample(i)
                text = only(one, choices["text"].heads)
                if sigma == choices["text"].sigma and kind in ("bare", "magnets"):
                    mass = attention_mass(backbone, text, prompts[i], item)
                    shares.setdefault(kind, []).append(mass)
                    if kind == "magnets":
                        sinks += int(one.sinks.sum())
                        scores.append((item.expression.tier, _peak(backbone, text, prompts[i])))
                for readout in readouts:
                    choice = choices[readout.direction]
                    own = only(one, choice.heads)
                    heatmap = heat(backbone, own, prompts[i], readout, first + i)
                    answer = pixels(backbone, heatmap, item, choice.blur)
                    records.append(score(item, readout.name, first + i, answer, readout.masks))
        pairs = zip(shares["bare"], shares["magnets"])
        masses += [(m[0] / b[0], m[1] / b[1]) for b, m in pairs]
        bar.update(len(part))
    bar.close()
    for number, item in enumerate(found):
        records += [baseline(item, name, number) for name in BASELINES]
    absent = [
        (item.expression.tier, peak)
        for item, peak in _peaks(
            backbone, items("test", 200, targets=False, pictures=pictures), choices["text"]
        )
    ]
    results = ground_report.conditions(records)
    results += ground_report.hypotheses(records, masses, sinks, len(found))
    results += abstention(scores, absent)
    results += planted(backbone, found[:40], choices["text"])
    for direction in ("text", "joint"):
        results += overhead(backbone, found[:1], choices[direction])
    print(ground_report.page(results))
    print(f"{time.perf_counter() - started:.0f} s")
    for row in results:
        row["model"] = f"toy-{args.model}"
    if args.out:
        append_rows(args.out, results)
    if args.table:
        write_text(args.table, ground_report.page(results) + "\n")
    return 0


def _peaks(backbone: Backbone, found: list[Item], choice: Any) -> list[tuple[Item, float]]:
    from gen_accel.cli.bench.ground_score import read_batch

    out = []
    for first in range(0, len(found), BATCH):
        part = found[first : first + BATCH]
        prompts, reading = read_batch(backbone, part, "magnets", choice)
        out += [
            (item, _peak(backbone, reading.sample(i), prompts[i])) for i, item in enumerate(part)
        ]
    return out


def _peak(backbone: Backbone, reading: Reading, prompt: Any) -> float:
    from gen_accel.pipelines.refam.pipeline import answer

    return answer(backbone, reading, prompt).score
