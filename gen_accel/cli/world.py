"""``gen-accel world``: look at the procedural world, or measure a toy model in it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds ``world`` and ``world gate`` to the command line."""
    parser = subparsers.add_parser("world", help="write a clip with its ground truth; gate a model")
    parser.add_argument("--seed", type=int, default=0, help="which scene of the test split")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/world"), help="folder to write to"
    )
    parser.add_argument("--toy", action="store_true", help="the simpler world the models saw")
    parser.set_defaults(action="draw")
    gate = parser.add_subparsers(metavar="gate").add_parser(
        "gate", help="measure a toy model against its bars"
    )
    gate.add_argument("--model", required=True, help="hunyuan-video, wan or flux")
    gate.add_argument("--folder", type=Path, help="where it is, if not in models/")
    gate.add_argument("--samples", type=int, default=200, help="samples of the attribute bar")
    gate.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    gate.add_argument("--clips", type=int, default=8, help="clips of the inversion bar")
    gate.add_argument("--maps", type=int, default=40, help="clips of the word map bar")
    gate.add_argument("--json", type=Path, help="append one JSON line per figure to this file")
    gate.set_defaults(action="gate")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command; 1 when a bar was missed."""
    return _gate(args) if args.action == "gate" else _draw(args)


def _draw(args: argparse.Namespace) -> int:
    from gen_accel.eval.world.caption import describe
    from gen_accel.eval.world.files import write_clip
    from gen_accel.eval.world.render import render
    from gen_accel.eval.world.scene import FULL, TOY, sample_scene

    clip = render(sample_scene(args.seed, TOY if args.toy else FULL))
    print(describe(clip.scene).text)
    for path in write_clip(clip, args.out):
        print(path)
    return 0


def _gate(args: argparse.Namespace) -> int:
    from gen_accel.eval.toys import load_toy
    from gen_accel.eval.world import gate

    def load() -> Any:
        return load_toy(args.model, args.folder)

    pipe = load()
    call = {} if args.steps is None else {"num_inference_steps": args.steps}
    results = []
    if args.samples:
        results += gate.attribute_gate(pipe, args.samples, **call)
    if args.clips:
        results.append(gate.inversion_gate(pipe, args.clips))
    maps = gate.word_maps(pipe, args.maps) if args.maps else None
    if maps is not None:
        results += gate.word_map_gate(maps)
    results.append(gate.repeat_gate(load, **call))
    print(gate.table(results))
    if maps is not None:
        print(f"\nword maps, mean average precision; chance {maps.area:.3f}\n")
        print(gate.map_table(maps))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a") as file:
            for result in results:
                record = {"kind": "gate", "model": f"toy-{args.model}", **vars(result)}
                file.write(json.dumps({**record, "passed": result.passed}) + "\n")
    return 0 if all(result.passed for result in results) else 1
