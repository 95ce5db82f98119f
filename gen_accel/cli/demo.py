"""gen-accel demo: one video dense and with PARO, with time and fidelity, on any CPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gen_accel.cli import options

SECTIONS = ()

# Defaults are those of DemoSettings; its import would load torch for --help.
NUMBERS = {
    "density": (float, "share of the attention blocks to keep (0.25)"),
    "dense_steps": (float, "first share of the steps that stays dense (0.2)"),
    "num_inference_steps": (int, "denoising steps (15)"),
    "height": (int, "pixels, a multiple of 8 (256)"),
    "width": (int, "pixels, a multiple of 8 (256)"),
    "num_frames": (int, "odd number of frames (17)"),
    "seed": (int, "seed of weights and noise (0)"),
}


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser("demo", help="see it work in a minute", description=__doc__)
    parser.add_argument("--output", metavar="DIR", help="folder (outputs/demo)")
    for name, (kind, text) in NUMBERS.items():
        parser.add_argument(options.flag(name), type=kind, metavar="X", help=text)


def run(args: argparse.Namespace) -> int:
    """Run the demo and say where the page is."""
    from gen_accel.eval.files import check_writable

    folder = Path(getattr(args, "output", "outputs/demo"))
    check_writable(folder)
    print("Loading torch and diffusers ...", flush=True)

    import json

    from gen_accel.demo import DemoSettings, run_demo

    settings = {name: getattr(args, name) for name in NUMBERS if hasattr(args, name)}
    page = run_demo(folder, DemoSettings(**settings))
    report = json.loads((folder / "report.json").read_text())
    print(f"\n{'method':<8}{'time':>9}{'speed-up':>10}{'density':>9}{'PSNR':>10}{'SSIM':>9}")
    for row in report["rows"]:
        fidelity = f"{'-':>10}{'-':>9}"
        if row["psnr"] is not None:
            fidelity = f"{row['psnr']:>7.1f} dB{row['ssim']:>9.4f}"
        numbers = f"{row['seconds']:>7.1f} s{row['speedup']:>9.2f}x{row['density']:>9.3f}"
        print(f"{row['method']:<8}{numbers}{fidelity}")
    if "trained" in report:
        print(f"\n{report['notes'][-1]}")
    print(f"\nOpen {page}")
    return 0
