"""gna_plan: block lists, element rule and attention against N x N masks."""

import numpy as np
import pytest
import torch

from gen_accel.kernels.api import block_sparse_attention
from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.tile import TileOrder
from gen_accel.select.gna import auto_tile, gna_plan
from gen_accel.select.window import Window, neighborhood, sparse_global, strided
from helpers.windows import grid_mask, random_setting


def three(grid):
    return TokenGrid(*(1,) * (3 - len(grid)), *grid)


def ordered_mask(order, mask, grid, text=0, text_keys=0):
    """The element mask in ordered places, and which queries and keys are real."""
    layout = TokenLayout(grid, 0, text)
    tokens = torch.arange(layout.tokens, dtype=torch.float64).view(1, -1, 1, 1)
    at = order.reorder(tokens, layout).flatten().long().numpy()
    whole = np.ones((layout.tokens,) * 2, bool)
    whole[: grid.numel, : grid.numel] = mask
    padding = np.flatnonzero(order.coordinates(grid)[0] < 0)
    real = np.ones(len(at), bool)
    real[padding] = False
    keys = len(at) - text + text_keys
    return whole[np.ix_(at, at[:keys])], real, real[:keys]


def any_and_all(mask, real_q, real_kv, block):
    """Per pair of blocks: is something visible; is everything, and no key padding."""
    rows, columns = (np.arange(0, n, block) for n in mask.shape)

    def reduce(ufunc, values):
        return ufunc.reduceat(ufunc.reduceat(values, rows, 0), columns, 1)

    some = reduce(np.logical_or, mask & real_q[:, None] & real_kv)
    every = reduce(np.logical_and, (mask | ~real_q[:, None]) & real_kv)
    return some, every


@pytest.mark.parametrize("seed", range(6))
def test_lists_flags_and_rule_against_element_masks(seed):
    """900 random settings per seed; with the 6,000 of test_window.py, bar 1 of the method."""
    rng = np.random.default_rng(100 + seed)
    for _ in range(900):
        window = Window(*random_setting(rng, 100))
        grid = three(window.grid)
        tile = tuple(int(rng.integers(1, min(n, 6) + 1)) for n in window.grid)
        text = int(rng.integers(0, 9)) if rng.random() < 0.3 else 0
        text_keys = int(rng.integers(0, text + 1))
        lanes = TileOrder((1,) * (3 - len(tile)) + tile, tuple_of_three(window)).lanes(grid)
        block = None if rng.random() < 0.5 else lanes + int(rng.integers(0, 5))
        order, blocks = gna_plan(
            window.grid, window, tile=tile, block=block, text=text, text_keys=text_keys
        )
        assert (blocks.q_len, blocks.kv_len) == (
            order.places(grid) + text,
            order.places(grid) + text_keys,
        )
        assert blocks.block_q == blocks.block_kv == (block or lanes)
        mask, real_q, real_kv = ordered_mask(order, grid_mask(window), grid, text, text_keys)
        some, every = any_and_all(mask, real_q, real_kv, blocks.block_q)
        assert np.array_equal(blocks.mask("all")[0, 0].numpy(), some), window
        assert np.array_equal(blocks.mask("full")[0, 0].numpy(), every), window
        if blocks.mask_mod is None:
            assert np.array_equal(some, every)
            continue
        q, kv = torch.arange(blocks.q_len)[:, None], torch.arange(blocks.kv_len)
        rule = blocks.mask_mod(torch.tensor(0), torch.tensor(0), q, kv).numpy()
        assert np.array_equal(rule[real_q], (mask & real_kv)[real_q]), window


def tuple_of_three(window):
    return (1,) * (3 - len(window.grid)) + window.dilation


# Grids are ragged for their tiles unless said otherwise.
CASES = {
    "divides": (Window((4, 6, 8), (2, 6, 4), (2, 2, 4)), (2, 2, 4), None),
    "ragged": (Window((5, 6, 7), (3, 4, 5), (2, 2, 1)), (2, 3, 4), None),
    "lanes": (Window((3, 5, 8), (3, 5, 4), (1, 1, 4)), (3, 5, 2), 32),
    "ragged lanes": (Window((5, 6, 7), (3, 4, 5), (1, 3, 5)), (2, 3, 4), 32),
    "dilated": (Window((5, 9, 7), (2, 3, 3), (2, 1, 2), (2, 3, 2)), (2, 2, 2), None),
    "dilated lanes": (Window((4, 8, 10), (-1, 2, 5), 1, (1, 4, 2)), (4, 2, 3), 32),
    "causal": (Window((6, 5, 4), (3, 3, 4), (2, 1, 1), 1, (True, False, True)), (2, 2, 2), None),
    "image": (Window((1, 9, 11), (4, 5), (2, 3)), (1, 4, 4), 16),
    "snap": (Window((5, 6, 7), (4, 3, 4), (2, 3, 4), snap=(2, 3, 4)), (2, 3, 4), None),
}


