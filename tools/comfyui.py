"""Run a local ComfyUI checkout on the CPU with this clone, and nothing else, as its custom nodes.

    python tools/comfyui.py /path/to/ComfyUI --python /path/to/its/venv/bin/python

The checkout is not touched: nodes, models and outputs live in a folder of their own (``--work``).
Where torchvision or torchaudio are missing, stubs with the few names that ComfyUI imports stand in;
audio and its Cosmos VAE then do not work, our nodes and the tests do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
STUBS = {
    "torchvision/__init__.py": "from . import transforms\n",
    "torchvision/transforms.py": """\
import enum

from torch.nn.functional import interpolate


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"


class functional:
    @staticmethod
    def resize(x, size, interpolation=InterpolationMode.NEAREST):
        return interpolate(x, size, mode=interpolation.value)
""",
    "torchaudio/__init__.py": "from . import transforms\n",
    "torchaudio/transforms.py": "MelScale = MelSpectrogram = None\n",
}


def prepare(work: Path, python: str, packs: tuple[Path, ...] = ()) -> dict[str, str]:
    """Lay out ComfyUI's folders and link the nodes; returns the environment for the server."""
    for folder in FOLDERS:
        (work / folder).mkdir(parents=True, exist_ok=True)
    for name, pack in {"gen_accel": ROOT, **{pack.name: pack for pack in packs}}.items():
        link = work / "custom_nodes" / name
        if not link.exists():
            link.symlink_to(pack, target_is_directory=True)
    code = (
        "from importlib.util import find_spec\n"
        "print(*(m for m in ('torchvision', 'torchaudio') if find_spec(m) is None))"
    )
    missing = subprocess.check_output([python, "-c", code], text=True, cwd=work).split()
    for name, text in STUBS.items():
        if name.split("/")[0] in missing:
            file = work / "stubs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return {**os.environ, "PYTHONPATH": str(work / "stubs"), "PYTHONDONTWRITEBYTECODE": "1"}


def command(comfyui: Path, work: Path, python: str, port: int) -> list[str]:
    """The server's command line."""
    return [
        python, str(comfyui / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(port),
        "--base-directory", str(work), "--database-url", "sqlite:///:memory:",
        "--disable-auto-launch", "--disable-api-nodes",
    ]  # fmt: skip


class Server:
    """A ComfyUI server of this machine, for the length of a ``with`` block.

    Args:
        comfyui: Checkout.
        work: Folder for everything it writes.
        python: Interpreter that has its requirements.
        port: Port on 127.0.0.1.
        packs: Further folders of custom nodes.
    """

    def __init__(
        self,
        comfyui: Path,
        work: Path,
        python: str = sys.executable,
        port: int = 8399,
        packs: tuple[Path, ...] = (),
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.work = work
        self._environment = prepare(work, python, packs)
        self._command = command(comfyui, work, python, port)

    @property
    def log(self) -> str:
        """What it has printed."""
        return (self.work / "server.log").read_text(errors="replace")

    def __enter__(self) -> Server:
        with open(self.work / "server.log", "w") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self.work, env=self._environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.get("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not come up:\n{self.log[-3000:]}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def get(self, path: str) -> Any:
        """A page of its HTTP interface."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def run(self, prompt: dict[str, Any], seconds: float = 120) -> dict[str, Any]:
        """Execute a graph in API format; its entry of ``/history``, or ``/prompt``'s refusal."""
        body = json.dumps({"prompt": prompt}).encode()
        request = urllib.request.Request(
            self.url + "/prompt", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as refusal:
            return json.loads(refusal.read())
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{number}").get(number)
            if entry is not None and entry["status"]["status_str"] in ("success", "error"):
                return entry
            time.sleep(0.05)
        raise TimeoutError(f"no answer in {seconds} s:\n{self.log[-3000:]}")


def main() -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="ComfyUI checkout")
    parser.add_argument("--work", type=Path, default=Path("outputs/comfyui"), help="its folders")
    parser.add_argument("--python", default=sys.executable, help="interpreter with its packages")
    parser.add_argument("--port", type=int, default=8399)
    parser.add_argument("--tiny", action="store_true", help="add the tests' tiny models as nodes")
    args = parser.parse_args()
    packs = (ROOT / "tests" / "comfyui" / "tiny_pack",) if args.tiny else ()
    environment = prepare(args.work.resolve(), args.python, packs)
    serve = command(args.comfyui.resolve(), args.work.resolve(), args.python, args.port)
    print(f"http://127.0.0.1:{args.port}", *serve, sep="\n  ", flush=True)
    return subprocess.call(serve, cwd=args.work, env=environment)


if __name__ == "__main__":
    raise SystemExit(main())
