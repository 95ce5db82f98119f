"""What only a launch on a GPU would show, without one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.carrier import Call
from helpers.kernels import DEVICE

from gen_accel.kernels.triton import carrier  # isort: skip
from gen_accel.kernels.triton import config as configs  # isort: skip
from gen_accel.kernels.triton import launch  # isort: skip

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_launch_compiles_from_its_own_arguments():
    # A process of its own: here kernels belong to the interpreter, or to a GPU.
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "launches.py"],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 200


def blocks_of(tokens):
    mask = torch.ones(1, 1, tokens // 64, tokens // 64, dtype=torch.bool)
    return Blocks.from_mask(mask, q_len=tokens, kv_len=tokens, block_size=64).to(DEVICE)


def test_it_runs_on_the_tensors_own_device(monkeypatch):
    guard, seen = torch.cuda.device_of, []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: (seen.append(x), guard(x))[1])
    q = torch.zeros(1, 64, 1, 16, dtype=torch.bfloat16, device=DEVICE)
    launch.attend(q, q, q, blocks_of(64), 1.0)
    assert seen[0] is q


def test_a_density_is_asked_for_once_and_only_where_bands_differ(monkeypatch):
    key = configs.Key(90, 64, "bf16", (64, 64))
    one, two = configs.candidates(key)[:2]
    table = {key: {0.2: one, 0.5: one}}
    monkeypatch.setattr(configs, "tuned", lambda: table)
    asked = []

    def kept():
        asked.append(1)
        return 0.1

    assert configs.choose(key, density=kept) == one and not asked
    table[key][0.5] = two
    assert configs.choose(key, density=kept) == one and len(asked) == 1
    blocks, right = blocks_of(128), Blocks.density
    monkeypatch.setattr(Blocks, "density", lambda self: (asked.append(1), right(self))[1])
    assert launch._density(blocks)() == launch._density(blocks)() == 1.0 and len(asked) == 2


def test_gpus_before_ampere_are_declined(monkeypatch):
    q = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    limit = carrier.limits(Call(q, q, q, None, 1.0))
    assert limit == "a GPU of capability 7.5: it needs 8.0 (Ampere); use impl='gather'"
