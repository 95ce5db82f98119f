"""The forward kernel against the definition, on the GPU or in Triton's interpreter."""

import math
from dataclasses import replace

import pytest
import torch

from gen_accel.kernels.api import available, block_sparse_attention, choose
from gen_accel.kernels.blocks import Blocks, Intervals
from gen_accel.kernels.prepare import AxisPlaces, IndexPlaces, prepare, restore
from gen_accel.kernels.reference import attention
from gen_accel.kernels.tail import block_scores, pool_keys, rectify
from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.tile import TileOrder, _indices
from gen_accel.select.gna import gna_plan
from gen_accel.select.window import Window
from helpers.attention_cases import CASES, Case, every, expected, random, tolerance, without
from helpers.kernels import DEVICE
from helpers.operations import operations

from gen_accel.kernels.triton.config import Config  # isort: skip
from gen_accel.kernels.triton.launch import attend  # isort: skip
from gen_accel.kernels.triton.tiles import listed_bits, make_tiles, pack  # isort: skip

# The kernel evaluates intervals, not functions.
HELD = [case for case in CASES if case.mask_mod is None]


def error(out, exact):
    return float((out.double().cpu() - exact).abs().max())


def run(case, dtype, blocks=None, **options):
    q, k, v = (x.to(DEVICE) for x in case.tensors(dtype))
    blocks = (blocks or case.blocks()).to(DEVICE)
    return attend(q, k, v, blocks, case.scale, return_lse=True, **options)


def small(case):
    """One head less work for the interpreter where the lists allow it."""
    return case if case.blocks().full_kv_indices.shape[1] > 1 else replace(case, heads=1)


@pytest.mark.parametrize("case", HELD, ids=lambda c: c.name)
def test_equals_the_definition(case, poison):
    case = small(case)
    out, lse = run(case, torch.bfloat16)
    exact, exact_lse = expected(case, torch.bfloat16)
    assert out.shape == exact.shape and out.is_contiguous() and lse.dtype == torch.float32
    assert error(out, exact) <= tolerance(case, torch.bfloat16)
    torch.testing.assert_close(lse.cpu(), exact_lse, rtol=1e-5, atol=1e-5)


MIXED = Case("batch 2, lists per sample and head", random(2, 2, 0.4), 333, 333, heads=2, batch=2)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(128, 64), (64, 32), (64, 16)])
def test_every_tile_size(rows, keys, dtype, tma, poison):
    config = Config(rows, keys, 4, 2, tma)
    out, lse = run(MIXED, dtype, config=config)
    exact, exact_lse = expected(MIXED, dtype)
    assert error(out, exact) <= tolerance(MIXED, dtype)
    torch.testing.assert_close(lse.cpu(), exact_lse, rtol=1e-5, atol=1e-5)


def test_dense():
    case = Case("dense", every, 300, 430, heads=2)
    q, k, v = (x.to(DEVICE) for x in case.tensors(torch.bfloat16))
    out, lse = attend(q, k, v, None, case.scale, return_lse=True)
    exact, exact_lse = attention(*(x.double().cpu() for x in (q, k, v)), None, case.scale)
    assert error(out, exact) <= tolerance(case, torch.bfloat16)
    torch.testing.assert_close(lse.cpu(), exact_lse, rtol=1e-5, atol=1e-5)
    listed, _ = attend(q, k, v, case.blocks().to(DEVICE), case.scale)
    torch.testing.assert_close(listed, out, rtol=0, atol=tolerance(case, torch.bfloat16))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale):
    q, k, v = (x.to(DEVICE) for x in MIXED.tensors(torch.float16))
    out, lse = attend(q, k, v, MIXED.blocks().to(DEVICE), scale, return_lse=True)
    exact, exact_lse = attention(*(x.double().cpu() for x in (q, k, v)), MIXED.blocks(), scale)
    assert error(out, exact) <= 2 * tolerance(MIXED, torch.float16)
    torch.testing.assert_close(lse.cpu(), exact_lse, rtol=1e-5, atol=1e-5)


def test_keys_behind_the_end_are_never_read():
    case = replace(HELD[0], q_len=70, kv_len=70, heads=1, batch=2)
    q, k, v = case.tensors(torch.bfloat16)
    k[1], v[1] = torch.nan, torch.nan  # where the first sample's last block would run on
    out, _ = attend(*(x.to(DEVICE) for x in (q, k, v)), case.blocks().to(DEVICE), case.scale)
    assert out[0].isfinite().all()


