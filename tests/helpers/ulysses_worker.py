"""One of two processes that share a Wan transformer's tokens; prints what it found as JSON.

python -m helpers.ulysses_worker RANK STORE_FILE
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from gen_accel import GnaProcessor, ParoProcessor, SparseProcessor, apply
from gen_accel.parallel import enable_context_parallelism
from helpers import dits, tiny
from helpers.dense import Dense, difference, installed

HEADS = 4


class PerHead(Dense):
    """Attention that weighs the heads of a layer differently, so that a mix-up shows."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __call__(self, q, k, v, *, layer, backend, mask=None, heads=None, ranks=1):
        given = {"layer": layer, "backend": backend, "mask": mask, "heads": heads, "ranks": ranks}
        out = super().__call__(q, k, v, **given)
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


def flux_inputs():
    """Image of 8x12 tokens behind 8 of text."""
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(12.0))
    return {**dits.flux()[1], "hidden_states": dits.rand(1, 96, 16), "img_ids": ids}


# Text of both samples of HunyuanVideo is padded, to different lengths.
FAMILIES = {
    "wan": (lambda: tiny.wan_transformer(heads=HEADS, head_dim=24), dits.wan_inputs),
    "hunyuan_video": (lambda: tiny.hunyuan_transformer(heads=HEADS), dits.hunyuan_inputs),
    "flux": (lambda: tiny.flux_transformer(heads=HEADS), flux_inputs),
    "cosmos": (
        lambda: tiny.cosmos_transformer(heads=HEADS, concat_padding_mask=False),
        lambda: dits.cosmos()[1],
    ),
}


def policies(alone, inputs):
    """Selection by plan, by the call, by geometry; no selection."""
    shared = {"min_tokens": 0, "dense_steps": 0.0, "block": 16}
    with apply(alone, ParoProcessor(density=0.4, **shared)) as handle:
        outputs(alone, inputs)
        plan = handle.plan
    return {
        "plan": ParoProcessor(plan=plan, min_tokens=0, dense_steps=0.0),
        "pooled": SparseProcessor(density=0.4, **shared),
        "window": GnaProcessor(window=(-1, 3, 3), tile=(1, 2, 2), min_tokens=0, dense_steps=0.0),
        "every": SparseProcessor(select="all", tail="drop", **shared),
    }


def families():
    """Family and policy -> distance to one process, for processors put on before and after."""
    found = {}
    for name, (build, inputs) in FAMILIES.items():
        alone, given = build(), inputs()
        later = {**given, "timestep": given["timestep"] * 0.9}
        dense = outputs(alone, later)
        first, second = build(), build()
        enable_context_parallelism(first, ContextParallelConfig(ulysses_degree=2))
        found[f"{name} dense"] = [difference(outputs(first, later, Dense()), dense)]
        for kind, policy in policies(alone, given).items():
            with apply(alone, policy) as handle:
                expected = outputs(alone, later)
                calls = handle.stats()["transformer"].sparse
            with apply(first, policy) as handle:
                out = outputs(first, later)
                assert handle.stats()["transformer"].sparse == calls > 0, (name, kind)
            found[f"{name} {kind}"] = [difference(out, expected), difference(expected, dense)]
        with apply(second, policy):
            enable_context_parallelism(second, ContextParallelConfig(ulysses_degree=2))
            found[f"{name} enabled later"] = [difference(outputs(second, later), expected)]
    return found


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

    found["families"] = families()
    try:
        outputs(parallel_model(heads=3), inputs, Dense())
    except ValueError as error:
        found["uneven_heads"] = str(error)
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2])))
