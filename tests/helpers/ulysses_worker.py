"""One of two processes that share a Wan transformer's tokens; prints what it found as JSON.

python -m helpers.ulysses_worker RANK STORE_FILE
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from gen_accel import ParoProcessor, apply
from helpers import dits, tiny
from helpers.dense import Dense, difference, installed

HEADS = 4


class PerHead(Dense):
    """Attention that weighs the heads of a layer differently, so that a mix-up shows."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __call__(self, q, k, v, *, layer, backend, mask=None, heads=None):
        out = super().__call__(q, k, v, layer=layer, backend=backend, mask=mask, heads=heads)
        weights = torch.arange(1.0, HEADS + 1)[slice(None) if heads is None else heads]
        if heads is not None:
            self.seen.add((q.shape[1], heads.start, heads.stop))
        return out * weights[:, None]


def outputs(model, inputs, attend=None):
    """Stock output, or that of the family's processors."""
    if attend is None:
        return model(**inputs, return_dict=False)[0]
    with installed(model, attend):
        return outputs(model, inputs)


def parallel_model(heads=HEADS):
    model = tiny.wan_transformer(heads=heads, head_dim=24)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    return model


def sparse(alone, model, inputs):
    """The same plan on one rank and on two; and a plan that each rank makes for its own heads."""
    own = ParoProcessor(density=0.4, min_tokens=0, block=16)
    # One step calibrates, the next is sparse.
    later = {**inputs, "timestep": inputs["timestep"] - 1}
    with apply(alone, own) as handle:
        outputs(alone, inputs)
        calibrated, plan = outputs(alone, later), handle.plan
    given = ParoProcessor(plan=plan, min_tokens=0)
    with apply(alone, given):
        expected = outputs(alone, later)
    with apply(model, given) as handle:
        out = outputs(model, later)
        calls = handle.stats()["transformer"].sparse
    with apply(model, own) as handle:
        outputs(model, inputs)
        local = outputs(model, later)
        try:
            refused = handle.plan
        except ValueError as error:
            refused = str(error)
    return {
        "plan": difference(out, expected),
        "plan_matters": difference(expected, outputs(alone, later)),
        "sparse_calls": calls,
        "own_plan": difference(local, calibrated),
        "local_plan": refused,
    }


def main(rank: int, store: str) -> dict:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # diffusers takes the rank modulo the number of accelerators, which a CPU has none of.
    torch.accelerator.device_count = lambda: 1

    alone = tiny.wan_transformer(heads=HEADS, head_dim=24)
    inputs = dits.wan_inputs()
    per_token = {**inputs, "timestep": torch.linspace(0, 999, 120)[None]}  # Wan 2.2 TI2V-5B
    model, weighed = parallel_model(), PerHead()
    found = {
        "stock": difference(outputs(model, inputs, Dense()), outputs(alone, inputs)),
        "timestep_per_token": difference(
            outputs(model, per_token, Dense()), outputs(alone, per_token)
        ),
        "heads": difference(outputs(model, inputs, weighed), outputs(alone, inputs, PerHead())),
        "heads_matter": difference(outputs(alone, inputs, PerHead()), outputs(alone, inputs)),
        "seen": sorted(weighed.seen),
    }

    found.update(sparse(alone, model, inputs))

    with installed(model, Dense()):
        for block in model.blocks:
            block.compile(fullgraph=True, backend="eager")
        found["compiled"] = difference(outputs(model, inputs), outputs(alone, inputs))

    try:
        outputs(parallel_model(heads=3), inputs, Dense())
    except ValueError as error:
        found["uneven_heads"] = str(error)
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2])))
