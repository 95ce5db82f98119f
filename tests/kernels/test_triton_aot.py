"""The forward kernel, compiled ahead of time: facts about GPUs that are not here.

In a process of its own, because the kernels of this one may belong to Triton's interpreter. What is
compiled here is a choice; ``gen-accel doctor --kernels`` compiles all of it (docs/kernels.md).
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

from gen_accel.kernels.triton.config import (
    DEVICES,
    SHARED,
    Config,
    Key,
    candidates,
    choose,
    dump,
    entry,
    tuned,
)

COMPILE = """
import json, sys
from gen_accel.kernels.triton import aot
device, dtype, *features = sys.argv[1:]
for kernel in aot.shipped([int(device)], [128], features, [""]):
    kernel = kernel._replace(key=kernel.key._replace(dtype=dtype))
    compiled = aot.compile_kernel(kernel)
    found = kernel.row() | compiled._asdict() | {"problem": aot.problem(kernel, compiled)}
    print(json.dumps(found))
"""


CODES = """
import json, sys
from gen_accel.kernels.triton import aot
for wanted in sys.argv[1:]:
    device, precision = wanted.split(",")
    kernel = next(aot.shipped([int(device)], [128], ["lists"], [precision]))
    compiled = aot.compile_kernel(kernel)
    print(json.dumps(compiled._asdict() | {"problem": aot.problem(kernel, compiled)}))
"""


APART = """
from gen_accel.kernels.triton import aot
kernel = next(aot.shipped([90], [128], ["lists"], [""]))
for together in (True, False):
    kernel = kernel._replace(config=kernel.config._replace(together=together))
    print(aot.compile_kernel(kernel).barriers)
"""

# Tiles of 120 tokens, which windows on Wan's and HunyuanVideo's grids want.
ODD = """
import json
from gen_accel.kernels.triton import aot
for device in (80, 90):
    for kernel in aot.shipped([device], [128], ["lists", "window"], [""]):
        if kernel.key.block == (128, 128):
            kernel = kernel._replace(key=kernel.key._replace(block=(120, 120)))
            compiled = aot.compile_kernel(kernel)
            found = kernel.row() | compiled._asdict() | {"problem": aot.problem(kernel, compiled)}
            print(json.dumps(found))
"""

# The guess at head_dim 64, and one of those that are timed at 128.
TWO = """
import json
from gen_accel.kernels.triton import aot
from gen_accel.kernels.triton.config import candidates
for dim in (64, 128):
    kernel = next(aot.shipped([90], [dim], ["lists"], [""]))
    config = next(c for c in candidates(kernel.key) if c.programs == 2)
    kernel = kernel._replace(config=config)
    compiled = aot.compile_kernel(kernel)
    found = kernel.row() | compiled._asdict() | {"problem": aot.problem(kernel, compiled)}
    print(json.dumps(found))
"""


def python(code, *arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_spills_and_fits(device):
    features = ["lists", "everything"] if device == 90 else ["everything"]
    done = python(COMPILE, str(device), "bf16", *features)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows and {row["rows merged"] for row in rows} <= {"1", "2"}
    for row in rows:
        assert row["problem"] is None and row["spills"] == 0, row
        assert 0 < row["shared"] <= SHARED[device] and row["registers"] <= 255
        # Queries by keys and weights by values, in each of the loops.
        assert row["products"] >= 4 and (row["feature"] == "lists" or row["products"] >= 7)
        assert row["instruction"] == {90: "wgmma", 100: "tcgen05"}.get(device, "mma")
        assert row["loads"] == ("TMA" if device >= 90 else "cp.async")


def test_keys_and_values_together_leave_no_barrier_between_the_products():
    done = python(APART)
    assert done.returncode == 0, done.stderr[-2000:]
    together, apart = map(int, done.stdout.split())
    assert together == 0 < apart


def test_odd_blocks_compile_without_spills():
    done = python(ODD)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 4 and all(row["problem"] is None for row in rows), rows


def test_two_programs_fit_a_multiprocessor():
    done = python(TWO)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["problem"] is None and row["programs"] == "2", row
        assert 2 * 256 * row["registers"] <= 65536 and 2 * (row["shared"] + 1024) <= 233472, row


def test_fp16_is_no_different():
    done = python(COMPILE, "90", "fp16", "lists")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows and all(row["problem"] is None for row in rows), rows


def test_quantised_calls_multiply_codes():
    numbers = {
        ("90", "int8"): "s8+bf16",
        ("90", "int8+int8"): "s8",
        ("90", "int8+fp8"): "s8+e4m3",
        ("89", "int8+fp8"): "s8+e4m3",
        ("80", "int8+int8"): "s8",
    }
    done = python(CODES, *map(",".join, numbers))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(numbers)
    for row, ((device, _), expected) in zip(rows, numbers.items()):
        assert row["problem"] is None and row["spills"] == 0, row
        assert row["numbers"] == expected and row["shared"] <= SHARED[int(device)], row
        assert row["instruction"] == ("wgmma" if device == "90" else "mma")


def test_the_interpreter_compiles_nothing():
    done = python(COMPILE, "90", "bf16", "lists", TRITON_INTERPRET="1")
    assert done.returncode and "TRITON_INTERPRET is set" in done.stderr


CALLS = """
import torch
from gen_accel.kernels.tail import pool_keys
from gen_accel.kernels.operands import operands
from gen_accel.kernels.quant import PRECISIONS
from gen_accel.kernels.triton.launch import attend, attend_codes
from gen_accel.select.gna import gna_plan
from helpers.attention_cases import Case, every, random
from helpers.warmup import launches, variants

