from dataclasses import replace
from types import SimpleNamespace

import torch

from gen_accel.cli.bench import wipe


def test_rows_of_other_weights_or_settings_are_not_current(monkeypatch):
    class Args:
        model, split = "hunyuan-video", "test"

    def pipe(seed):
        torch.manual_seed(seed)
        return SimpleNamespace(components={"transformer": torch.nn.Linear(2, 2), "scheduler": None})

    first = wipe.made_of(pipe(0))
    assert first == wipe.made_of(pipe(0)) != wipe.made_of(pipe(1))
    with monkeypatch.context() as patched:
        patched.setattr(wipe, "SETTING", replace(wipe.SETTING, growth=3.0))
        assert wipe.made_of(pipe(0)) != first
    row = wipe._row(Args, first, {"part": "mask", "set": "shadow", "seed": 7, "iou": 0.5})
    assert row["made_of"] == first and row["part"] == "mask" and row["value"] == 0.5
    assert {"time", "versions", "commit", "device"} <= row.keys()
