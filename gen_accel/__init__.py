"""gen_accel: sparse attention for diffusers pipelines.

    from gen_accel import ParoProcessor
    pipe.set_attn_processor(ParoProcessor())

Names are loaded on first use, so ``import gen_accel`` costs milliseconds and imports neither torch
nor diffusers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# The folders kernels/, pipelines/ and eval/ stand beside this one in the repository. An installed
# package has them inside; a bare clone (a ComfyUI custom node, say) finds them through this path.
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "blocks.py").is_file() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

_EXPORTS = {
    "AttentionPlan": "gen_accel.plan",
    "Blocks": "gen_accel.kernels.blocks",
    "GnaProcessor": "gen_accel.processors",
    "Handle": "gen_accel.install",
    "ObjectWiperPipeline": "gen_accel.pipelines.object_wiper",
    "ParoProcessor": "gen_accel.processors",
    "RefAMPipeline": "gen_accel.pipelines.refam.pipeline",
    "SpaAttnProcessor": "gen_accel.processors",
    "SparseProcessor": "gen_accel.processors",
    "TokenGrid": "gen_accel.layout",
    "apply": "gen_accel.install",
    "block_sparse_attention": "gen_accel.kernels.api",
    "calibrate": "gen_accel.calibration",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'gen_accel' has no attribute {name!r}")
    module = importlib.import_module(_EXPORTS[name])
    value = getattr(module, name)
    if name.endswith("Processor"):
        module.add_pipeline_method()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