def test_padded_list_entries_are_not_read():
    for block in ((64, 64), (128, 64)):
        case = replace(MIXED, block=block)
        blocks = case.blocks()
        lists = blocks.full_kv_indices
        out, _ = run(case, torch.bfloat16, case.blocks())
        lists[torch.arange(lists.shape[-1]) >= blocks.full_kv_num_blocks[..., None]] = 10**6
        assert torch.equal(run(case, torch.bfloat16, blocks)[0], out)


# ---- tiles ---------------------------------------------------------------------------------------


def test_rows_that_agree_share_a_tile_and_others_do_not():
    mask = torch.rand(1, 1, 8, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    mask[..., 1, :] = mask[..., 0, :]
    mask[..., 7, :] = mask[..., 6, :]
    blocks = Blocks.from_mask(mask, q_len=500, kv_len=2560, block_size=64)
    together, alone = make_tiles(blocks, 1, 2, 128)
    assert together.rows == 128 and alone.rows == 64
    lists = [t.items[: int(t.number)].tolist() for t in (together, alone)]
    assert sorted(i % 4 for i in lists[0]) == [0, 0, 3, 3]
    assert sorted(i % 8 for i in lists[1]) == [2, 2, 3, 3, 4, 4, 5, 5]
    for group, per_head in ((together, 4), (alone, 8)):
        items = group.items[: int(group.number)]
        heads, counts = items // per_head, group.counts[0, 0, items % per_head]
        assert (heads.diff() >= 0).all()
        assert (counts.diff()[heads.diff() == 0] <= 0).all(), "longest first"
    united = mask[0, 0, 2:4].any(0)
    row = together.rule_lists[0, 0, 1, : int(together.rule_counts[0, 0, 1])]
    only_one = united & ~mask[0, 0, 2:4].all(0)
    assert row.tolist() == only_one.nonzero()[:, 0].tolist()


def test_tiles_are_made_once_per_blocks():
    blocks = HELD[0].blocks()
    assert make_tiles(blocks, 1, 3, 128) is make_tiles(blocks, 1, 3, 128)


def test_tiles_take_as_many_launches_for_any_number_of_heads():
    tokens, rows = 16_384, 256

    def launches(heads):  # of the meta device, which computes nothing, as of a GPU
        lists = torch.empty(1, heads, rows, rows, dtype=torch.int32, device="meta")
        blocks = Blocks(lists[..., 0], lists, tokens, tokens, 64, 64)
        tiles = operations(lambda: make_tiles(blocks, 1, heads, 128))
        return tiles, operations(lambda: listed_bits(blocks))

    tiles, bits = launches(40)
    assert (tiles, bits) == launches(1)
    assert tiles <= 100 and bits <= 20


def test_bits_say_which_blocks_are_listed():
    mask = torch.rand(2, 3, 5, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    blocks = Blocks.from_mask(mask, q_len=80, kv_len=1120, block_size=16)
    words = listed_bits(blocks)
    assert words.dtype == torch.int32 and words.shape == (2, 3, 5, 3)
    column = torch.arange(70)
    assert torch.equal(words[..., column // 32] >> column % 32 & 1, mask.int())


# ---- blocks that are no powers of two ------------------------------------------------------------

ODD = (
    Case("120", random(2, 2, 0.5), 397, 397, heads=2, batch=2, block=(120, 120)),
    Case("ends with a block", random(1, 2, 0.5), 330, 220, heads=2, block=(110, 110)),
    Case("two tiles of keys", random(1, 2, 0.4), 300, 360, heads=2, block=(60, 72)),
    Case("queries merge, keys are odd", random(1, 1, 0.5), 200, 220, heads=1, block=(64, 48)),
    Case("whole rows off, odd", without(rows=slice(1, 3)), 500, 500, heads=1, block=(100, 100)),
)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("case", ODD, ids=lambda c: c.name)
def test_odd_blocks(case, tma, poison):
    for keys in (128, 64):
        rows = 128 if case.block[0] > 64 else 64
        config = Config(rows, min(keys, 128 if case.block[1] > 64 else 64), 4, 2, tma, True)
        out, lse = run(case, torch.bfloat16, config=config)
        exact, exact_lse = expected(case, torch.bfloat16)
        assert error(out, exact) <= tolerance(case, torch.bfloat16)
        torch.testing.assert_close(lse.cpu(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rectified", "joint", "joint, 4 a block"])
def test_odd_blocks_with_a_tail(kind, poison):
    case = ODD[0]
    q, k, v = (x.to(DEVICE) for x in case.tensors(torch.bfloat16))
    blocks = case.blocks().to(DEVICE)
    if kind == "rectified":
        scores = block_scores(q, k, 120, 120, pooled=k.shape[1], scale=case.scale)
        tail = rectify(v, blocks, scores, pooled=k.shape[1])
    else:
        tail = pool_keys(k, v, 120, per_block=4 if "4" in kind else 1)
    out, lse = attend(q, k, v, blocks, case.scale, tail=tail, return_lse=True)
    exact, exact_lse = attention(*(x.double() for x in (q, k, v)), blocks, case.scale, tail)
    assert error(out, exact.cpu()) <= 0.02 * float(exact.abs().max())
    torch.testing.assert_close(lse, exact_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rim", ["mask", "whole"])
def test_windows_on_tiles_of_120(rim, poison):
    """What GNA plans for 5 x 30 x 52 tokens of Wan: no padding, and so full blocks."""
    order, blocks = gna_plan(
        (5, 12, 8), (5, 8, 4), (5, 4, 4), tile=(5, 6, 4), rim=rim, text=50, text_keys=20,
        device=DEVICE,
    )  # fmt: skip
    assert blocks.block_q == 120 and blocks.mask("full").any()
    check_rule(blocks, heads=1)


def test_odd_blocks_store_in_the_models_order():
    places = AxisPlaces.from_axes([(2, 0, 1), (1, 2, 0)], (3, 5, 7), 9, DEVICE)
    case = Case("ordered", random(1, 2, 0.6), 134, 134, heads=2, block=(48, 48))
    q, k, v = (x.to(DEVICE) for x in case.tensors(torch.bfloat16))
    ordered = [prepare(x, places).transpose(1, 2) for x in (q, k, v)]
    out, _ = attend(*ordered, case.blocks().to(DEVICE), case.scale)
    stored, _ = attend(*ordered, case.blocks().to(DEVICE), case.scale, places=places)
    assert torch.equal(stored, restore(out.transpose(1, 2), places))


def test_odd_blocks_cut_the_scales_of_codes():
    case = ODD[0]
    q, k, v = (x.to(DEVICE) for x in case.tensors(torch.bfloat16))
    with pytest.raises(ValueError, match="block_kv=120 with quantised keys.*block=128"):
        block_sparse_attention(
            q, k, v, case.blocks().to(DEVICE), impl="triton", precision="int8"
        )  # fmt: skip


# ---- windows -------------------------------------------------------------------------------------

WINDOWS = {
    "neighbourhood": ((4, 8, 8), 5, {}),
    "strided, text": ((4, 8, 8), (3, 6, 6), {"stride": (1, 2, 2), "text": 70}),
    "causal, dilated": ((4, 8, 8), (3, 4, 4), {"dilation": (1, 2, 2), "causal": (True, 0, 0)}),
    "padding lanes, text keys": ((3, 7, 9), (3, 5, 5), {"text": 33, "text_keys": 21}),
    "image": ((16, 16), 7, {}),
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("block", [64, 128])
def test_windows(name, block, poison):
    grid, window, options = WINDOWS[name]
    if "causal" in options:
        options = {**options, "causal": tuple(map(bool, options["causal"]))}
    tile = None if block == 64 else "auto"
    tile = ((1,) * (len(grid) - 2) + (8, 8)) if tile is None else tile
    window = (3, window, window) if isinstance(window, int) and len(grid) == 3 else window
    _, blocks = gna_plan(grid, window, tile=tile, block=block, device=DEVICE, **options)
    assert blocks.kv_num_blocks is not None, "the case shall have partial blocks"
    check_rule(blocks, heads=2)


def test_a_window_per_head():
    windows = [Window((4, 8, 8), size) for size in ((3, 5, 5), (-1, 4, 7))]
    _, blocks = gna_plan((4, 8, 8), windows, tile=(2, 4, 8), block=64, device=DEVICE)
    check_rule(blocks, heads=2)


def check_rule(blocks, heads):
    case = Case("window", every, blocks.q_len, blocks.kv_len, heads)
    q, k, v = (x.to(DEVICE) for x in case.tensors(torch.bfloat16))
    out, lse = attend(q, k, v, blocks, case.scale, return_lse=True)
    exact, exact_lse = attention(*(x.double() for x in (q, k, v)), blocks, case.scale)
    assert error(out, exact.cpu()) <= 0.02 * float(exact.abs().max())
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_packed_intervals_are_the_rule():
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 16, 300)
    key = torch.stack([torch.randint(n, (400,), generator=generator) for n in sizes]).int()
    key[:, ::50] = 2**30
    ends = [torch.randint(n + 1, (2, 3, 200), generator=generator).sort(0)[0] for n in sizes]
    low, high = torch.stack(ends, 1).int()
    intervals = Intervals(key, low, high, free=390)
    packed = pack(intervals)
    q, kv = torch.arange(200)[:, None], torch.arange(400)
    for head in range(3):
        rule = intervals.rule()(torch.tensor(0), torch.tensor(head), q, kv)
        a, b = packed.low[head][:, None], packed.high[head][:, None]
        fits = ((packed.key - a) & ~(packed.key - b) & packed.guard) == packed.guard
        assert torch.equal(fits | (kv >= 390), rule)


def test_coordinates_of_more_than_32_bits_are_declined():
    key = torch.arange(8, dtype=torch.int32).expand(3, -1)
    low = torch.zeros(3, 1, 8, dtype=torch.int32)
    intervals = Intervals(key, low, low + 2**12, free=8)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    blocks = Blocks.from_mask(
        ~mask, partial=mask, mask_mod=intervals.rule(), q_len=8, kv_len=8, block_size=64
    ).to(DEVICE)
    q = torch.zeros(1, 8, 1, 16, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="more than 32 bits: use impl='flex'"):
        block_sparse_attention(q, q, q, blocks, impl="triton")


# ---- tails ---------------------------------------------------------------------------------------

TAILED = [
    Case("blocks of 64", random(1, 2, 0.3), 449, 449, heads=2),
    Case("blocks of 128, batch 2", random(2, 1, 0.4), 449, 449, heads=1, batch=2, block=(128, 128)),
    Case("blocks of 16 x 64", random(1, 1, 0.3), 200, 449, heads=1, block=(16, 64)),
    Case("nothing visible", lambda r, c: ~every(r, c), 200, 200, heads=1),
]


def stand_ins(case, q, k, v, blocks):
    real = torch.rand(k.shape[1], generator=torch.Generator().manual_seed(0)) < 0.8
    real = real.to(DEVICE)
    scores = block_scores(q, k, *case.block, pooled=k.shape[1], scale=case.scale)
    return {
        "rectified": rectify(v, blocks, scores, pooled=k.shape[1]),
        "joint": pool_keys(k, v, case.block[1]),
        "joint, text apart": pool_keys(k[:, :128], v[:, :128], case.block[1]),
        "joint, 4 a block, padding": pool_keys(k, v, case.block[1], per_block=4, real=real),
        "joint, variance": pool_keys(k, v, case.block[1], per_block=2, variance=True),
    }


NAMES = ("rectified", "joint", "joint, text apart", "joint, 4 a block, padding", "joint, variance")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", TAILED, ids=lambda c: c.name)
def test_tails(case, name, poison):
    q, k, v = (x.to(DEVICE) for x in case.tensors(torch.bfloat16))
    blocks = case.blocks().to(DEVICE)
    tail = stand_ins(case, q, k, v, blocks)[name]
    out, lse = block_sparse_attention(
        q, k, v, blocks, tail=tail, impl="triton", return_lse=True
    )  # fmt: skip
    exact, exact_lse = attention(q.double(), k.double(), v.double(), blocks, case.scale, tail)
    # Mean keys are rounded to the inputs' precision too.
    assert error(out, exact.cpu()) <= 2 * max(tolerance(case, torch.bfloat16), 2**-8)
    torch.testing.assert_close(lse, exact_lse, rtol=5e-3, atol=5e-3)


def test_stand_ins_can_carry_the_maximum():
    # Everything is rescaled when a stand-in scores higher than all visible keys.
    case = replace(TAILED[0], loud=4.0)
    q, k, v = (x.to(DEVICE) for x in case.tensors(torch.bfloat16))
    blocks = case.blocks().to(DEVICE)
    tail = pool_keys(k, v, 64)
    tail.key.copy_((20 * tail.key).bfloat16())  # exact in the kernel's precision
    out, lse = attend(q, k, v, blocks, case.scale, tail=tail, return_lse=True)
    exact, exact_lse = attention(q.double(), k.double(), v.double(), blocks, case.scale, tail)
    assert out.isfinite().all()
    assert float((exact_lse - attention(q, k, v, blocks, case.scale)[1]).max()) > 20
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-4)


# ---- orders on the store -------------------------------------------------------------------------


def test_axis_orders_on_the_store(poison):
    grid, before, after = (3, 5, 7), 9, 20
    axes = [(0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    places = AxisPlaces.from_axes(axes, grid, before, DEVICE)
    check_store(places, math.prod(grid) + before + after, heads=4)


def test_an_axis_of_one():
    check_store(AxisPlaces.from_axes([(1, 0, 2), (2, 0, 1)], (1, 6, 8), device=DEVICE), 48, heads=2)


def test_tile_order_on_the_store(poison):
    grid = TokenGrid(3, 7, 9)
    order = TileOrder((1, 4, 8), block=64)
    index, inverse = _indices(order, grid, 3, 10, torch.device(DEVICE))
    places = IndexPlaces(index, inverse)
    check_store(places, grid.numel + 13, heads=2)
    layout = TokenLayout(grid, 3, 10)
    x = torch.randn(1, layout.tokens, 1, 4, device=DEVICE)
    torch.testing.assert_close(prepare(x, places), order.reorder(x, layout).transpose(1, 2))


def check_store(places, tokens, heads):
    """Stored in order = stored as it stands, then restored."""
    x = torch.randn(3, 1, tokens, heads, 32, dtype=torch.bfloat16, device=DEVICE)
    q, k, v = (prepare(t, places).transpose(1, 2) for t in x)
    length = q.shape[1]
    full = random(1, heads, 0.6)(-(-length // 64), -(-length // 64))
    blocks = Blocks.from_mask(full, q_len=length, kv_len=length, block_size=64).to(DEVICE)
    plain, plain_lse = attend(q, k, v, blocks, 0.2, return_lse=True)
    out, lse = attend(q, k, v, blocks, 0.2, return_lse=True, places=places)
    assert torch.equal(out, restore(plain.transpose(1, 2), places))
    lse_back = restore(plain_lse[..., None], places)[..., 0].transpose(1, 2)
    assert torch.equal(lse, lse_back)


# ---- as a carrier --------------------------------------------------------------------------------


def test_through_the_api_and_torch_compile():
    q, k, v = (x.to(DEVICE) for x in MIXED.tensors(torch.bfloat16))
    blocks = MIXED.blocks().to(DEVICE)
    call = lambda q: block_sparse_attention(2 * q, k, v, blocks, impl="triton")  # noqa: E731
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), call(q), rtol=0, atol=0)
    wide = block_sparse_attention(q.float(), k.float(), v.float(), blocks, impl="triton",
                                  precision="bf16")  # fmt: skip
    assert wide.dtype == torch.float32
    torch.testing.assert_close(
        wide.bfloat16(), block_sparse_attention(q, k, v, blocks, impl="triton"), rtol=0, atol=0
    )


def test_limits_name_the_way_out():
    q = torch.randn(1, 64, 1, 16, device=DEVICE)
    half = q.bfloat16()
    odd = Blocks.from_mask(
        torch.ones(1, 1, 1, 1, dtype=torch.bool), q_len=64, kv_len=64, block_size=130
    ).to(DEVICE)
    rule = next(c for c in CASES if c.name == "causal")
    long = torch.randn(1, 401, 3, 64, device=DEVICE, dtype=torch.bfloat16)
    wide = torch.randn(1, 64, 1, 320, device=DEVICE, dtype=torch.bfloat16)
    for arguments, message in [
        ((q, q, q, None), "float32: it computes in half precision; set precision='bf16'"),
        ((wide, wide, wide, None), "head_dim=320: it takes at most 256"),
        ((half, half, half, odd), "block_q=130: it takes 16 to 128, and powers of two up to 1024"),
        (
            (long, long, long, rule.blocks().to(DEVICE)),
            "a mask_mod that is only a function: make it from",
        ),
        ((half.clone().requires_grad_(), half, half, None), r"no gradient.*torch.no_grad\(\)"),
    ]:
        with pytest.raises(ValueError, match=f"impl='triton': {message}"):
            block_sparse_attention(*arguments, impl="triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="about machines without a GPU")
def test_auto_never_takes_the_interpreter(monkeypatch):
    from gen_accel.kernels.triton import carrier, interpreter

    q = torch.randn(1, 64, 1, 16, dtype=torch.bfloat16)
    assert choose(q, q, q, None) == "gather"
    assert choose(q, q, q, None, impl="triton") == "triton" and available()["triton"] is None
    monkeypatch.setattr(interpreter, "active", lambda: False)
    carrier.missing.cache_clear()
    try:
        assert "no CUDA or ROCm GPU" in available()["triton"]
        with pytest.raises(ValueError, match="impl='triton': no CUDA or ROCm GPU"):
            choose(q, q, q, None, impl="triton")
    finally:
        carrier.missing.cache_clear()
