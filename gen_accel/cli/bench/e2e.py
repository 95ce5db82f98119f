"""``gen-accel bench e2e``: denoising steps of whole transformers, dense and sparse, to a whole run.

The architectures are the published ones; weights are random unless ``--weights`` names a
checkpoint, and then whole clips are made and judged. Every candidate runs forwards of the same
step in turn; what a full run takes is extrapolated from dense, calibrating and sparse steps, and
said to be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli.bench.again import Again
from gen_accel.cli.bench.kernel import told_wrong
from gen_accel.cli.bench.options import add

if TYPE_CHECKING:
    from gen_accel.layout import TokenGrid
    from gen_accel.processors import Policy
    from gen_accel.published import Published

METHODS = ("paro", "spaattn", "gna", "sparse")
PARTS = ("rates", "steps")


@dataclass(frozen=True)
class Case:
    """What one piece runs.

    Attributes:
        name: Of the table's heading.
        whole: The model.
        size: Height, width and frames.
        layers: Blocks that are run; None runs all.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Of weights and activations, a name in torch.
        methods: Processors by their short names.
        densities: Kept shares asked of each.
        rounds: Times that each candidate runs, at most.
        dense_steps: First share of the steps that stays dense.
        compiled: Also measure compiled blocks.
        seed: Of the inputs.
    """

    name: str
    whole: Published
    size: tuple[int, int, int]
    layers: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    methods: tuple[str, ...] = METHODS
    densities: tuple[float, ...] = (0.25,)
    rounds: int = 5
    dense_steps: float = 0.2
    compiled: bool = False
    seed: int = 0

    @property
    def model(self) -> Published:
        """The model with the blocks that are run."""
        return self.whole.cut(self.layers)

    @property
    def grid(self) -> TokenGrid:
        """Its tokens."""
        return self.whole.grid(*self.size)

    @property
    def tokens(self) -> int:
        """Length of the sequence in self-attention."""
        joint = self.whole.family in ("hunyuan_video", "flux")
        return self.grid.numel + (self.whole.text if joint else 0)

    def policy(self, method: str, density: float) -> Policy:
        """The processor of a method."""
        from gen_accel.cli.pipeline import make_processor

        if method == "none":
            raise ValueError(f"method {method!r}: dense is measured anyway; leave it out")
        settings = {"density": density, "dense_steps": self.dense_steps, "min_tokens": 0}
        found = make_processor(method, settings, None)
        assert found is not None
        return found


@dataclass(frozen=True)
class Suite:
    """Cases, and how long one command may begin pieces."""

    cases: tuple[Case, ...]
    limit: float = 480


def suites() -> dict[str, Suite]:
    """The suites by name."""
    from gen_accel.published import MODELS

    h200: dict[str, Any] = {
        "device": "cuda", "dtype": "bfloat16", "densities": (0.2, 0.15), "rounds": 3
    }  # fmt: skip

    def full(name: str, title: str, **more: Any) -> Case:
        return Case(title, MODELS[name], MODELS[name].size, **{**h200, **more})

    wan = MODELS["wan-narrow"]
    return {
        "h200": Suite(
            (
                # All blocks of these three would not fit into one command of nine minutes.
                full("hunyuan-video", "HunyuanVideo 720p, 129 frames", layers=15),
                full("wan2.1-14b", "Wan 2.1 14B 720p, 81 frames", layers=20),
                full("flux-dev", "FLUX 4096x4096", layers=36),
                full("cosmos-7b", "Cosmos 7B 704p, 121 frames"),
                full("wan2.1-1.3b", "Wan 2.1 1.3B 480p, 81 frames", rounds=10),
            ),
            limit=150,  # by the forecast a piece fits behind it, and may take longer
        ),
        "cpu": Suite(
            (
                Case("Wan, narrow", wan, wan.size, rounds=3),
                Case(
                    "Wan 2.1 1.3B 480p, 17 frames",
                    MODELS["wan2.1-1.3b"],
                    (480, 832, 17),
                    layers=1,
                    rounds=2,
                    methods=("paro",),
                ),
                Case(
                    "Wan, narrow, compiled",
                    wan,
                    (480, 512, 21),
                    rounds=3,
                    methods=("paro",),
                    compiled=True,
                ),
            ),
            limit=540,
        ),
        "smoke": Suite(
            tuple(
                Case(f"smoke {name}", _tiny(MODELS[name]), size, rounds=1)
                for name, size in (
                    ("wan2.1-1.3b", (64, 96, 17)),
                    ("hunyuan-video", (64, 96, 17)),
                    ("flux-dev", (128, 192, 1)),
                    ("cosmos-7b", (64, 96, 17)),
                )
            )
        ),
    }


def _tiny(model: Published) -> Published:
    """Two heads and a block of each kind: shows that the model runs."""
    short = replace(model, heads=2, layers=dict.fromkeys(model.layers, 1), text=24, ffn=256)
    return replace(short, config={**model.config, "ffn_dim": 256} if "ffn_dim" in model.config
                   else model.config)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(
        parser, "again", "seed", "device", "docs",
        suite={"default": None, "help": "h200, cpu or smoke, instead of --model"},
        limit={"default": None, "help": "seconds for all pieces (the suite's)"},
        piece_limit={"default": 240},
        densities={"default": None, "help": "kept shares (the suite's)"},
        model={"help": "which architecture"},
    )  # fmt: skip
    option = parser.add_argument
    option("--weights", default="random", help="random, or a checkpoint: whole clips, judged")
    option("--height", type=int, help="pixels (as published)")
    option("--width", type=int, help="pixels (as published)")
    option("--num-frames", type=int, help="frames (as published)")
    option("--layers", type=int, help="run so many blocks and extrapolate (all)")
    option("--methods", help=f"with commas between ({','.join(METHODS)})")
    option("--dtype", help="float32 on the CPU, bfloat16 on a GPU")
    option("--rounds", type=int, help="times each candidate runs, at most (5)")
    option("--prompt-file", metavar="FILE", help="prompts, one per line, for --weights")
    option("--sweep", metavar="FILE", help="YAML: model, size, density, methods; lists")
    option("--output", metavar="DIR", help="folder of pages (outputs/e2e)")
    option("--piece", type=int, help="run this piece of the suite alone, counted from 0")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, write everything that follows from the rows."""
    from gen_accel.cli.bench.e2e_page import write_pages
    from gen_accel.cli.bench.kernel_pieces import free_gpu, told
    from gen_accel.eval.files import check_writable
    from gen_accel.eval.harness import append_rows, read_rows

    name, suite = _suite(args)
    folder = Path(args.output or f"outputs/e2e-{name}")
    out = Path(args.out or folder / "results.jsonl")
    check_writable(out.parent)
    check_writable(folder)
    ends = time.monotonic() + (suite.limit if args.limit is None else args.limit)
    again = Again(out, args.again)
    good, states = True, {}
    for number, (case, part) in enumerate(_pieces(suite, args.weights)):
        title = f"{case.name}, {part}"
        rows = read_rows(out) if out.exists() else []
        known = [r for r in rows if again.counts(r) and _is_result_of(r, name, case, part)]
        if known:
            good &= told_wrong(known)
            states[title] = "done"
            continue
        if time.monotonic() > ends or args.piece not in (None, number):
            states[title] = "left"
            continue
        if not free_gpu():
            good, states[title] = False, "left"
            break
        print(f"{title}", flush=True)
        started = time.perf_counter()
        try:
            found, wrong = _measure(case, part, args, out)
        except (ValueError, OSError, ImportError):
            raise
        except Exception as reason:  # out of memory, a fault in a kernel: the others go on
            good, states[title] = False, f"failed: {told(reason)}"
            print(f"  FAILED: {told(reason)}", flush=True)
            continue
        common = {"suite": name, "case": case.name, "part": part, "code": _code()}
        seconds = round(time.perf_counter() - started, 1)
        rows = [{**row, "config": {**common, **row["config"]}} for row in found]
        append_rows(out, rows)
        states[title] = f"done in {seconds:.0f} s"
        good &= not wrong
        for what, why in wrong.items():
            print(f"  {what} WRONG: {why}")
    rows = read_rows(out) if out.exists() else []
    rows = [row for row in rows if row["config"].get("suite") == name]
    print(write_pages(folder, rows, _manifest(args, name, states, out), docs=args.docs))
    left = [title for title, state in states.items() if state == "left"]
    again.end(bool(left))
    for title in left:
        print(f"not measured: {title}; run the command again")
    return 0 if good else 1


