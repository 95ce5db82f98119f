import pytest
import torch

from gen_accel.kernels.blocks import Blocks, Intervals
from helpers.attention_cases import CASES, causal, every, random


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_mask_round_trip(case):
    rows, columns = -(-case.q_len // case.block[0]), -(-case.kv_len // case.block[1])
    full = case.pattern(rows, columns)
    partial = torch.zeros_like(full) if case.partial is None else case.partial(rows, columns)
    blocks = case.blocks()
    assert (blocks.num_q_blocks, blocks.num_kv_blocks) == (rows, columns)
    assert torch.equal(blocks.mask("full"), (full & ~partial).expand_as(blocks.mask("full")))
    assert torch.equal(blocks.mask("partial"), partial.expand_as(blocks.mask("partial")))
    assert torch.equal(blocks.mask(), (full | partial).expand_as(blocks.mask()))
    assert blocks.density() == pytest.approx(float((full | partial).double().mean()))


def test_lists_are_those_of_flex_attention():
    mask = random(2, 3, 0.4)(8, 8)
    blocks = Blocks.from_mask(mask, q_len=500, kv_len=512, block_size=64)
    assert blocks.full_kv_num_blocks.dtype == blocks.full_kv_indices.dtype == torch.int32
    for b, h, row in ((0, 0, 0), (1, 2, 7), (1, 0, 3)):
        count = blocks.full_kv_num_blocks[b, h, row]
        kept = mask[b, h, row].nonzero().flatten()
        assert blocks.full_kv_indices[b, h, row, :count].tolist() == kept.tolist()
    assert blocks.full_kv_indices.min() >= 0 and blocks.full_kv_indices.max() < 8


def test_bad_input():
    size = {"q_len": 512, "kv_len": 512, "block_size": 64}
    with pytest.raises(
        ValueError, match=r"block mask \(1, 1, 4, 8\): .* need \[B\|1, H\|1, 8, 8\]"
    ):
        Blocks.from_mask(every(4, 8), **size)
    with pytest.raises(ValueError, match="full and as partial"):
        Blocks.from_mask(every(8, 8), partial=every(8, 8), mask_mod=causal, **size)
    with pytest.raises(ValueError, match="partial blocks need a mask_mod"):
        Blocks.from_mask(~every(8, 8), partial=every(8, 8), **size)
    good = Blocks.from_mask(every(8, 8), **size)
    with pytest.raises(ValueError, match="8 query blocks listed, but q_len=600"):
        Blocks(good.full_kv_num_blocks, good.full_kv_indices, 600, 512, 64, 64)
    with pytest.raises(ValueError, match="belong together"):
        Blocks(good.full_kv_num_blocks, good.full_kv_indices, 512, 512, 64, 64,
               kv_num_blocks=good.full_kv_num_blocks)  # fmt: skip
    with pytest.raises(ValueError, match=r"expected \[B\|1, H\|1, nQ\]"):
        Blocks(good.full_kv_num_blocks[0], good.full_kv_indices, 512, 512, 64, 64)


def test_intervals_are_a_rule_as_data():
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(6, (2, 9), generator=generator).int()
    low, high = torch.randint(7, (2, 2, 3, 5), generator=generator).int().sort(0)[0]
    intervals = Intervals(key, low, high, free=7)
    rule = intervals.rule()
    assert rule.intervals is intervals
    heads, queries, keys = torch.arange(3), torch.arange(5), torch.arange(9)
    seen = rule(torch.tensor(0), heads[:, None, None], queries[:, None], keys)
    for h in range(3):
        for q in range(5):
            for k in range(9):
                inside = all(low[a, h, q] <= key[a, k] < high[a, h, q] for a in range(2))
                assert seen[h, q, k] == (inside or k >= 7)
    shared = Intervals(key, low[:, :1], high[:, :1], free=7).rule()
    assert torch.equal(shared(None, heads[0], queries[:, None], keys), seen[0])


def test_a_rule_goes_with_its_lists():
    low = torch.zeros(1, 1, 8, dtype=torch.int32)
    intervals = Intervals(torch.arange(8, dtype=torch.int32)[None], low, low + 3, free=8)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    size = {"q_len": 8, "kv_len": 8, "block_size": 8}
    blocks = Blocks.from_mask(~mask, partial=mask, mask_mod=intervals.rule(), **size)
    assert blocks.to("cpu").mask_mod is blocks.mask_mod
    moved = blocks.to("meta").mask_mod.intervals
    assert {x.device.type for x in (moved.key, moved.low, moved.high)} == {"meta"}
    assert moved.free == 8 and blocks.mask_mod.intervals is intervals
    plain = Blocks.from_mask(~mask, partial=mask, mask_mod=causal, **size)
    assert plain.to("meta").mask_mod is causal


def test_the_kept_share_is_exact_without_fp64():
    """Apple's MPS has none, and a mean of fp32 numbers comes out below 1 here."""
    counts = torch.full((1, 12, 1857), 1857, dtype=torch.int32)
    blocks = Blocks(counts, counts[..., None], 1857, 1857, 1, 1)
    assert blocks.kept().dtype == torch.float32
    assert blocks.density() == 1.0
