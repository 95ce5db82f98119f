"""What surrounds the forward kernel: arguments, descriptors, output."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.operands import Operands
from gen_accel.kernels.prepare import AxisPlaces, IndexPlaces, Places
from gen_accel.kernels.quant import P_LEVELS, shift_stand_ins
from gen_accel.kernels.tail import Pooled, Rectified, Tail
from gen_accel.kernels.triton import config as configs
from gen_accel.kernels.triton import interpreter
from gen_accel.kernels.triton.config import Config, Key
from gen_accel.kernels.triton.forward import attention_forward
from gen_accel.kernels.triton.tiles import Tiles, every_tile, listed_bits, make_tiles, pack

_DENSE_BLOCK = 128
TAIL_KEYS = 64  # stand-ins per step, at most
_REGISTERS = 65536  # of a multiprocessor
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_CODES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks | None,
    scale: float,
    *,
    tail: Tail | None = None,
    places: Places | None = None,
    return_lse: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One attention call; `carrier.limits` says what it takes.

    Args:
        q: ``[B, Sq, H, D]``, bf16 or fp16, any strides.
        k: ``[B, Skv, H, D]``.
        v: ``[B, Skv, H, D]``.
        blocks: Visible blocks, or None for all.
        scale: Factor of the scores.
        tail: What stands in for hidden blocks.
        places: The order that q stands in: out is then stored in the model's order, without a pass
            of its own.
        return_lse: Also return the log-sum-exp.
        config: How to compile; None looks it up.

    Returns:
        out ``[B, tokens, H, D]``, contiguous, and the natural log-sum-exp, fp32 ``[B, H, tokens]``
        or None. The tokens are those of q, or with ``places`` those of the model.
    """
    q, k, v = (_side_by_side(x) for x in (q, k, v))
    return _attend(q, k, v, None, blocks, scale, tail, places, return_lse, config)


