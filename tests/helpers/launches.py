"""Launch every kernel as the wrappers do and compile nothing but its types; print how many.

The arguments that a launch really has decide what is specialised: numbers that are 1 become
constants, None and descriptors have types of their own. Triton's interpreter sees none of that, and
ahead-of-time compilation only what somebody wrote down. No GPU is needed, for nothing is run.

Run as a script, without the interpreter: ``python tests/helpers/launches.py``.
"""

import itertools

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver, jit

from triton._C.libtriton import ir  # isort: skip

TARGET = GPUTarget("cuda", 90, 32)
found = set()


class Driver:
    """Of a GPU that is not there."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_types(source, target, options, **_):
    backend, context = CUDABackend(target), ir.context()
    options = backend.parse_options(dict(options))
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = backend.get_codegen_implementation(options)
    source.make_ir(target, options, code, backend.get_module_map(), context)
    found.add((source.name, str(source.signature), str(source.constants)))
    return object()


def launch(kernel, *args, grid, warmup, **kwargs):
    assert max(grid[1:], default=1) <= 65535, (kernel, grid)
    return run(kernel, *args, grid=grid, warmup=True, **kwargs)


driver.set_active(Driver())
run, jit.JITFunction.run = jit.JITFunction.run, launch
triton.compiler.compile = compile_types

from gen_accel.kernels import operands as definition  # noqa: E402
from gen_accel.kernels.blocks import Blocks  # noqa: E402
from gen_accel.kernels.prepare import (  # noqa: E402
    AxisPlaces,
    IndexPlaces,
    Norm,
    Rope,
    _flatten,
    _flatten_norm,
    _flatten_rope,
)
from gen_accel.kernels.quant import PRECISIONS  # noqa: E402
from gen_accel.kernels.tail import block_scores, pool_keys, rectify  # noqa: E402
from gen_accel.kernels.triton import launch as forward  # noqa: E402
from gen_accel.kernels.triton import mass, pool, prepare, quantise, route  # noqa: E402
from gen_accel.select.gna import gna_plan  # noqa: E402

forward._capability = lambda device: TARGET.arch


def attend(q, k, v, blocks, **options):
    """In 16 bits and, where there are kernels, on codes."""
    forward.attend(q, k, v, blocks, 0.1, **options)
    for name in ("int8", "int8+int8", "int8+fp8"):
        if PRECISIONS[name].pv is None or blocks is None or blocks.block_kv >= 32:
            codes = definition.operands(q, k, v, PRECISIONS[name])
            forward.attend_codes(codes, blocks, 0.1, **options)


def tensors(batch, tokens, heads, dim):
    return torch.zeros(3, batch, tokens, heads, dim, dtype=torch.bfloat16)


def attention():
    sizes = itertools.product((1, 333), (1, 2), (16, 96), (16, 128))
    for tokens, heads, dim, block in sizes:
        q, k, v = tensors(1, tokens, heads, dim)
        rows = -(-tokens // block)
        mask = torch.ones(1, 1, rows, rows, dtype=torch.bool)
        blocks = Blocks.from_mask(mask, q_len=tokens, kv_len=tokens, block_size=block)
        attend(q, k, v, blocks, return_lse=heads == 1)
        if block == 128 and dim == 16:
            attend(q, k, v, None)
            scores = block_scores(q, k, block, block, pooled=tokens, scale=0.1)
            for tail in (
                rectify(v, blocks, scores, pooled=tokens),
                pool_keys(k, v, block),
                pool_keys(k, v, block, per_block=2, variance=True),
            ):
                attend(q, k, v, blocks, tail=tail)
            places = AxisPlaces.from_axes([(2, 0, 1)] * heads, (tokens, 1, 1))
            attend(q, k, v, blocks, places=places)
            index = torch.arange(tokens)
            attend(q, k, v, blocks, places=IndexPlaces(index, index))
    for block in (64, 128):
        _, blocks = gna_plan((3, 7, 9), (3, 5, 5), tile=(1, 8, 8), block=block, text=33)
        attend(*tensors(1, blocks.q_len, 2, 32), blocks)
    narrow = tensors(1, 70, 2, 66)[..., 1:65]  # no descriptor addresses it
    forward.attend(*narrow, None, 0.1)


def around():
    shapes = ((1, 1, 1, 2), (1, 20, 1, 96), (2, 20, 9, 16))
    for batch, tokens, heads, dim in shapes:
        x = tensors(batch, tokens, heads, dim)[0]
        index = torch.arange(tokens)
        places = (
            None,
            AxisPlaces.from_axes([(0, 1, 2)] * heads, (tokens, 1, 1)),
            IndexPlaces(index, index),
        )
        angle = torch.ones(tokens, dim // 2)
        ropes = (None, Rope(angle, angle), Rope(angle.double(), angle.double(), 1, halves=True))
        norms = (None, Norm(torch.ones(dim), 1e-6), Norm(torch.ones(heads * dim), 1.0))
        for order, rope in itertools.product(places, ropes):
            for norm in norms:
                pieces = *_flatten(order), *_flatten_rope(rope), *_flatten_norm(norm)
                out = prepare.prepare(x, *pieces)
            prepare.restore(out, *_flatten(order))
            for name in ("int8", "int8+int8", "int8+fp8"):
                quantise.operands(x, x, x, PRECISIONS[name], order, rope)
        for size, real in ((1, None), (8, torch.ones(tokens, dtype=torch.bool))):
            pool.pool(x, size, real, True, real is None)
        for block, rows in ((1, 1), (16, 3), (128, 128)):
            for lse in (None, torch.zeros(batch, heads, tokens)):
                blocks = max(1, tokens // block)
                mass.block_mass(x, x, lse, block, blocks, min(rows, block), 1.0)
    for columns in (1, 5, 2048):
        scores = torch.zeros(1, 2, 3, columns)
        for keep, beta, forced in ((1, None, None), (0, 1.0, None), (3, 0.5, scores > 0)):
            route.route(scores, keep, beta, forced, columns)
        route.to_lists(scores > 0, columns)


if __name__ == "__main__":
    attention()
    around()
    print(len(found))
