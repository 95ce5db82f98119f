"""For ``DiffusionPipeline.from_pretrained(..., custom_pipeline=".../gen_accel_refam.py")``."""

from gen_accel.pipelines.refam.pipeline import RefAMPipeline

__all__ = ["RefAMPipeline"]
