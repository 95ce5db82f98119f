"""Compile the small Triton kernels without a GPU and print what ptxas says, one JSON line each.

Run as a script, without the interpreter: ``python tests/helpers/aot.py 90 100``.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gen_accel.kernels.triton.mass import _mass_kernel
from gen_accel.kernels.triton.pool import _pool_kernel
from gen_accel.kernels.triton.prepare import _prepare_kernel
from gen_accel.kernels.triton.quantise import _rows_kernel, _scan_kernel, _values_kernel
from gen_accel.kernels.triton.route import _route_kernel

POOL = {"HAS_REAL": True, "HAS_DEVIATION": True, "HAS_VARIANCE": True}
MASS = {"TILE_K": 128, "DIM": 128, "WIDTH": 128, "PRECISION": "tf32", "BLOCK": 128, "COLUMNS": 128}
ORDER = {"HAS_STRIDES": True, "HAS_INDEX": False, "HALVES": False, "DIM": 128, "WIDTH": 128}
ORDERED = {"STRIDES": "*i32", "INDEX": "*i64", "COS": "*fp32", "SIN": "*fp32", "MEAN": "*fp32"}
CODES = {**ORDERED, "CODES": "*i8", "SCALE": "*fp32", "levels": "fp32", "tiny": "fp32"}
PLAIN = {"num_warps": 8, "enable_fp_fusion": False}
PREPARE = {"BACK": False, "HAS_ROPE": True, "ROWS": 16, "HEADS": 8, "DIM": 128, "WIDTH": 128}
UNNORMED = {"HAS_NORM": False, "ACROSS": False}
NORMED = {**PREPARE, "HAS_NORM": True, "HAS_STRIDES": False, "HAS_INDEX": False}
PLACED = {"X": "*bf16", "OUT": "*bf16", "STRIDES": "*i32", "INDEX": "*i64", "COS": "*fp32"}
PLACED |= {"SIN": "*fp32", "WEIGHT": "*bf16", "eps": "fp32"}

# Kernel, types of its pointers, constants, warps, stages: as the wrappers launch them at head_dim
# 128 in bf16.
BF16, FP32 = "*bf16", "*fp32"
KERNELS = {
    "pool": (
        _pool_kernel,
        {
            "X": BF16,
            "REAL": "*u8",
            "MEAN": FP32,
            "COUNT": FP32,
            "DEVIATION": FP32,
            "VARIANCE": FP32,
        },
        {**POOL, "SIZE": 128, "DIM": 128, "ROWS": 16, "COLUMNS": 128},
        {"num_warps": 4},
    ),
    "mass, 8 rows": (
        _mass_kernel,
        {"Q": BF16, "K": BF16, "LSE": FP32, "MASS": FP32, "scale": "fp32"},
        {**MASS, "SAMPLED": 8, "ROWS": 8, "TILE_Q": 64, "HAS_LSE": False},
        {"num_warps": 8, "num_stages": 2},
    ),
    "mass, 8 rows, lse known": (
        _mass_kernel,
        {"Q": BF16, "K": BF16, "LSE": FP32, "MASS": FP32, "scale": "fp32"},
        {**MASS, "SAMPLED": 8, "ROWS": 8, "TILE_Q": 64, "HAS_LSE": True},
        {"num_warps": 8, "num_stages": 2},
    ),
    "mass, all rows": (
        _mass_kernel,
        {"Q": BF16, "K": BF16, "LSE": FP32, "MASS": FP32, "scale": "fp32"},
        {**MASS, "SAMPLED": 128, "ROWS": 128, "TILE_Q": 128, "HAS_LSE": False},
        {"num_warps": 16, "num_stages": 2},
    ),
    "route": (
        _route_kernel,
        {"SCORES": FP32, "FORCED": "*u8", "COUNTS": "*i32", "LISTS": "*i32", "beta": "fp32"},
        {"HAS_KEEP": True, "HAS_BETA": True, "HAS_FORCED": True, "COLUMNS": 2048},
        {"num_warps": 2},
    ),
    "prepare, axes": (
        _prepare_kernel,
        PLACED,
        {**PREPARE, **UNNORMED, "HAS_STRIDES": True, "HAS_INDEX": False, "HALVES": False},
        {"num_warps": 4},
    ),
    "prepare, index, halves": (
        _prepare_kernel,
        PLACED,
        {**PREPARE, **UNNORMED, "HAS_STRIDES": False, "HAS_INDEX": True, "HALVES": True},
        {"num_warps": 4},
    ),
    "norm of each head": (
        _prepare_kernel,
        PLACED,
        {**NORMED, "HALVES": False, "ACROSS": False},
        {"num_warps": 4},
    ),
    "norm of each head, halves": (
        _prepare_kernel,
        PLACED,
        {**NORMED, "HALVES": True, "ACROSS": False},
        {"num_warps": 4},
    ),
    "norm across heads": (
        _prepare_kernel,
        PLACED,
        {**NORMED, "HALVES": False, "ACROSS": True, "HEADS": 40},
        {"num_warps": 4},
    ),
    "codes of keys": (
        _rows_kernel,
        {**CODES, "X": BF16, "SHIFT": FP32},
        {**ORDER, "HAS_ROPE": True, "ROWS": 64, "SMOOTH": True, "HAS_SHIFT": False},
        PLAIN,
    ),
    "codes of values": (
        _values_kernel,
        {**CODES, "X": BF16, "PEAK": FP32},
        {**ORDER, "HAS_ROPE": False, "ROWS": 64, "BY_BLOCK": True},
        PLAIN,
    ),
    "sums of keys": (
        _scan_kernel,
        {**ORDERED, "X": BF16, "OUT": FP32},
        {**ORDER, "HAS_ROPE": True, "ROWS": 16, "TOKENS": 512, "PEAK": False},
        {**PLAIN, "num_warps": 4},
    ),
}


def _variant(name, **constants):
    kernel, types, known, options = KERNELS[name]
    return kernel, types, {**known, **constants}, options


# What else the constants can ask for; that it compiles at all is enough to see on one device.
VARIANTS = {
    "pool, plain": _variant("pool", HAS_REAL=False, HAS_DEVIATION=False, HAS_VARIANCE=False),
    "route, keep": _variant("route", HAS_BETA=False, HAS_FORCED=False),
    "route, beta": _variant("route", HAS_KEEP=False, HAS_FORCED=False, COLUMNS=256),
    "route, mask": _variant("route", HAS_KEEP=False, HAS_BETA=False, COLUMNS=8),
    "prepare, plain": _variant("prepare, axes", HAS_STRIDES=False, HAS_ROPE=False),
    "prepare, 96 channels": _variant("prepare, axes", DIM=96),
    "restore, axes": _variant("prepare, axes", BACK=True, HAS_ROPE=False),
    "restore, index": _variant("prepare, index, halves", BACK=True, HAS_ROPE=False),
    "codes of queries": _variant("codes of keys", ROWS=32, SMOOTH=False, HAS_SHIFT=True),
    "codes of keys, index, halves": _variant(
        "codes of keys", HAS_STRIDES=False, HAS_INDEX=True, HALVES=True, DIM=96
    ),
    "peaks of values": _variant("sums of keys", HAS_ROPE=False, PEAK=True),
    "mass, odd sizes": _variant("mass, 8 rows", BLOCK=96, SAMPLED=5, DIM=96),
}


def report(name, capability):
    kernel, types, constants, options = (KERNELS | VARIANTS)[name]
    signature, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        kind = "constexpr" if argument in constants else types.get(argument, "i32")
        signature[argument] = kind
        # What a launch finds out about tensors of 128 channels.
        row = argument.startswith("stride_") and argument[-1] in "bsthq"
        if kind.startswith("*") or row:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
        if capability >= 100:
            ptxas = ptxas.with_name("ptxas-blackwell")
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [ptxas, "-v", f"--gpu-name={architecture}", ptx, "-o", Path(folder, "kernel")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return {
        "kernel": name,
        "capability": capability,
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spills": int(spills[1]) + int(spills[2]),
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma" in compiled.asm["ptx"],
        "div_rn": "div.rn.f32" in compiled.asm["ptx"],
    }


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        for kernel in KERNELS | (VARIANTS if number == 90 else {}):
            print(json.dumps(report(kernel, number)), flush=True)
