"""Mask algebra: packing keeps every pixel, Otsu survives sinks, components follow seeds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_accel.layout import TokenGrid
from gen_accel.pipelines.masks import dilate, otsu, pack_mask, touching, unpack_mask


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.sampled_from([1, 4, 8]), st.integers(0, 2**31 - 1))
def test_a_token_is_set_where_any_of_its_pixels_is(latents, temporal, seed):
    frames = latents * temporal + 1
    grid = TokenGrid(latents + 1, 3, 2)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, frames, 12, 8, generator=generator) < 0.05
    tokens = pack_mask(mask, grid, temporal)
    for b, f, y, x in torch.cartesian_prod(*(torch.arange(n) for n in (2, *grid))).tolist():
        first = max(0, (f - 1) * temporal + 1)
        window = mask[b, first : f * temporal + 1, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        assert bool(tokens[b, f, y, x]) == bool(window.any())
    back = unpack_mask(tokens, frames, 12, 8, temporal)
    assert back.shape == mask.shape
    assert not (mask & ~back).any()
    assert torch.equal(pack_mask(back, grid, temporal), tokens)


def test_wrong_frame_counts_and_sizes_say_what_would_fit():
    with pytest.raises(ValueError, match=r"k\*4\+1"):
        pack_mask(torch.ones(1, 8, 8, 8, dtype=torch.bool), TokenGrid(2, 2, 2), 4)
    with pytest.raises(ValueError, match="does not divide"):
        pack_mask(torch.ones(1, 5, 9, 8, dtype=torch.bool), TokenGrid(2, 2, 2), 4)


def bump(n=40):
    y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    return torch.exp(-((y - 15.0) ** 2 + (x - 22.0) ** 2) / 60)


def test_otsu_agrees_with_its_definition():
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    threshold, separability = otsu(values, clip=1.0)
    for row, found, share in zip(values, threshold, separability):

        def between(cut, row=row):
            low, high = row[row <= cut], row[row > cut]
            if not len(low) or not len(high):
                return 0.0
            weight = len(low) * len(high) / len(row) ** 2
            return float(weight * (low.mean() - high.mean()) ** 2)

        best = max(between(cut) for cut in row)
        assert between(found) == pytest.approx(best, rel=1e-5)
        assert float(share) == pytest.approx(best / float(row.var(correction=0)), rel=1e-5)


def test_one_sink_does_not_take_the_threshold():
    clean = bump()
    wanted = clean > otsu(clean.flatten())[0]
    spoilt = clean.clone()
    spoilt[2, 3] = 50.0
    found = spoilt > otsu(spoilt.flatten())[0]
    unclipped = spoilt > otsu(spoilt.flatten(), clip=1.0)[0]
    assert int(unclipped.sum()) == 1
    found[2, 3] = False
    assert (found & wanted).sum() / (found | wanted).sum() > 0.95


def test_nothing_is_above_the_threshold_of_a_constant():
    threshold, separability = otsu(torch.full((4, 9), 0.3))
    assert threshold.isinf().all()
    assert (separability == 0).all()


def test_components_that_hold_a_seed_stay_whole():
    mask = torch.zeros(1, 3, 6, 6, dtype=torch.bool)
    mask[0, 0, 0, 0:4] = True
    mask[0, 1, 1, 4] = True  # a diagonal neighbour, in the next frame
    mask[0, 2, 5, 5] = True
    seeds = torch.zeros_like(mask)
    seeds[0, 0, 0, 0] = True
    seeds[0, 2, 2, 2] = True  # outside the mask
    wanted = mask.clone()
    wanted[0, 2, 5, 5] = False
    assert torch.equal(touching(mask, seeds), wanted)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.sampled_from([0.1, 0.25, 0.5]), st.integers(0, 2**31 - 1))
def test_components_are_those_that_grow_pixel_by_pixel(frames, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, frames, 9, 7, generator=generator) < density
    seeds = torch.rand(mask.shape, generator=generator) < 0.02
    wanted = mask & seeds
    for _ in range(wanted[0].numel()):
        wanted = dilate(wanted, frames=True) & mask
    assert torch.equal(touching(mask, seeds), wanted)


def test_dilate_stays_in_its_frame():
    mask = torch.zeros(1, 3, 5, 5, dtype=torch.bool)
    mask[0, 1, 2, 2] = True
    assert dilate(mask).sum() == 9
    assert dilate(mask, frames=True).sum() == 27
    assert torch.equal(dilate(mask, 0), mask)