def masked_dense(q, k, v, mask):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2)


@pytest.mark.parametrize("impl", ["reference", "gather"])
@pytest.mark.parametrize("before, after, valid", [(0, 0, 0), (5, 0, 0), (2, 37, 3), (0, 7, 7)])
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_masked_dense(case, before, after, valid, impl):
    window, tile, block = CASES[case]
    layout = TokenLayout(TokenGrid(*window.grid), before, after)
    video = slice(before, before + layout.grid.numel)
    mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    mask[video, video] = torch.from_numpy(grid_mask(window))
    mask[:, layout.tokens - after + valid :] = False
    order, blocks = gna_plan(
        window.grid, window, tile=tile, block=block, text=layout.text, text_keys=before + valid
    )
    q, k, v = torch.randn(3, 2, layout.tokens, 3, 8, generator=torch.Generator().manual_seed(0))
    ordered = [order.reorder(x, layout) for x in (q, k, v)]
    keys, values = (x[:, : blocks.kv_len] for x in ordered[1:])
    out = order.restore(block_sparse_attention(ordered[0], keys, values, blocks, impl=impl), layout)
    torch.testing.assert_close(out, masked_dense(q, k, v, mask), atol=1e-5, rtol=0)


def test_padding_is_never_visible():
    """Whatever stands in padded lanes changes nothing."""
    layout = TokenLayout(TokenGrid(5, 6, 7), 0, 4)
    order, blocks = gna_plan(layout.grid, (3, 4, 5), tile=(2, 3, 4), block=32, text=4)
    q, k, v = (order.reorder(x, layout) for x in torch.randn(3, 1, layout.tokens, 2, 8))
    padding = torch.from_numpy(np.flatnonzero(order.coordinates(layout.grid)[0] < 0))
    assert len(padding) > 0
    out = block_sparse_attention(q, k, v, blocks, impl="reference")
    for x in (q, k, v):
        x[:, padding] = 1e4 * torch.randn_like(x[:, padding])
    poisoned = block_sparse_attention(q, k, v, blocks, impl="reference")
    assert torch.equal(order.restore(out, layout), order.restore(poisoned, layout))


def test_each_head_may_have_its_own_window():
    grid = (5, 6, 7)
    windows = [strided(grid, (3, 4, 5), (2, 2, 1)), neighborhood(grid, (-1, 2, 3)),
               strided(grid, (3, 4, 5), (2, 2, 1)), Window(grid, -1)]  # fmt: skip
    layout = TokenLayout(TokenGrid(*grid), 0, 6)
    order, blocks = gna_plan(grid, windows, tile=(2, 3, 4), text=6)
    assert blocks.full_kv_num_blocks.shape[1] == 4
    masks = torch.ones(4, layout.tokens, layout.tokens, dtype=torch.bool)
    masks[:, :210, :210] = torch.from_numpy(np.stack([grid_mask(w) for w in windows]))
    q, k, v = torch.randn(3, 2, layout.tokens, 4, 8)
    ordered = [order.reorder(x, layout) for x in (q, k, v)]
    for impl in ("reference", "gather"):
        out = order.restore(block_sparse_attention(*ordered, blocks, impl=impl), layout)
        torch.testing.assert_close(out, masked_dense(q, k, v, masks), atol=1e-5, rtol=0)
    assert gna_plan(grid, windows[::2], tile=(2, 3, 4))[1].full_kv_num_blocks.shape[1] == 1


