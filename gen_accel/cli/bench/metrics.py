"""``gen-accel bench metrics``: what metrics cost."""

from __future__ import annotations

import argparse
import time
import warnings

from gen_accel.cli.bench.damage import clips_of, measurable
from gen_accel.cli.bench.options import add


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, "clips", "frames", "size", "device", "seed")


def run(args: argparse.Namespace) -> int:
    """Time each metric on clips of the world with noise on them; print, append the rows."""
    from tqdm import tqdm

    from gen_accel.eval.damage import damage as broken
    from gen_accel.eval.harness import append_rows, result_row

    chosen, networks = measurable(args)
    states = {
        name: metric.accumulator(**{"network": networks[metric.network]} if metric.network else {})
        for name, metric in chosen.items()
    }
    seconds = dict.fromkeys(states, 0.0)
    for sample in tqdm(clips_of(args), total=args.clips, desc="metrics", unit="clip"):
        given = {"video": broken(sample, "noise", 3), "reference": sample.video}
        given["mask"] = sample.mask
        for name, state in states.items():
            start = time.perf_counter()
            state.update(**{k: given[k] for k in chosen[name].needs if k in given})
            seconds[name] += time.perf_counter() - start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, state in states.items():
            start = time.perf_counter()
            state.compute()
            seconds[name] += time.perf_counter() - start

    common = {"n": args.clips, "shape": (args.frames, 3, args.size, args.size), "seed": args.seed}
    costs = {"all metrics": sum(seconds.values()), **seconds}
    rows = [result_row("metric cost", name, s, "s", **common) for name, s in costs.items()]
    print(f"{args.clips} clips of {args.frames}x{args.size}x{args.size}")
    for name, spent in costs.items():
        print(f"  {name:22}{spent:9.2f} s{1e3 * spent / args.clips:9.1f} ms per clip")
    peak = _peak_memory()
    if peak is not None:
        rows.append(result_row("metric cost", "peak memory", peak, "MiB", **common))
        print(f"  {'peak memory':22}{peak:9.0f} MiB")
    if args.out:
        append_rows(args.out, rows)
    return 0


def _peak_memory() -> float | None:
    """Largest resident size of this process so far, in MiB."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
