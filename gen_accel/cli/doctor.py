"""gen-accel doctor: what runs here, and why the rest does not. Paste it into bug reports."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

PACKAGES = (
    "gen-accel", "torch", "triton", "diffusers", "transformers", "accelerate", "safetensors",
    "numpy", "opencv-python-headless", "imageio", "imageio-ffmpeg", "peft", "sageattention",
    "natten",
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "doctor", help="versions, devices, carriers", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--kernels", action="store_true",
        help="compile the Triton kernels for every GPU they are shipped for and print what became "
        "of them; needs no GPU, but some minutes",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the findings."""
    if args.kernels:
        return _kernels(args.json)
    facts = examine()
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def examine() -> dict[str, Any]:
    """Versions, devices, carriers and precisions as plain data."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "packages": versions(),
        "ffmpeg": _ffmpeg(),
        "devices": _devices(),
        "carriers": _carriers(),
        "precisions": _precisions(),
    }


def versions() -> dict[str, str | None]:
    """Installed versions of what gen_accel works with; None where a package is missing."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if found["gen-accel"] is None:  # a bare clone
        from gen_accel import __version__

        found["gen-accel"] = f"{__version__} (not installed)"
    return found


def _ffmpeg() -> str:
    try:
        import imageio_ffmpeg

        return f"{imageio_ffmpeg.get_ffmpeg_version()} ({imageio_ffmpeg.get_ffmpeg_exe()})"
    except (ImportError, RuntimeError) as error:
        return f"missing: {error}"


def _devices() -> list[str]:
    import os

    import torch

    devices = [f"cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()}, {_cpu_name()}"]
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        memory = facts.total_memory / 2**30
        capability = f"capability {facts.major}.{facts.minor}"
        devices.append(f"cuda:{i}: {facts.name}, {memory:.0f} GiB, {capability}")
    if torch.backends.mps.is_available():
        devices.append("mps: Metal")
    return devices


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _carriers() -> dict[str, str]:
    from gen_accel.kernels.api import available

    return {name: reason or "available" for name, reason in available().items()}


def _precisions() -> dict[str, str]:
    """What a quantised call of ordinary shape runs on here."""
    import torch

    from gen_accel.kernels.api import choose, emulates
    from gen_accel.kernels.quant import EMULATED, PRECISIONS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.zeros(1, 64, 1, 64, device=device, dtype=torch.bfloat16)
    found = {}
    for name in PRECISIONS:
        carrier = choose(x, x, x, None, precision=name)
        found[name] = f"{carrier}, {EMULATED}" if emulates(carrier, name) else carrier
    return found


def _kernels(as_json: bool) -> int:
    """Print a row per kernel as it is compiled; 1 if one has a problem."""
    from gen_accel.kernels.triton import aot

    failed = 0
    for number, kernel in enumerate(aot.shipped()):
        compiled = aot.compile_kernel(kernel)
        problem = aot.problem(kernel, compiled)
        row = kernel.row() | compiled.row() | {"problem": problem or ""}
        if as_json:
            print(json.dumps(row), flush=True)
        else:
            if number == 0:
                print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
            print(f"| {' | '.join(row.values())} |", flush=True)
        failed += problem is not None
    return min(failed, 1)


def _text(facts: dict[str, Any]) -> str:
    packages = {name: found or "not installed" for name, found in facts["packages"].items()}
    groups: dict[str, dict[str, str]] = {
        "system": {
            "python": f"{facts['python']} ({facts['executable']})",
            "platform": facts["platform"],
            "ffmpeg": facts["ffmpeg"],
        },
        "packages": packages,
        "devices": dict(device.split(": ", 1) for device in facts["devices"]),
        "carriers": facts["carriers"],
        "quantised": facts["precisions"],
    }
    width = max(len(name) for group in groups.values() for name in group)
    lines = []
    for title, group in groups.items():
        lines.append(title)
        lines += [f"  {name:<{width}}  {value}" for name, value in group.items()]
    return "\n".join(lines)
