"""Where ComfyUI comes in; a clone's `__init__.py` and a wheel's users hand it this function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WEB_DIRECTORY = str(Path(__file__).parent / "web")


async def comfy_entrypoint() -> Any:
    """The extension with our nodes, in ComfyUI's V3 schema."""
    from comfy_api.latest import ComfyExtension

    from gen_accel.comfy.attention import NODES as ATTENTION
    from gen_accel.comfy.plans import NODES as PLANS
    from gen_accel.comfy.quality import NODES as QUALITY

    class GenAccel(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return [*ATTENTION, *PLANS, *QUALITY]

    return GenAccel()
