"""For diffusers: ``from_pretrained(model, custom_pipeline=<this file>, trust_remote_code=True)``.

The file has a name of its own because diffusers keeps all local pipelines in one module namespace.
"""

from gen_accel.pipelines.object_wiper import ObjectWiperPipeline

__all__ = ["ObjectWiperPipeline"]
