import pytest
import torch

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.tail import BlockScores
from gen_accel.select.pooled import PooledSetting, choose_blocks, choose_lists


def scores(rows=6, number=10, heads=2, text=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(1, heads, rows, number, generator=generator) ** 4
    mass = mass / mass.sum(-1, keepdim=True) * (1 - text)
    return BlockScores(mass, torch.full(mass.shape[:3], text))


def literal(columns, top_k, top_p):
    """The rule as the brief words it: sort, count prefixes up to top_p, take the larger count."""
    order = sorted(range(len(columns)), key=lambda c: -columns[c])
    total, prefixes = 0.0, 0
    for c in order:
        total += columns[c]
        prefixes += total <= top_p
    return set(order[: max(prefixes + 1, top_k)])


@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("density", [0.1, 0.3])
def test_the_papers_rule(density, top_p):
    given = scores()
    setting = PooledSetting(density=density, top_p=top_p, neighbours=False, inside=False)
    chosen = choose_blocks(given, setting, density)
    for head in range(2):
        for row in range(6):
            mass = given.video[0, head, row].tolist()
            expected = literal([*mass, 0.1], round(density * 10), top_p)
            found = set(chosen[0, head, row].nonzero().flatten().tolist())
            assert found == expected - {10}  # the text's column is no block


def test_forced_blocks_come_on_top_or_count():
    given, forced = scores(), torch.zeros(6, 10, dtype=torch.bool)
    forced[:, 0] = forced[:, 9] = True
    top = choose_blocks(given, PooledSetting(inside=False), 0.3, forced)
    assert (top.sum(-1) >= 3).all() and (top.sum(-1) > 3).any() and top[..., [0, 9]].all()
    within = choose_blocks(given, PooledSetting(inside=True), 0.3, forced)
    assert (within.sum(-1) == 3).all() and within[..., [0, 9]].all()
    # What is chosen beside the forced ones is the heaviest of the rest.
    rest = given.video.masked_fill(forced, -1).argmax(-1, keepdim=True)
    assert within.gather(-1, rest).all()


def test_a_layer_budget_below_one_block_a_row_still_leaves_each_row_one():
    chosen = choose_blocks(scores(), PooledSetting(neighbours=False, budget="layer"), 0.02)
    assert (chosen.sum(-1) == 1).all()


def test_a_layer_budget_goes_where_the_mass_is():
    given = scores(heads=2)
    given.video[:, 1] = 0.09  # the second head is flat
    row = choose_blocks(given, PooledSetting(neighbours=False), 0.3)
    layer = choose_blocks(given, PooledSetting(neighbours=False, budget="layer"), 0.3)
    assert layer.sum() == row.sum() and layer.any(-1).all()
    assert (given.video * layer).sum() > (given.video * row).sum()


def test_a_threshold_needs_no_ranks():
    given = scores(rows=40, number=50)
    few, many = (choose_blocks(given, PooledSetting(beta=b), 0.3) for b in (1.0, 0.0))
    assert few.any(-1).all() and (few <= many).all() and few.sum() < many.sum()
    log = given.video.log()
    bar = log.mean(-1, keepdim=True) + log.std(-1, correction=0, keepdim=True)
    assert torch.equal(few, (log > bar) | (log == log.amax(-1, keepdim=True)))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_lists_are_those_of_the_mask(density, inside):
    setting = PooledSetting(density=density, inside=inside)
    scores = BlockScores(torch.rand(2, 3, 9, 9), torch.rand(2, 3, 9))
    for forced in (None, torch.eye(9, dtype=torch.bool)):
        full = torch.ones(2, 3, 11, 10, dtype=torch.bool)
        full[:, :, :9, :9] = choose_blocks(scores, setting, density, forced)
        lists = choose_lists(scores, setting, density, forced, 11, 10)
        blocks = Blocks(*lists, 11 * 16, 10 * 16, 16, 16)
        assert torch.equal(blocks.mask(), full)
    assert setting.by_rank and not PooledSetting(top_p=0.1).by_rank
    assert not PooledSetting(budget="layer").by_rank and not PooledSetting(beta=1.0).by_rank


def test_densities_change_in_the_run():
    setting = PooledSetting(density=((0.0, 0.3), (0.5, 0.2)))
    assert [setting.density_at(x) for x in (0.0, 0.49, 0.5, 1.0)] == [0.3, 0.3, 0.2, 0.2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(density=0), "density=0"),
        (dict(density=((0.1, 0.3),)), "begin at 0"),
        (dict(density=((0.0, 0.3), (0.5, 2.0))), "density=2"),
        (dict(top_p=1.0), "top_p=1.0"),
        (dict(parts=0), "parts=0"),
        (dict(parts=3), "parts=3: one of 1, 2, 4, 8, 16"),
        (dict(refresh=0), "refresh=0"),
        (dict(budget="head"), "budget='head'"),
        (dict(budget="layer", top_p=0.3), "chooses by rank"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PooledSetting(**settings)
