"""The attention forward kernel: block lists, windows, tails and output orders in one launch.

Program i takes tile i of a queue: heads one by one, so that their keys stay in L2, and the longest
lists of a head first. It walks the key blocks that the tile's list names, in one online softmax:
first those without an element mask, then the others, then the stand-ins of a joint tail.

Quantised calls (`quant.Precision`) differ in three places: scores are integers with a factor for
each row and tile of keys, weights are rounded relative to the tile's own maximum, and values come
channel by channel, because 8-bit matrix products want both operands along the axis they sum over.

The programs are not persistent: as a loop over tiles the same code takes every register of sm_90
(255 instead of 208 for plain lists, head_dim 128) and spills with windows and stand-ins.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The running maximum of a row that has seen nothing, in place of -inf: below every score, and with
# finite differences, so that a row without keys needs no special case.
_NOTHING = tl.constexpr(-(2.0**100))
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


# Numbers that differ from call to call: a kernel made for one of them would serve no other.
_SIZES = (
    "heads", "q_len", "kv_len", "out_len", "tiles", "mask_rows", "key_blocks",
    "list_batch", "list_head", "list_tile", "list_width",
    "rule_width", "rule_head", "rule_guard", "rule_free",
    "num_pooled", "pool_shift", "listed_batch", "listed_head", "listed_width",
    "places_head", "places_video", "places_text",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def attention_forward(
    # q and out are pointers; k and v are tensor descriptors with TMA, else pointers.
    q, k, v, out, lse,
    # Lists of key blocks, and the queue: see `tiles.Tiles`.
    counts, lists, rule_counts, rule_lists, rule_rows, items, num_items,
    # The element rule, see `tiles.Packed`.
    rule_key, rule_low, rule_high,
    # The tail, see `tail.Pooled` and `tail.Rectified`; `listed` has a bit per (mask row, block).
    pool_key, pool_value, pool_variance, pool_bias, listed, ratio, shift,
    # Where the rows of out stand, see `launch`.
    places,
    # Scales and shift of the codes, see `operands.Operands`.
    q_scale, k_scale, v_scale, q_shift,
    scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    out_batch, out_token, out_head, pool_batch, pool_token, pool_head,
    heads, q_len, kv_len, out_len, tiles, mask_rows, key_blocks,
    list_batch, list_head, list_tile, list_width, rule_width, rule_head, rule_guard, rule_free,
    num_pooled, pool_shift, listed_batch, listed_head, listed_width,
    places_head, places_video, places_text,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, TILE_TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, RAGGED: tl.constexpr, RECTIFIED: tl.constexpr,
    POOLED: tl.constexpr, VARIANCE: tl.constexpr, PLACES: tl.constexpr, LSE: tl.constexpr,
    TMA: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr, TAIL_STAGES: tl.constexpr,
    Q_GROUP: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Grid: as many programs as there may be items. A tile is TILE_Q queries of one head.

    Blocks of other sizes than powers of two are walked in tiles that reach into their neighbours:
    of a tile's lanes only those count that lie in its own block.

    GROUP is 1 where a list belongs to one mask row, else the number of mask rows it was merged
    from. Strides count elements, those of lists count rows; the innermost stride of q, k, v and out
    is 1.

    With Q_GROUP, q and k are codes, and that many queries (K_GROUP keys) share a scale. With LEVELS
    values are codes too, ``v_token`` from channel to channel, and weights are rounded to 0..LEVELS;
    V_GROUP keys share a scale per channel, or with 0 all keys.
    """
    SPLIT: tl.constexpr = (BLOCK_KV + TILE_KV - 1) // TILE_KV
    ODD: tl.constexpr = BLOCK_KV % TILE_KV != 0  # a tile reaches into the next block
    STEP_Q: tl.constexpr = TILE_Q if TILE_Q < BLOCK_Q or GROUP > 1 else BLOCK_Q
    LIST_Q: tl.constexpr = TILE_Q if GROUP > 1 else BLOCK_Q
    # exp(scale * score) = exp2(slope * score). The scale is positive: its sign went into q.
    slope = scale * _LOG2_E
    dims = tl.arange(0, BLOCK_D)
    item = tl.program_id(0)
    if item < tl.load(num_items):
        work = tl.load(items + item)
        tile = work % tiles
        head = (work // tiles) % heads
        batch = work // tiles // heads
        lane = tl.arange(0, TILE_Q)
        rows = tile * STEP_Q + lane
        inside = (rows < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
        queries = tl.load(
            q + _base(batch, q_batch, head, q_head) + rows[:, None].to(tl.int64) * q_token + dims,
            mask=inside, other=0.0,
        )  # fmt: skip
        row_slope = slope
        key_scales = k_scale
        value_scales = v_scale
        if Q_GROUP:
            pair = batch * heads + head
            group = pair * tl.cdiv(q_len, Q_GROUP) + tl.minimum(rows, q_len - 1) // Q_GROUP
            row_scale = tl.load(q_scale + group)
            row_slope = row_scale * slope
            key_scales += pair * tl.cdiv(kv_len, K_GROUP)
            if V_GROUP:
                value_scales += pair.to(tl.int64) * tl.cdiv(kv_len, V_GROUP) * HEAD_DIM
        keys_of = k if TMA else k + _base(batch, k_batch, head, k_head)
        values_of = v if TMA else v + _base(batch, v_batch, head, v_head)
        peak = tl.full([TILE_Q], _NOTHING, tl.float32)
        norm = tl.zeros([TILE_Q], tl.float32)
        acc = tl.zeros([TILE_Q, BLOCK_D], tl.float32)

        list_row = batch * list_batch + head * list_head + tile * STEP_Q // LIST_Q * list_tile
        count = tl.load(counts + list_row)
        entries = lists + list_row.to(tl.int64) * list_width
        cut = 0
        if RAGGED:
            # Lists ascend: only the last entry can be the block in which the keys end.
            last = tl.load(entries + count - 1, mask=count > 0, other=-1)
            cut = (last == key_blocks - 1).to(tl.int32)
        steps = (count - cut) * SPLIT
        block = tl.load(entries)
        unit = 1.0
        if K_GROUP:
            unit = _key_scale(key_scales, block * BLOCK_KV, kv_len, K_GROUP, steps > 0)
        for i in tl.range(0, steps, num_stages=STAGES):
            start = block * BLOCK_KV + i % SPLIT * TILE_KV
            factor = row_slope * unit if K_GROUP else row_slope
            # One step ahead, in a register: left to itself the compiler prefetches it through
            # shared memory, which costs a barrier a step and many registers.
            block = tl.load(entries + tl.minimum(i + 1, steps - 1) // SPLIT)
            if K_GROUP:
                ahead = block * BLOCK_KV + (i + 1) % SPLIT * TILE_KV
                unit = _key_scale(key_scales, ahead, kv_len, K_GROUP, True)
            scores, values = _scores_and_values(
                queries, keys_of, k_token, values_of, v_token, batch, head, start, kv_len,
                HEAD_DIM, BLOCK_D, TILE_KV, TMA, ODD, K_GROUP, LEVELS, TOGETHER,
            )  # fmt: skip
            if ODD:
                own = i % SPLIT * TILE_KV + tl.arange(0, TILE_KV) < BLOCK_KV
                scores = tl.where(own[None, :], scores, -float("inf"))
            acc, peak, norm = _accumulate(
                acc, peak, norm, scores, factor, values, value_scales, start, kv_len,
                HEAD_DIM, K_GROUP, V_GROUP, LEVELS,
            )  # fmt: skip

        if WINDOW or GROUP > 1 or RAGGED:
            RULE_STAGES: tl.constexpr = STAGES if WINDOW or GROUP > 1 or not TMA else 1
            ruled = 0
            if WINDOW or GROUP > 1:
                ruled = tl.load(rule_counts + list_row)
                rule_entries = rule_lists + list_row.to(tl.int64) * rule_width
            if GROUP > 1:
                rule_bits = rule_rows + list_row.to(tl.int64) * rule_width
            if WINDOW:
                at = head * rule_head + tl.minimum(rows, q_len - 1)
                low = tl.load(rule_low + at)
                high = tl.load(rule_high + at)
            final = key_blocks - 1
            listed_block = final
            listed_rows = 0
            if WINDOW or GROUP > 1:
                listed_block = tl.load(rule_entries)
            if GROUP > 1:
                listed_rows = tl.load(rule_bits)
            if K_GROUP:
                ahead = tl.where(ruled > 0, listed_block, final) * BLOCK_KV
                unit = _key_scale(key_scales, ahead, kv_len, K_GROUP, True)
            for i in tl.range(0, (ruled + cut) * SPLIT, num_stages=RULE_STAGES):
                entry = i // SPLIT
                block = tl.where(entry < ruled, listed_block, final)
                start = block * BLOCK_KV + i % SPLIT * TILE_KV
                factor = row_slope * unit if K_GROUP else row_slope
                # Bit r: the tile's mask row r lists the block as full; bit GROUP + r: as partial.
                bits = tl.where(entry < ruled, listed_rows, (1 << GROUP) - 1)
                ahead = tl.minimum((i + 1) // SPLIT, rule_width - 1)
                if WINDOW or GROUP > 1:
                    listed_block = tl.load(rule_entries + ahead)
                if GROUP > 1:
                    listed_rows = tl.load(rule_bits + ahead)
                if K_GROUP:
                    following = tl.where((i + 1) // SPLIT < ruled, listed_block, final)
                    ahead = following * BLOCK_KV + (i + 1) % SPLIT * TILE_KV
                    unit = _key_scale(key_scales, ahead, kv_len, K_GROUP, True)
                scores, values = _scores_and_values(
                    queries, keys_of, k_token, values_of, v_token, batch, head, start, kv_len,
                    HEAD_DIM, BLOCK_D, TILE_KV, TMA, True, K_GROUP, LEVELS, TOGETHER,
                )  # fmt: skip
                columns = start + tl.arange(0, TILE_KV)
                visible = (columns < kv_len)[None, :]
                if ODD:
                    visible = visible & (columns < (block + 1) * BLOCK_KV)[None, :]
                if GROUP > 1:
                    row_bits = bits >> (tl.arange(0, TILE_Q) // BLOCK_Q)
                    whole = (row_bits & 1) != 0
                if WINDOW:
                    column = tl.load(rule_key + columns, mask=columns < kv_len, other=0)[None, :]
                    free = tl.where(columns >= rule_free, rule_guard, 0)[None, :]
                    # A guard bit above each coordinate survives where the key is not below.
                    fits = (column - low[:, None]) & ~(column - high[:, None]) | free
                    fits = (fits & rule_guard) == rule_guard
                    if GROUP > 1:
                        part = ((row_bits >> GROUP) & 1) != 0
                        visible = visible & (whole[:, None] | (part[:, None] & fits))
                    else:
                        visible = visible & (fits | (entry >= ruled))
                elif GROUP > 1:
                    visible = visible & whole[:, None]
                scores = tl.where(visible, scores, -float("inf"))
                acc, peak, norm = _accumulate(
                    acc, peak, norm, scores, factor, values, value_scales, start, kv_len,
                    HEAD_DIM, K_GROUP, V_GROUP, LEVELS,
                )  # fmt: skip

        if LEVELS and not V_GROUP:
            channel = (batch * heads + head) * HEAD_DIM + dims
            acc *= tl.load(v_scale + channel, mask=dims < HEAD_DIM, other=0.0)[None, :]

        if POOLED:
            first = tile * STEP_Q // BLOCK_Q
            pool = _base(batch, pool_batch, head, pool_head)
            means = pool_key if TMA else pool_key + pool
            values_of = pool_value if TMA else pool_value + pool
            spreads = pool_variance
            if Q_GROUP:  # codes are exact in 16 bits
                queries = queries.to(tl.float32)
                queries = queries.to(pool_value.dtype if TMA else pool_value.dtype.element_ty)
                row_slope = row_slope[:, None]
            squares = queries
            if VARIANCE:
                spreads = pool_variance if TMA else pool_variance + pool
                squares = (queries.to(tl.float32) * queries.to(tl.float32)).to(tl.bfloat16)
            flags = listed + (batch * listed_batch + head * listed_head).to(tl.int64) * listed_width
            for start in tl.range(0, num_pooled, TILE_TAIL, num_stages=TAIL_STAGES):
                scores, values = _scores_and_values(
                    queries, means, pool_token, values_of, pool_token, batch, head, start,
                    num_pooled, HEAD_DIM, BLOCK_D, TILE_TAIL, TMA, True, 0, 0, TOGETHER,
                )  # fmt: skip
                scores *= row_slope
                if VARIANCE:
                    spread = _tile(spreads, pool_token, batch, head, start, num_pooled,
                                   HEAD_DIM, BLOCK_D, TILE_TAIL, TMA, True)  # fmt: skip
                    steep = row_slope * scale / 2
                    if Q_GROUP:
                        steep *= row_scale[:, None]
                    scores += tl.dot(squares, spread.T) * steep
                columns = start + tl.arange(0, TILE_TAIL)
                real = columns < num_pooled
                bias = tl.load(pool_bias + columns, mask=real, other=-float("inf")) * _LOG2_E
                scores += bias[None, :]
                stands_for = columns >> pool_shift
                if GROUP > 1:
                    for r in tl.static_range(GROUP):
                        row = tl.minimum(first + r, mask_rows - 1)
                        hidden = _is_listed(flags, row, stands_for, listed_width, real)
                        own = tl.arange(0, TILE_Q) // BLOCK_Q == r
                        scores = tl.where(own[:, None] & hidden[None, :], -float("inf"), scores)
                else:
                    hidden = _is_listed(flags, first, stands_for, listed_width, real)
                    scores = tl.where(hidden[None, :], -float("inf"), scores)
                acc, peak, norm = _accumulate(
                    acc, peak, norm, scores, 1.0, values, v_scale, 0, 1, HEAD_DIM, 0, 0, 0
                )

        seen = norm > 0
        acc = acc / tl.where(seen, norm, 1.0)[:, None]
        if RECTIFIED:
            first = (batch * heads + head) * mask_rows + tile * STEP_Q // BLOCK_Q
            for r in tl.static_range(GROUP):
                row = tl.minimum(first + r, (batch * heads + head + 1) * mask_rows - 1)
                factor = tl.load(ratio + row)
                vector = shift + row.to(tl.int64) * HEAD_DIM + dims
                vector = tl.load(vector, mask=dims < HEAD_DIM, other=0.0)
                if GROUP > 1:
                    own = (tl.arange(0, TILE_Q) // BLOCK_Q == r)[:, None]
                    acc = tl.where(own, acc * factor + vector[None, :], acc)
                else:
                    acc = acc * factor + vector[None, :]

        # The token at which a row of out stands; below 0: nowhere.
        if PLACES == 0:
            token = rows
        elif PLACES == 1:
            token = tl.load(places + head * places_head + rows, mask=rows < q_len, other=-1)
        else:
            token = _axis_place(places + head * places_head, rows, places_video, places_text)
        stored = (rows < q_len) & (lane < STEP_Q) & (token >= 0)
        tl.store(
            out + _base(batch, out_batch, head, out_head)
            + token[:, None].to(tl.int64) * out_token + dims,
            acc.to(out.dtype.element_ty),
            mask=stored[:, None] & (dims < HEAD_DIM)[None, :],
        )  # fmt: skip
        if LSE:
            total_mass = (peak + tl.math.log2(tl.where(seen, norm, 1.0))) * _LN_2
            if Q_GROUP:
                shifts = q_shift + (batch * heads + head).to(tl.int64) * q_len + rows
                total_mass += scale * tl.load(shifts, mask=rows < q_len, other=0.0)
            tl.store(
                lse + (batch * heads + head).to(tl.int64) * out_len + token,
                tl.where(seen, total_mass, -float("inf")),
                mask=stored,
            )


@triton.jit
def _scores_and_values(
    queries, keys_of, k_token, values_of, v_token, batch, head, start, kv_len,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_KV: tl.constexpr, TMA: tl.constexpr,
    RAGGED: tl.constexpr, K_GROUP: tl.constexpr, LEVELS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of keys, and its values: what `_accumulate` takes."""
    keys = _tile(keys_of, k_token, batch, head, start, kv_len,
                 HEAD_DIM, BLOCK_D, TILE_KV, TMA, RAGGED)  # fmt: skip
    if TOGETHER:
        values = _values(values_of, v_token, batch, head, start, kv_len,
                         HEAD_DIM, BLOCK_D, TILE_KV, TMA, RAGGED, LEVELS)  # fmt: skip
    scores = _scores(queries, keys, K_GROUP)
    if not TOGETHER:
        values = _values(values_of, v_token, batch, head, start, kv_len,
                         HEAD_DIM, BLOCK_D, TILE_KV, TMA, RAGGED, LEVELS)  # fmt: skip
    return scores, values


@triton.jit
def _scores(queries, keys, K_GROUP: tl.constexpr):
    scores = tl.dot(queries, keys.T)
    if K_GROUP:
        scores = scores.to(tl.float32)
    return scores


@triton.jit
def _key_scale(key_scales, start, kv_len, K_GROUP: tl.constexpr, exists):
    """Scale of the tile of keys that begins there."""
    return tl.load(key_scales + tl.minimum(start, kv_len - 1) // K_GROUP, mask=exists, other=1.0)


@triton.jit
def _accumulate(
    acc, peak, norm, scores, factor, values, value_scales, start, kv_len,
    HEAD_DIM: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax; everything is rescaled when the maximum moves."""
    if K_GROUP:
        factor = tl.maximum(factor, 1e-30)  # at 0 a hidden score would be 0 times infinity
    top = tl.max(scores, 1) * factor
    if K_GROUP:
        factor = factor[:, None]
    if LEVELS:
        # A fused multiply-add must not come out above its own rounded maximum: 128 is no int8.
        top = tl.maximum(top, _NOTHING)
        top += tl.abs(top) * 2.0**-23
    highest = tl.maximum(peak, top)
    fade = tl.math.exp2(peak - highest)
    if LEVELS:
        # Relative to the tile's own maximum: rounding does not depend on the other tiles.
        weights = tl.math.exp2(scores * factor - top[:, None]) * LEVELS
        codes, total = _rounded(weights, values.dtype)
        share = tl.math.exp2(top - highest) * (1.0 / LEVELS)
        norm = norm * fade + total * share
        # In the order of keys in which values are stored, see `operands.turn`.
        ROWS: tl.constexpr = codes.shape[0]
        KEYS: tl.constexpr = codes.shape[1]
        codes = codes.reshape(ROWS, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, KEYS)
        part = tl.dot(codes, values).to(tl.float32)
        if V_GROUP:
            dims = tl.arange(0, acc.shape[1])
            scales = value_scales + tl.minimum(start, kv_len - 1) // V_GROUP * HEAD_DIM + dims
            part *= tl.load(scales, mask=dims < HEAD_DIM, other=0.0)[None, :]
        acc = acc * fade[:, None] + part * share[:, None]
    else:
        weights = tl.math.exp2(scores * factor - highest[:, None])
        norm = norm * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None])
    return acc, highest, norm


@triton.jit
def _rounded(weights, dtype: tl.constexpr):
    """Codes of weights, ties to even, and the sum of each row's."""
    if dtype == tl.int8:
        # 1.5 * 2^23 pushes the fraction out; what is left of the bits is the integer.
        bits = (weights + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        codes = bits.to(tl.int8)
        total = tl.sum(bits, 1).to(tl.float32)
    else:
        codes = weights.to(dtype)
        total = tl.sum(codes.to(tl.float32), 1)
    return codes, total


@triton.jit
def _values(
    x, stride, batch, head, start, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    TMA: tl.constexpr, RAGGED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """``[TILE, BLOCK_D]`` values; TURNED: as `operands.turn` stores them."""
    if TURNED:
        if TMA:
            tile = x.load([batch, head, 0, start]).reshape(BLOCK_D, TILE)
        else:
            row = tl.arange(0, TILE)
            dims = tl.arange(0, BLOCK_D)
            place = x + start + (dims[:, None] * stride + row[None, :])
            if RAGGED:  # they end with a tile
                mask = (dims < HEAD_DIM)[:, None] & (start < length)
                tile = tl.load(place, mask=mask, other=0.0)
            elif HEAD_DIM < BLOCK_D:
                tile = tl.load(place, mask=(dims < HEAD_DIM)[:, None], other=0.0)
            else:
                tile = tl.load(place)
        tile = tile.T
    else:
        tile = _tile(x, stride, batch, head, start, length, HEAD_DIM, BLOCK_D, TILE, TMA, RAGGED)
    return tile


@triton.jit
def _tile(
    x, stride, batch, head, start, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    TMA: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """``[TILE, BLOCK_D]`` keys or values; zero beyond ``length`` and beyond the head."""
    if TMA:
        tile = x.load([batch, start, head, 0]).reshape(TILE, BLOCK_D)
    else:
        row = tl.arange(0, TILE)
        dims = tl.arange(0, BLOCK_D)
        # Within a tile 32 bits are enough, and take half the registers.
        place = x + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + dims[None, :])
        if RAGGED:
            mask = (start + row < length)[:, None] & (dims < HEAD_DIM)[None, :]
            tile = tl.load(place, mask=mask, other=0.0)
        elif HEAD_DIM < BLOCK_D:
            tile = tl.load(place, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            tile = tl.load(place)
    return tile


@triton.jit
def _base(batch, batch_stride, head, head_stride):
    return batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def _is_listed(bits, row, block, width, real):
    words = tl.load(bits + row.to(tl.int64) * width + block // 32, mask=real, other=0)
    return ((words >> (block % 32)) & 1) != 0


@triton.jit
def _axis_place(table, rows, video, text):
    """Token of an ordered place: the grid in the head's order, then text before, text after."""
    middle = tl.load(table)
    inner = tl.load(table + 1)
    grid = (
        rows // (middle * inner) * tl.load(table + 2)
        + rows // inner % middle * tl.load(table + 3)
        + rows % inner * tl.load(table + 4)
    )
    before = rows < video + text
    return tl.where(rows < video, text + grid, tl.where(before, rows - video, rows))
