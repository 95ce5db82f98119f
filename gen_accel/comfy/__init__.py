"""ComfyUI nodes. `entry` is where ComfyUI comes in; `patch` is what a node puts on a model."""