kernels = launches(90)


def call(case, blocks, joint=False, dtype=torch.bfloat16):
    q, k, v = case.tensors(dtype)
    tail = pool_keys(k, v, blocks.block_kv) if joint else None
    before = len(kernels)
    attend(q, k, v, blocks, case.scale, tail=tail, return_lse=joint)
    return [kernel.asm["ptx"] for kernel in list(kernels)[before:]]


case = Case("lists", random(1, 2, 0.4), 300, 300, heads=2, dim=128)
for ptx in call(case, case.blocks(), joint=True):
    assert "wgmma" in ptx and "cp.async.bulk.tensor" in ptx
assert variants() == 2, "tiles of 128 and of 64"
for length in (301, 512):  # another length, other lists: nothing is compiled
    case = Case("lists", random(1, 3, 0.6), length, length + 5, heads=3, dim=128)
    call(case, case.blocks(), joint=True)
assert variants() == 2
_, blocks = gna_plan((4, 8, 8), (3, 5, 5), tile=(2, 8, 8), block=128)
for dim, tma in ((96, True), (60, False)):  # rows of 120 bytes are not for descriptors
    (ptx,) = call(Case("window", every, blocks.q_len, blocks.kv_len, 2, dim), blocks)
    assert "wgmma" in ptx and ("cp.async.bulk.tensor" in ptx) == tma, dim
case = Case("codes", random(1, 2, 0.4), 300, 300, heads=2, dim=128, block=(128, 128))
codes = operands(*case.tensors(torch.bfloat16), PRECISIONS["int8+fp8"])
attend_codes(codes, case.blocks(), case.scale)
ptx = list(kernels)[-1].asm["ptx"]
assert "s32.s8.s8" in ptx and "f32.e4m3.e4m3" in ptx and "cp.async.bulk.tensor" in ptx
print("ok")
"""


def test_calls_launch_what_compiles():
    done = python(CALLS, PYTHONPATH=str(Path(__file__).resolve().parents[1]))
    assert done.stdout == "ok\n", done.stderr[-2000:]


DOCTOR = """
from gen_accel.kernels.triton import aot
from gen_accel.cli.main import main
kernels = list(aot.shipped([90], [64], ["lists"]))[:1]
aot.shipped = lambda: kernels
raise SystemExit(main(["doctor", "--kernels"]))
"""


def test_doctor_prints_a_row_per_kernel():
    done = python(DOCTOR)
    assert done.returncode == 0, done.stderr
    title, line, row = done.stdout.splitlines()
    assert title.count("|") == row.count("|") and "registers" in title and "| sm_90 | 64 |" in row
    assert "2 wgmma" not in row and "4 wgmma" in row


def test_doctor_needs_a_compiler():
    done = python(DOCTOR, TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset it" in done.stderr


# ---- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [0, *DEVICES, 86, 103, 121])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_every_call_has_configurations(device, head_dim):
    blocks = ((16, 16), (64, 64), (128, 64), (64, 128), (128, 128), (512, 512))
    yes_and_no = (False, True)
    precisions = ("", "int8", "int8+int8", "int8+fp8")
    for block, masked, tail, precision in product(blocks, yes_and_no, yes_and_no, precisions):
        key = Key(device, head_dim, "bf16", block, masked, tail, precision)
        found = candidates(key)
        assert found and len(found) == len(set(found)) and choose(key) == found[0]
        for config in found:
            assert block[1] % config.keys == 0 and config.rows in (64, 128)
            assert config.keys <= 64 or not precision
        if block[0] <= 64:
            assert choose(key, 64).rows == 64


def test_a_tuned_entry_is_preferred(tmp_path, monkeypatch):
    key = Key(90, 128, "bf16", (128, 128))
    bands = {0.15: Config(128, 64, 8, 4, True), 1.0: Config(128, 128, 8, 3, True)}
    file = tmp_path / "tuned.json"
    file.write_text(dump(entry(key, d, c, device="test") for d, c in bands.items()))
    monkeypatch.setattr("gen_accel.kernels.triton.config.TUNED", file)
    tuned.cache_clear()
    try:
        assert choose(key, density=lambda: 0.1) == bands[0.15]
        assert choose(key, density=lambda: 0.5) == bands[1.0]
    finally:
        tuned.cache_clear()