def _measure(
    case: Case, part: str, args: argparse.Namespace, out: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    import torch

    from gen_accel.cli.bench.e2e_rates import measure_rates
    from gen_accel.cli.bench.e2e_rows import step_rows, text_of
    from gen_accel.cli.bench.e2e_steps import Steps
    from gen_accel.eval.harness import device_name, read_rows

    def say(line: str) -> None:
        print(f"  {line}", flush=True)

    if part == "clips":
        from gen_accel.cli.bench.e2e_clips import clip_rows

        return clip_rows(case, args), {}
    with torch.no_grad():
        if part == "rates":
            rows = measure_rates(case)
            for row in rows:
                say(f"{row['name']}: {row['value'] / 1e9:,.1f} G{row['unit']}")
            return rows, {}
        known = read_rows(out) if out.exists() else []
        here = device_name(case.device)
        rates = [r for r in known if r["kind"] == "rate" and r["config"]["case"] == case.name]
        rates = [r for r in rates if r["device"] == here]
        steps = Steps(case, say)
        steps.measure(args.piece_limit)
    rows = step_rows(steps, rates)
    print(text_of(rows, steps), flush=True)
    return rows, steps.wrong


# ---- which pieces --------------------------------------------------------------------------------


def _suite(args: argparse.Namespace) -> tuple[str, Suite]:
    """The suite asked for by name, by a file, or by a model and its options."""
    import torch

    from gen_accel.cli.options import UsageError, nearest

    if args.suite is not None:
        known = suites()
        if args.suite not in known:
            raise UsageError(f"--suite {args.suite}: {nearest(args.suite, known)}")
        suite = known[args.suite]
        if any(case.device == "cuda" for case in suite.cases) and not torch.cuda.is_available():
            raise UsageError(f"--suite {args.suite}: torch sees no GPU; use --suite cpu or smoke")
        if any(case.device == "cpu" for case in suite.cases) and "triton" not in sys.modules:
            os.environ.setdefault("TRITON_INTERPRET", "1")
        if args.rounds:
            cases = tuple(replace(case, rounds=args.rounds) for case in suite.cases)
            suite = replace(suite, cases=cases)
        return args.suite, suite
    if args.sweep is not None:
        return Path(args.sweep).stem, Suite(tuple(_sweep(args)))
    case = _case(args, {})
    if args.weights != "random":
        case = replace(case, name=Path(args.weights).name)
    return "custom", Suite((case,))


_SWEPT = ("model", "height", "width", "num_frames", "layers", "methods", "density", "dtype")


def _sweep(args: argparse.Namespace) -> Iterator[Case]:
    """The product of a file's lists."""
    import yaml

    from gen_accel.cli.options import UsageError, check_names

    try:
        given = yaml.safe_load(Path(args.sweep).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"--sweep {args.sweep}: cannot be read ({error})") from error
    if not isinstance(given, dict):
        raise UsageError(f"--sweep {args.sweep}: expected names and values")
    given = {str(key).replace("-", "_"): value for key, value in given.items()}
    check_names(f"name in {args.sweep}:", given, _SWEPT)
    # All methods and densities of a size share one model and one dense baseline.
    together = {"methods", "density"}
    axes = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    free = [key for key in axes if key not in together]
    for values in itertools.product(*(axes[key] for key in free)):
        chosen = {key: axes[key] for key in together & axes.keys()}
        yield _case(args, {**dict(zip(free, values)), **chosen})


def _case(args: argparse.Namespace, given: dict[str, Any]) -> Case:
    from gen_accel.published import published

    def value(name: str, default: Any) -> Any:
        found = given.get(name, getattr(args, name, None))
        return default if found is None else found

    model = published(value("model", "hunyuan-video"))
    size = tuple(value(n, s) for n, s in zip(("height", "width", "num_frames"), model.size))
    device = args.device
    dtype = value("dtype", "float32" if device == "cpu" else "bfloat16")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r}: use float32, bfloat16 or float16")
    layers = value("layers", None)
    methods = value("methods", METHODS)
    methods = methods.split(",") if isinstance(methods, str) else methods
    densities = given.get("density", args.densities or (0.2,))
    height, width, frames = size
    name = f"{model.name} {height}x{width}x{frames}" + (f", {layers} blocks" if layers else "")
    case = Case(
        name,
        model,
        (height, width, frames),
        layers=layers,
        device=device,
        dtype=str(dtype),
        methods=tuple(method for method in methods if method != "dense"),
        densities=tuple(float(d) for d in densities),
        rounds=args.rounds or 5,
        seed=args.seed,
    )
    _ = case.grid, case.model  # sizes that do not divide are told before anything runs
    for method, density in itertools.product(case.methods, case.densities):
        case.policy(method, density)
    return case


def _pieces(suite: Suite, weights: str) -> Iterator[tuple[Case, str]]:
    for case in suite.cases:
        for part in PARTS if weights == "random" else ("clips",):
            yield case, part


def _is_result_of(row: dict[str, Any], suite: str, case: Case, part: str) -> bool:
    """Whether this row is a result of that piece on this machine, with this code."""
    from gen_accel.eval.harness import result_row

    here = result_row("", "", 0.0, "", device=case.device)
    wanted = {"suite": suite, "case": case.name, "part": part, "code": _code()}
    return all(row[key] == here[key] for key in ("device", "versions")) and all(
        row["config"].get(key) == value for key, value in wanted.items()
    )


def _code() -> str:
    """Of what is measured; pages and other commands may change between two pieces."""
    from gen_accel.cli.renders import code

    return code("", "kernels")[:12]


def _manifest(
    args: argparse.Namespace, suite: str, states: dict[str, str], out: Path
) -> dict[str, Any]:
    from gen_accel.eval.harness import commit

    given = {key: value for key, value in vars(args).items() if value is not None}
    return {
        "suite": suite,
        "options": json.loads(json.dumps(given, default=str)),
        "results": str(out),
        "commit": commit(),
        "code": _code(),
        "pieces": states,
    }
