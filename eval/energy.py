"""Joules that a piece of work drew, where the machine lets us read them."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType

import torch

_RAPL = Path("/sys/class/powercap")


class Energy:
    """Context manager; `joules` is set when it ends, None where nothing can be read.

    On a CUDA device nvidia-smi is asked for the power ten times a second, which is good for work
    of seconds. On a CPU the packages' counters (RAPL) are read; most systems keep them from users.

    Args:
        device: Where the work runs.
    """

    joules: float | None = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._sampler: subprocess.Popen[str] | None = None

    def __enter__(self) -> Energy:
        self._start = time.perf_counter()
        self._before = _packages()
        if self.device.type == "cuda" and shutil.which("nvidia-smi"):
            uuid = torch.cuda.get_device_properties(self.device).uuid
            ask = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=power.draw"]
            ask += ["--format=csv,noheader,nounits", "--loop-ms=100"]
            self._sampler = subprocess.Popen(
                ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._sampler is not None:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self._start
        if self._sampler is not None:
            self._sampler.terminate()
            said, _ = self._sampler.communicate()
            watts = [float(line) for line in said.split() if line.replace(".", "").isdigit()]
            self.joules = seconds * sum(watts) / len(watts) if watts else None
        elif self.device.type == "cpu":
            after = _packages()
            drawn = [after[name] - self._before[name] for name in after if name in self._before]
            # A counter that ran over would give a negative number.
            self.joules = sum(drawn) if drawn and min(drawn) >= 0 else None


def _packages() -> dict[str, float]:
    """Joules counted so far by each processor package that lets us read it."""
    found = {}
    for folder in _RAPL.glob("intel-rapl:[0-9]"):
        try:
            found[folder.name] = int((folder / "energy_uj").read_text()) / 1e6
        except OSError:
            continue
    return found
