"""What the compiler makes of the forward kernel for GPUs that are not here.

Triton compiles ahead of time without a GPU. Registers, spills, shared memory and the instructions
of the two matrix products are facts; how fast it all runs is not known from them.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gen_accel.kernels.quant import P_LEVELS, PRECISIONS
from gen_accel.kernels.triton import interpreter
from gen_accel.kernels.triton.config import DEVICES, SHARED, Config, Key, choose
from gen_accel.kernels.triton.forward import attention_forward
from gen_accel.kernels.triton.launch import (
    compiled_with,
    compiler_options,
    quantised_with,
    tile_of_keys,
)

HEAD_DIMS = (64, 128, 256)
BLOCKS = ((128, 128), (64, 64))
QUANTISED = ("int8", "int8+int8", "int8+fp8")
QUANTISED_FEATURES = ("lists", "everything")  # the lightest and the heaviest

# What a call may ask of the kernel beside block lists.
FEATURES: dict[str, dict[str, Any]] = {
    "lists": {"RAGGED": True, "LSE": True},
    "window": {"RAGGED": True, "WINDOW": True},
    "rectified": {"RAGGED": True, "RECTIFIED": True, "PLACES": 2},
    "joint": {"RAGGED": True, "POOLED": True},
    "everything": {
        "RAGGED": True, "LSE": True, "WINDOW": True, "POOLED": True, "VARIANCE": True, "PLACES": 2,
    },
}  # fmt: skip

_FLOATS = ("lse", "pool_bias", "ratio", "shift", "q_scale", "k_scale", "v_scale", "q_shift")
_INTS = (
    "counts", "lists", "rule_counts", "rule_lists", "rule_rows", "items", "num_items",
    "rule_key", "rule_low", "rule_high", "listed", "places",
)  # fmt: skip
_NUMBERS = re.compile(r"mma\S*\.(s8|e4m3|bf16|f16)\.\1|tcgen05\.mma\S*kind::(\w+)")
_STRIDE = re.compile(r"(q|k|v|out|pool)_(batch|token|head)")


class Kernel(NamedTuple):
    """One kernel that calls can launch."""

    key: Key
    config: Config
    feature: str
    group: int

    def row(self) -> dict[str, str]:
        """What the kernel is, in words."""
        config = self.config
        return {
            "device": f"sm_{self.key.capability}",
            "head_dim": str(self.key.head_dim),
            "precision": self.key.precision or self.key.dtype,
            "mask block": "x".join(map(str, self.key.block)),
            "rows merged": str(self.group),
            "feature": self.feature,
            "tile": f"{config.rows}x{config.keys}",
            "warps": str(config.warps),
            "stages": str(config.stages),
            "programs": str(config.programs),
        }


class Compiled(NamedTuple):
    """What the compiler says.

    Attributes:
        registers: Per thread.
        spills: Instructions that load spilled registers.
        shared: Bytes per program.
        products: Matrix products in the code, two for each of its loops and those peeled off.
        instruction: What they became: ``wgmma``, ``tcgen05`` or ``mma``.
        numbers: What those multiply, such as ``s8`` or ``e4m3``.
        loads: ``TMA`` or ``cp.async``.
        barriers: Of all warps, between the first loop's two ``wgmma`` products. One is enough to
            send warp groups into the softmax together, while the tensor cores have nothing to do.
    """

    registers: int
    spills: int
    shared: int
    products: int
    instruction: str
    numbers: str
    loads: str
    barriers: int

    def row(self) -> dict[str, str]:
        """The same in words."""
        return {
            "registers": str(self.registers),
            "spills": str(self.spills),
            "shared KB": f"{self.shared / 1024:.0f}",
            "products": f"{self.products} {self.instruction}",
            "numbers": self.numbers,
            "loads": self.loads,
        }


def shipped(
    devices: Iterable[int] = DEVICES,
    head_dims: Iterable[int] = HEAD_DIMS,
    features: Iterable[str] = tuple(FEATURES),
    precisions: Iterable[str] = ("", *QUANTISED),
) -> Iterator[Kernel]:
    """The kernels that calls launch with bf16 inputs."""
    for capability, dim, precision in itertools.product(devices, head_dims, precisions):
        if precision == "int8+fp8" and capability < 89:
            continue
        asked = [name for name in features if not precision or name in QUANTISED_FEATURES]
        for block, feature in itertools.product(BLOCKS, asked):
            yield from _kernels(capability, dim, block, feature, precision)


def _kernels(
    capability: int, dim: int, block: tuple[int, int], feature: str, precision: str
) -> Iterator[Kernel]:
    asked = FEATURES[feature]
    masked = "WINDOW" in asked or "VARIANCE" in asked
    low = block[0] < 128
    key = Key(capability, dim, "bf16", block, masked or low, "POOLED" in asked, precision)
    config = choose(key)
    yield Kernel(key, config, feature, max(1, config.rows // block[0]))
    if config.rows > block[0] >= 64:  # rows that do not merge
        key = key._replace(masked=masked)
        yield Kernel(key, choose(key, block[0]), feature, 1)


def compile_kernel(kernel: Kernel) -> Compiled:
    """Compile for the kernel's device.

    Raises:
        ValueError: Triton interprets kernels in this process.
    """
    if interpreter.active():
        raise ValueError("TRITON_INTERPRET is set, so nothing is compiled: unset it")
    key, config = kernel.key, kernel.config
    quantised = _quantised(key.precision)
    keys = tile_of_keys(config, key.block[1], quantised["K_GROUP"])
    constants = {
        "HEAD_DIM": key.head_dim, "BLOCK_D": key.head_dim,
        "BLOCK_Q": key.block[0], "BLOCK_KV": key.block[1], "GROUP": kernel.group,
        "WINDOW": False, "RAGGED": False, "RECTIFIED": False, "POOLED": False, "VARIANCE": False,
        "PLACES": 0, "LSE": False,
        **FEATURES[kernel.feature], **compiled_with(config, keys, config.tma),
        **quantised,
    }  # fmt: skip
    unused = _unused(constants)
    names = attention_forward.arg_names
    kinds = {name: _kind(name, constants, unused, key) for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if kinds[name].startswith("*") or _STRIDE.fullmatch(name)
    }
    source = ASTSource(attention_forward, kinds, constants | dict.fromkeys(unused), aligned)
    target = GPUTarget("cuda", key.capability, 32)
    made = triton.compile(source, target=target, options=compiler_options(config))
    registers, spills = _resources(made.asm["cubin"])
    ttgir, ptx = made.asm["ttgir"], made.asm["ptx"]
    products = re.compile(r"= (?:ttng\.warp_group_dot|ttng\.tc_gen5_mma|tt\.dot) |tc_gen5_mma ")
    kinds_of_product = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    found = [name for name, text in kinds_of_product.items() if text in ptx]
    return Compiled(
        registers, spills, made.metadata.shared, len(products.findall(ttgir)), "+".join(found),
        "+".join(dict.fromkeys(a or b for a, b in _NUMBERS.findall(ptx))),
        "TMA" if "cp.async.bulk.tensor" in ptx else "cp.async",
        _barriers(ptx),
    )  # fmt: skip


def problem(kernel: Kernel, compiled: Compiled) -> str | None:
    """What keeps the kernel from running well on its device, or None."""
    capability = kernel.key.capability
    if compiled.spills:
        return f"registers spilled: {compiled.spills} loads"
    if compiled.shared > SHARED[capability]:
        return f"{compiled.shared} bytes of shared memory, there are {SHARED[capability]}"
    best = {90: "wgmma", 100: "tcgen05"}.get(capability, "mma")
    if capability == 100 and kernel.key.precision:
        best = "mma"  # of integers; Triton 3.6 has no better one there
    if best not in compiled.instruction:
        return f"products became {compiled.instruction or 'no matrix instructions'}, not {best}"
    if kernel.config.together and compiled.barriers:
        return f"{compiled.barriers} barriers between the two products of a step"
    return None


def _barriers(ptx: str) -> int:
    _, _, after = ptx.partition("wgmma.commit_group")
    return after.partition("wgmma.mma_async")[0].count("bar.sync")


def _quantised(name: str) -> dict[str, int]:
    precision = PRECISIONS.get(name)
    if precision is None:
        return quantised_with()
    by_block = precision.v_scale == "block"
    v_rows = precision.k_rows if by_block else 0
    return quantised_with(precision.q_rows, precision.k_rows, v_rows, precision.pv)


def _unused(constants: dict[str, Any]) -> set[str]:
    """Pointers that a launch leaves out."""
    needs = {
        "rule_counts": constants["WINDOW"] or constants["GROUP"] > 1,
        "rule_lists": constants["WINDOW"] or constants["GROUP"] > 1,
        "rule_rows": constants["GROUP"] > 1,
        **dict.fromkeys(("rule_key", "rule_low", "rule_high"), constants["WINDOW"]),
        **dict.fromkeys(("pool_key", "pool_value", "pool_bias", "listed"), constants["POOLED"]),
        "pool_variance": constants["VARIANCE"],
        **dict.fromkeys(("ratio", "shift"), constants["RECTIFIED"]),
        "places": constants["PLACES"],
        "lse": constants["LSE"],
        **dict.fromkeys(("q_scale", "k_scale"), constants["Q_GROUP"]),
        "v_scale": constants["LEVELS"],
        "q_shift": constants["Q_GROUP"] and constants["LSE"],
    }
    return {name for name, needed in needs.items() if not needed}


def _kind(name: str, constants: dict[str, Any], unused: set[str], key: Key) -> str:
    if name in constants or name in unused:
        return "constexpr"
    if name in _FLOATS:
        return "*fp32"
    if name in _INTS:
        return "*i32"
    if name in ("q", "k", "v", "out", "pool_key", "pool_value", "pool_variance"):
        dtype = "bf16" if name == "pool_variance" else key.dtype
        if name in ("q", "k") and constants["Q_GROUP"]:
            dtype = "i8"
        elif name == "v" and constants["LEVELS"]:
            dtype = "fp8e4nv" if constants["LEVELS"] == P_LEVELS["fp8"] else "i8"
        if name in ("q", "out") or not constants["TMA"]:
            return f"*{dtype}"
        rows = constants["TILE_TAIL" if name.startswith("pool") else "TILE_KV"]
        width = constants["BLOCK_D"]
        turned = name == "v" and constants["LEVELS"]
        box = f"1,1,{width},{rows}" if turned else f"1,{rows},1,{width}"
        return f"tensordesc<{dtype}[{box}]>"
    return "fp32" if name == "scale" else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and instructions that load spilled ones.

    Not the size of the stack: ptxas keeps 8 bytes there for tensor descriptors on sm_120.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for option in ("-res-usage", "-sass")
        ]
    registers = re.search(r"REG:(\d+)", said[0].stdout + said[0].stderr)
    if registers is None:
        raise RuntimeError(f"{tool} -res-usage said nothing of registers")
    return int(registers[1]), len(re.findall(r"\bLDL\b", said[1].stdout))
