"""RefAM: point at what words mean, from a generator's attention. See docs/refam.md."""

from gen_accel.pipelines.refam.pipeline import RefAMOutput, RefAMPipeline, ground_video

__all__ = ["RefAMOutput", "RefAMPipeline", "ground_video"]