def attend_codes(
    codes: Operands,
    blocks: Blocks | None,
    scale: float,
    *,
    tail: Tail | None = None,
    places: Places | None = None,
    return_lse: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`attend` on quantised tensors, which stand in the order that the blocks are for."""
    q, k, v = _side_by_side(codes.q.codes), _side_by_side(codes.k.codes), codes.values
    if codes.v is not None:
        v = codes.v.codes.permute(0, 3, 1, 2)
    elif v is not None:
        v = _side_by_side(v.to(_half(codes.dtype)))
    return _attend(q, k, v, codes, blocks, scale, tail, places, return_lse, config)


def _side_by_side(x: Tensor) -> Tensor:
    """The same with a token's channels next to each other in memory."""
    return x if x.stride(3) == 1 else x.contiguous()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, codes: Operands | None, blocks: Blocks | None, scale: float,
    tail: Tail | None, places: Places | None, return_lse: bool, config: Config | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A tensor v whose channels are not side by side is one of codes."""
    if interpreter.active():
        interpreter.repair()
    dtype = q.dtype if codes is None else codes.dtype
    half = _half(dtype)
    scales, groups_of = _scales(codes, scale)
    if scale < 0:  # the kernel scales row maxima
        q, scale = -q, -scale
    batch, q_len, heads, dim = q.shape
    tokens, table, order = _order(places, q_len)
    out = q.new_empty(batch, tokens, heads, dim, dtype=dtype)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32) if return_lse else None
    block = (_DENSE_BLOCK, _DENSE_BLOCK)
    rule = None
    varied = isinstance(tail, Pooled) and tail.variance is not None
    if blocks is not None:
        block = (blocks.block_q, blocks.block_kv)
        rule = None if blocks.kv_num_blocks is None else pack(blocks.mask_mod.intervals)
    sizes = triton.next_power_of_2(block[0]), triton.next_power_of_2(block[1])
    key = Key(
        _capability(q.device),
        _padded(dim, codes is not None),
        _NAMES[half],
        sizes,
        rule is not None or sizes[0] < 128 or varied,
        isinstance(tail, Pooled),
        _name(codes),
    )
    config = config or configs.choose(key, density=_density(blocks))
    if blocks is None:
        groups: tuple[Tiles, ...] = (
            every_tile(q_len, k.shape[1], block[1], batch, heads, config.rows, q.device),
        )
    else:
        groups = make_tiles(blocks, batch, heads, config.rows)
    for tiles in groups:
        chosen, rows = config, triton.next_power_of_2(tiles.rows)
        if rows != config.rows:
            masked = rule is not None or tiles.group > 1 or varied
            chosen = configs.choose(key._replace(masked=masked), max(64, rows))
        arguments, constants = _arguments(q, k, v, out, lse, tiles, blocks, block, rule, scale)
        k_mean = None if codes is None else codes.k_mean
        more, tail_constants = _tail_arguments(tail, half, blocks, k_mean)
        arguments.update(more, places=table, **order[0], **scales)
        constants.update(tail_constants, **groups_of, PLACES=order[1])
        _launch(arguments, constants, chosen)
    return out, lse


_densities: weakref.WeakKeyDictionary[Blocks, float] = weakref.WeakKeyDictionary()


def _density(blocks: Blocks | None) -> Callable[[], float] | None:
    """How to find the kept share: a GPU is waited for once, and not while a graph is captured."""
    if blocks is None:
        return None
    unknown = blocks.device.type == "cuda" and blocks not in _densities
    if unknown and torch.cuda.is_current_stream_capturing():
        return None

    def ask() -> float:
        if blocks not in _densities:
            _densities[blocks] = blocks.density()
        return _densities[blocks]

    return ask


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, tiles: Tiles,
    blocks: Blocks | None, block: tuple[int, int], rule: Any, scale: float,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    heads, q_len, kv_len, dim = q.shape[2], q.shape[1], k.shape[1], q.shape[3]
    rules = tiles.rule_lists
    arguments: dict[str, Any] = {
        "q": q, "k": k, "v": v, "out": out, "lse": lse,
        "counts": tiles.counts, "lists": tiles.lists,
        "rule_counts": tiles.rule_counts, "rule_lists": rules, "rule_rows": tiles.rule_rows,
        "items": tiles.items, "num_items": tiles.number,
        "scale": max(scale, 1e-30),  # at 0 a hidden score would be 0 times infinity
        "heads": heads, "q_len": q_len, "kv_len": kv_len, "out_len": out.shape[1],
        "tiles": -(-q_len // tiles.rows), "mask_rows": -(-q_len // block[0]),
        "key_blocks": -(-kv_len // block[1]),
        "list_width": tiles.lists.shape[-1], "rule_width": 0 if rules is None else rules.shape[-1],
        "rule_key": None, "rule_low": None, "rule_high": None,
        "rule_head": 0, "rule_guard": 0, "rule_free": 0,
    }  # fmt: skip
    arguments.update(_list_strides("list", tiles.counts))
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        arguments.update(_strides(name, x))
    if v.stride(3) != 1:
        arguments["v_token"] = v.stride(3)  # channel by channel
    if rule is not None:
        arguments.update(
            rule_key=rule.key, rule_low=rule.low, rule_high=rule.high, rule_guard=rule.guard,
            rule_free=rule.free, rule_head=0 if rule.low.shape[0] == 1 else q_len,
        )  # fmt: skip
    constants = {
        "HEAD_DIM": dim,
        "BLOCK_D": _padded(dim, q.dtype == torch.int8),
        "BLOCK_Q": max(block[0], tiles.rows) if blocks is None else block[0],
        "BLOCK_KV": block[1],
        "GROUP": tiles.group,
        "WINDOW": rule is not None,
        "RAGGED": kv_len % block[1] != 0,
        "LSE": lse is not None,
    }
    return arguments, constants


def _tail_arguments(
    tail: Tail | None, dtype: torch.dtype, blocks: Blocks | None, k_mean: Tensor | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    arguments: dict[str, Any] = dict.fromkeys(
        ("pool_key", "pool_value", "pool_variance", "pool_bias", "listed", "ratio", "shift")
    )
    numbers = ("num_pooled", "pool_shift", "pool_batch", "pool_token", "pool_head")
    arguments.update(dict.fromkeys((*numbers, "listed_batch", "listed_head", "listed_width"), 0))
    if isinstance(tail, Pooled) and blocks is not None:
        bits = listed_bits(blocks)
        tail = shift_stand_ins(tail, k_mean)
        keys, values = (x.to(dtype).contiguous() for x in (tail.key, tail.value))
        variance = tail.variance
        if variance is not None:
            variance = variance.to(torch.bfloat16).contiguous()  # squares overflow fp16
        arguments.update(
            pool_key=keys, pool_value=values, pool_variance=variance,
            pool_bias=tail.bias.float().contiguous(), listed=bits, listed_width=bits.shape[-1],
            num_pooled=tail.bias.numel(), pool_shift=tail.per_block.bit_length() - 1,
            **_strides("pool", keys), **_list_strides("listed", bits[..., 0]),
        )  # fmt: skip
        arguments.pop("listed_tile")
    elif isinstance(tail, Rectified):
        arguments.update(ratio=tail.ratio.float().contiguous())
        arguments.update(shift=tail.shift.float().contiguous())
    constants = {
        "RECTIFIED": isinstance(tail, Rectified),
        "POOLED": isinstance(tail, Pooled),
        "VARIANCE": isinstance(tail, Pooled) and tail.variance is not None,
    }
    return arguments, constants


def _scales(codes: Operands | None, scale: float) -> tuple[dict[str, Any], dict[str, int]]:
    """What a quantised call adds to the kernel's arguments and constants."""
    arguments: dict[str, Any] = dict.fromkeys(("q_scale", "k_scale", "v_scale", "q_shift"))
    if codes is None:
        return arguments, quantised_with()
    arguments.update(q_scale=codes.q.scale, k_scale=codes.k.scale)
    arguments.update(q_shift=codes.shift if scale >= 0 else -codes.shift)
    if codes.v is None:
        return arguments, quantised_with(codes.q.rows, codes.k.rows)
    arguments.update(v_scale=codes.v.scale)
    v_rows = codes.v.rows if codes.v.scale.shape[2] > 1 else 0
    return arguments, quantised_with(
        codes.q.rows, codes.k.rows, v_rows, _CODES[codes.v.codes.dtype]
    )


def quantised_with(
    q_rows: int = 0, k_rows: int = 0, v_rows: int = 0, pv: str | None = None
) -> dict[str, int]:
    """The constants of the kernel that say how a call is quantised."""
    levels = 0 if pv is None else int(P_LEVELS[pv])
    return {"Q_GROUP": q_rows, "K_GROUP": k_rows, "V_GROUP": v_rows, "LEVELS": levels}


def _half(dtype: torch.dtype) -> torch.dtype:
    """What values are multiplied in where they are not quantised."""
    return dtype if dtype in _NAMES else torch.bfloat16


def _name(codes: Operands | None) -> str:
    """Which of `quant.PRECISIONS` it is, for `Key`."""
    if codes is None:
        return ""
    return "int8" if codes.v is None else f"int8+{_CODES[codes.v.codes.dtype]}"


def _padded(dim: int, quantised: bool) -> int:
    """Channels of a tile: a power of two that matrix products take."""
    return max(32 if quantised else 16, triton.next_power_of_2(dim))


def _launch(arguments: dict[str, Any], constants: dict[str, Any], config: Config) -> None:
    read = ["k", "v"]
    pools = [n for n in ("pool_key", "pool_value", "pool_variance") if arguments[n] is not None]
    tma = config.tma and all(_describable(arguments[name]) for name in (*read, *pools))
    keys = tile_of_keys(config, constants["BLOCK_KV"], constants["K_GROUP"])
    fixed = compiled_with(config, keys, tma)
    if tma:
        for names, rows in ((read, fixed["TILE_KV"]), (pools, fixed["TILE_TAIL"])):
            for name in names:
                x, box = arguments[name], [1, rows, 1, constants["BLOCK_D"]]
                if x.stride(3) != 1:
                    x, box = x.permute(0, 2, 3, 1), [1, 1, constants["BLOCK_D"], rows]
                arguments[name] = TensorDescriptor.from_tensor(x, box)
    with torch.cuda.device_of(arguments["q"]):
        attention_forward[(arguments["items"].numel(),)](
            **arguments, **constants, **fixed, **compiler_options(config)
        )


def tile_of_keys(config: Config, block_kv: int, k_rows: int) -> int:
    """Keys per tile: those that share a scale in quantised calls, whatever the configuration."""
    return min(k_rows or config.keys, triton.next_power_of_2(block_kv))


def compiler_options(config: Config) -> dict[str, int]:
    """What a configuration asks of Triton's compiler."""
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.programs > 1:
        options["maxnreg"] = _REGISTERS // (32 * config.warps * config.programs)
    return options


def compiled_with(config: Config, keys: int, tma: bool) -> dict[str, Any]:
    """The constants of the kernel that follow from a configuration."""
    return {
        "TILE_Q": config.rows,
        "TILE_KV": keys,
        "TILE_TAIL": min(TAIL_KEYS, config.keys, keys),
        "TMA": tma,
        "TOGETHER": config.together,
        "STAGES": config.stages,
        "TAIL_STAGES": 2 if tma else 1,  # prefetching through pointers spills registers
    }


def _strides(name: str, x: Tensor) -> dict[str, int]:
    batch, token, head, _ = x.stride()
    return {f"{name}_batch": batch, f"{name}_token": token, f"{name}_head": head}


def _list_strides(name: str, counts: Tensor) -> dict[str, int]:
    """In rows; 0 along an axis that is shared."""
    batch, head, tile = counts.shape
    return {
        f"{name}_batch": 0 if batch == 1 else head * tile,
        f"{name}_head": 0 if head == 1 else tile,
        f"{name}_tile": 0 if tile == 1 else 1,
    }


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can address it."""
    wide = sorted(x.stride())[1:]  # the innermost is 1
    aligned = all(s > 0 and s * x.element_size() % 16 == 0 for s in wide)
    return aligned and x.data_ptr() % 16 == 0


def _capability(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# ---- where rows of out stand ---------------------------------------------------------------------

_tables: weakref.WeakKeyDictionary[Places, Tensor] = weakref.WeakKeyDictionary()


def _order(
    places: Places | None, q_len: int
) -> tuple[int, Tensor | None, tuple[dict[str, int], int]]:
    """Tokens of out, the kernel's table, and its arguments with the kind of table."""
    if places is None:
        return q_len, None, ({"places_head": 0, "places_video": 0, "places_text": 0}, 0)
    if places not in _tables:
        index = isinstance(places, IndexPlaces)
        _tables[places] = _index_table(places) if index else _axis_table(places)
    table = _tables[places]
    if isinstance(places, IndexPlaces):
        arguments = {"places_head": 0, "places_video": 0, "places_text": 0}
        return len(places.place), table, (arguments, 1)
    frames, height, width = places.grid
    video = frames * height * width
    arguments = {"places_head": 5, "places_video": video, "places_text": places.before}
    return q_len, table, (arguments, 2)


def _index_table(places: IndexPlaces) -> Tensor:
    """Token of each place, -1 where the place is padding."""
    token = places.token
    place = torch.arange(len(token), device=token.device)
    return torch.where(places.place[token] == place, token, -1).int()


def _axis_table(places: AxisPlaces) -> Tensor:
    """``[H, 5]``: extents of the middle and the fastest axis, raster strides slowest axis first."""
    axes = places.strides.argsort(dim=-1, descending=True, stable=True)
    _, height, width = places.grid
    extents = torch.tensor(places.grid, device=axes.device)[axes[:, 1:]]
    raster = torch.tensor([height * width, width, 1], device=axes.device)[axes]
    return torch.cat([extents, raster], 1).int().contiguous()
