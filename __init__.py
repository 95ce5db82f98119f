"""What ComfyUI loads where this repository is cloned into its custom_nodes folder; nobody else."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

WEB_DIRECTORY = "gen_accel/comfy/web"


async def comfy_entrypoint() -> Any:
    """ComfyUI's extension with our nodes."""
    _find_package()
    from gen_accel.comfy.entry import comfy_entrypoint as entry

    return await entry()


def _find_package() -> None:
    """Make `gen_accel` the copy beside this file, without a word to `sys.path`."""
    if "gen_accel" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "gen_accel", Path(__file__).parent / "gen_accel" / "__init__.py"
    )
    assert spec is not None and spec.loader is not None
    sys.modules["gen_accel"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