@pytest.mark.parametrize(
    "grid, size, stride, tile, density",
    [
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), 0.09),
        ((33, 45, 80), (15, 20, 40), (3, 10, 8), (3, 5, 8), 0.101),
        ((1, 128, 128), (64, 64), (32, 16), (1, 16, 8), 0.25),
    ],
)
def test_perfectly_block_sparse_settings_have_no_partial_block(grid, size, stride, tile, density):
    order, blocks = gna_plan(grid, size, stride, tile=tile, text=256)
    assert blocks.mask_mod is None and blocks.kv_num_blocks is None
    video = np.prod(order.tiles(TokenGrid(*grid)))
    listed = blocks.full_kv_num_blocks[0, 0, :video].float()
    text = -(-256 // blocks.block_kv)
    assert float(listed.mean() - text) / video == pytest.approx(density, abs=1e-3)
    # With padding lanes (120 tokens in 128 places) all video blocks need the lane mask.
    if np.prod(tile) == 120:
        padded = gna_plan(grid, size, stride, tile=tile, block=128, text=256)[1]
        box = (..., slice(video), slice(video))
        assert torch.equal(padded.mask()[box], blocks.mask()[box])
        assert padded.mask("full")[..., :video].sum() == 0


def test_auto_finds_the_tile_on_which_a_window_is_block_sparse():
    hunyuan = Window((30, 48, 80), (18, 24, 24), (16, 8, 8))
    assert auto_tile([hunyuan]) == (2, 8, 8)
    wan = Window((21, 45, 80), (9, 20, 32), (3, 10, 16))
    assert auto_tile([wan]) == (3, 5, 8)
    order, blocks = gna_plan(wan.grid, wan.size, wan.stride)
    assert order.tile == (3, 5, 8) and blocks.mask_mod is None
    # Windows share the tile, and the smaller block has room for a smaller one only.
    assert np.prod(auto_tile([hunyuan, wan_like(hunyuan)], 64)) <= 64
    # No tile fits this one perfectly; still fewer places are visited than on a careless shape.
    odd = Window((21, 45, 80), (9, 21, 31), 1)
    lists = gna_plan(odd.grid, odd)[1]
    careless = gna_plan(odd.grid, odd, tile=(1, 1, 80))[1]
    assert lists.density() < 0.7 * careless.density()
    assert auto_tile([Window((1, 3, 4), -1)]) == (1, 3, 4)


def wan_like(window):
    return neighborhood(window.grid, (9, 20, 32))


def test_snap_border_saves_partial_blocks_on_ragged_grids():
    grid, size, stride, tile = (21, 45, 80), (12, 24, 40), (4, 8, 8), (4, 8, 8)
    shift = gna_plan(grid, size, stride, tile=tile)[1]
    snap = gna_plan(grid, size, stride, tile=tile, border="snap")[1]
    assert float(shift.mask("partial").sum()) / float(shift.mask().sum()) > 0.2
    # Only blocks with padding lanes are left, and those are at the far border.
    order = TileOrder(tile)
    padded = order.coordinates(TokenGrid(*grid))[0].reshape(-1, 256) < 0
    assert not snap.mask("partial")[0, 0][:, ~torch.from_numpy(padded.any(1))].any()


def test_grids_of_fewer_axes_and_images():
    line, blocks = gna_plan((100,), 10, 5, tile=(20,))
    assert line.tile == (1, 1, 20) and blocks.q_len == 100
    image, blocks = gna_plan((16, 24), (8, 8), 4, tile=(4, 8), text=3)
    assert image.tile == (1, 4, 8)
    video, same = gna_plan((1, 16, 24), (8, 8), 4, tile=(1, 4, 8), text=3)
    assert video == image and torch.equal(same.mask(), blocks.mask())


def test_rules_work_on_scalars_as_flexattention_calls_them():
    window = Window((3, 5, 7), (2, 3, 4))
    _, blocks = gna_plan(window.grid, window, tile=(2, 2, 2), text=2)
    index = [torch.tensor(i, dtype=torch.int32) for i in (0, 0, 5, 9)]
    assert blocks.mask_mod(*index).shape == ()
    vmapped = torch.vmap(blocks.mask_mod, in_dims=(None, None, None, 0))
    keys = torch.arange(blocks.kv_len)
    assert torch.equal(
        vmapped(*index[:3], keys), blocks.mask_mod(index[0], index[1], index[2], keys)
    )


def test_errors():
    with pytest.raises(ValueError, match="border='wrap': choose from 'shift', 'snap'"):
        gna_plan((4, 4, 4), 2, border="wrap")
    with pytest.raises(ValueError, match="text_keys=5: between 0 and text=4"):
        gna_plan((4, 4, 4), 2, text=4, text_keys=5)
    with pytest.raises(ValueError, match="tile=.* 3 numbers for a grid of 3 axes"):
        gna_plan((4, 4, 4), 2, tile=(2, 2))
    with pytest.raises(ValueError, match="tile='best'"):
        gna_plan((4, 4, 4), 2, tile="best")
    with pytest.raises(ValueError, match=r"a Window for grid \(4, 4\) on grid \(4, 4, 4\)"):
        gna_plan((4, 4, 4), Window((4, 4), 2))
    with pytest.raises(ValueError, match="stride, dilation and causal beside a Window"):
        gna_plan((4, 4, 4), Window((4, 4, 4), 2), 2)
    with pytest.raises(ValueError, match="give all heads one dilation"):
        gna_plan((8, 8), [Window((8, 8), 2), sparse_global((8, 8), 2)])
    with pytest.raises(ValueError, match="window=6 on height of length 4: .*nearest legal"):
        gna_plan((4, 4, 4), (2, 6, 2))
    with pytest.raises(ValueError, match="block=16: a tile of 4x4x4 holds 64 tokens"):
        gna_plan((4, 4, 4), 2, tile=(4, 4, 4), block=16)
