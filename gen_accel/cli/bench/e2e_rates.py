"""What a device does per second at the sizes of a case: what `gen_accel.forecast` reckons with."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from gen_accel.cli.bench.e2e import Case
    from gen_accel.kernels.blocks import Blocks

_HEADS = 4  # of attention calls on a CPU: the rate is that of any number
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def measure_rates(case: Case) -> list[dict[str, Any]]:
    """Rows of kind ``"rate"``: matrix products, attention dense and sparse, memory.

    Kernels alone, on random numbers: nothing of the transformer runs.
    """
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from gen_accel.cli.bench.masks import calibrated_mask
    from gen_accel.eval.harness import measure, result_row
    from gen_accel.kernels.api import block_sparse_attention
    from gen_accel.kernels.blocks import Blocks
    from gen_accel.layout import TokenLayout
    from gen_accel.plan import default_block_size
    from gen_accel.planner.window import WindowSetting

    model, tokens, device = case.model, case.tokens, case.device
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(case.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    heads = model.heads if device == "cuda" else min(_HEADS, model.heads)
    x, weight = random(tokens, model.width), random(model.width, model.width)
    up, down = random(model.ffn, model.width), random(model.width, model.ffn)
    # As in a model: heads behind the tokens.
    q, k, v = (random(1, tokens, heads, model.head_dim) for _ in range(3))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    block = default_block_size(case.grid)

    def products() -> None:
        F.linear(F.linear(x, up), down)
        for _ in range(4):
            F.linear(x, weight)

    def dense() -> None:
        # cuDNN's is the fastest where it is, and PyTorch does not always take it.
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True):
            F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2])

    rows = -(-tokens // block)
    size = {"q_len": tokens, "kv_len": tokens, "block_size": block}
    full = 4.0 * heads * model.head_dim * tokens**2
    flop = 2.0 * tokens * model.width * (2 * model.ffn + 4 * model.width)
    fns: dict[str, Callable[[], Any]] = {
        "linear": products,
        "attention": dense,
        "memory": lambda: x + x,
    }
    work = {"linear": flop, "attention": full, "memory": 3.0 * x.nbytes}
    # Bytes that have to be moved at least; of attention q, k, v and the result.
    numbers = up.numel() + down.numel() + 4 * weight.numel()
    numbers += tokens * (2 * model.ffn + 10 * model.width)
    moved = {"linear": numbers * x.element_size(), "memory": 3 * x.nbytes}
    kept = {}
    for density in case.densities:
        mask = calibrated_mask(heads, rows, density, generator)
        blocks = Blocks.from_mask(mask.to(device), **size)
        name = f"sparse {density:g}"
        fns[name] = partial(block_sparse_attention, q, k, v, blocks)
        kept[name] = blocks.density()
        work[name] = full * kept[name]
        for precision in _quantised(case, q, k, v, blocks):
            own = f"{precision} {density:g}"
            fns[own] = partial(block_sparse_attention, q, k, v, blocks, precision=precision)
            kept[own], work[own] = kept[name], work[name]
        if "gna" not in case.methods:
            continue
        name = f"windows {density:g}"
        setting = WindowSetting(density=density)
        blocks = setting.plan(0, TokenLayout(case.grid), 0, q.device).blocks
        assert isinstance(blocks, Blocks)
        # Tiles that stick out of the grid hold places without a token: time, and no work.
        places = [random(1, blocks.q_len, heads, model.head_dim) for _ in range(3)]
        fns[name] = partial(block_sparse_attention, *places, blocks)
        kept[name] = blocks.density()
        work[name] = full * kept[name]
    started = time.perf_counter()
    measure(fns, 1, warmup=0, device=device)
    spent = time.perf_counter() - started
    rounds = max(3, min(20, int(20 / spent)))
    timings = measure(fns, rounds, warmup=0, device=device)
    return [
        result_row(
            "rate",
            name,
            work[name] / timing.median,
            "B/s" if name == "memory" else "FLOP/s",
            n=rounds,
            spread=sorted(work[name] / s for s in timing.spread),
            config={
                "dtype": _DTYPES[case.dtype],
                "density": kept.get(name, 1.0),
                "block": block,
                "intensity": work[name] / moved.get(name, 4 * q.nbytes),
            },
            model=model.name,
            shape=q.shape,
            seed=case.seed,
            device=device,
        )
        for name, timing in timings.items()
    ]


def _quantised(case: Case, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> list[str]:
    """Precisions that the case's methods take by themselves here, see `gen_accel.engine`."""
    from gen_accel.kernels.api import choose, emulates
    from gen_accel.precision import EXACT, pays

    if case.dtype == "float32" or not pays(q.device):
        return []
    policies = [case.policy(method, case.densities[0]) for method in case.methods]
    wanted = sorted({policy.preferred for policy in policies} - {EXACT})
    return [p for p in wanted if not emulates(choose(q, k, v, blocks, precision=p), p)]


def of_precision(rows: list[dict[str, Any]], precision: str) -> list[dict[str, Any]]:
    """Rates with those of a precision's own sparse calls, where there are any."""
    own = [row for row in rows if row["name"].split()[0] == precision]
    if not own:
        return rows
    others = [row for row in rows if row["name"].split()[0] not in ("sparse", precision)]
    return others + [{**row, "name": row["name"].replace(precision, "sparse", 1)} for row in own]
