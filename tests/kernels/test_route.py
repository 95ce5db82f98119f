import pytest
import torch

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.route import route, to_lists

INF = float("inf")


def scores(batch=2, heads=3, rows=5, columns=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, rows, columns, generator=generator)


def rows_of(counts, lists):
    """The listed blocks as a list per row; the padding must be valid indices."""
    assert counts.dtype == lists.dtype == torch.int32
    assert lists.shape[:-1] == counts.shape
    return [row[:n].tolist() for n, row in zip(counts.flatten().tolist(), lists.flatten(0, -2))]


def test_top_k_is_the_top_of_a_sorted_row():
    x = scores()
    counts, lists = route(x, keep=7)
    assert lists.shape[-1] == 7
    for row, found in zip(x.flatten(0, -2), rows_of(counts, lists)):
        assert found == sorted(sorted(range(37), key=lambda i: -row[i])[:7])


def test_of_equal_scores_the_first_are_taken():
    x = torch.tensor([1.0, 3, 2, 2, 3, 2, -0.0, 0.0]).view(1, 1, 1, 8)
    assert rows_of(*route(x, keep=4)) == [[1, 2, 3, 4]]
    assert rows_of(*route(x, keep=7)) == [[0, 1, 2, 3, 4, 5, 6]]
    assert rows_of(*route(torch.zeros(1, 1, 1, 5), keep=3)) == [[0, 1, 2]]


def test_beta_is_a_threshold_per_row():
    x = scores()
    x[0, 0, 0] = 2.0  # nothing lies above the mean
    found = rows_of(*route(x, beta=0.5))
    assert found[0] == []
    for row, blocks in zip(x.flatten(0, -2), found):
        limit = row.double().mean() + 0.5 * row.double().std(correction=0)
        assert blocks == [i for i in range(37) if row[i] > limit]


def test_keep_and_beta_take_what_either_takes():
    x = scores()
    both = rows_of(*route(x, keep=3, beta=1.0))
    for a, b, found in zip(rows_of(*route(x, keep=3)), rows_of(*route(x, beta=1.0)), both):
        assert found == sorted({*a, *b})


def test_forced_blocks_come_in_addition():
    x = scores()
    forced = torch.zeros(1, 1, 5, 37, dtype=torch.bool)
    forced[..., -2:] = True
    forced[0, 0, 3] = True
    plain = rows_of(*route(x, keep=4))
    for i, (found, own) in enumerate(zip(rows_of(*route(x, keep=4, forced=forced)), plain)):
        assert found == (list(range(37)) if i % 5 == 3 else sorted({*own, 35, 36}))
    assert rows_of(*route(x, forced=forced))[0] == [35, 36]


def test_what_does_not_exist_is_never_chosen():
    x = scores()
    x[..., 10:] = -INF
    x[..., 0] = torch.nan
    x[0, 0, 0] = -INF
    found = rows_of(*route(x, keep=20))
    assert found[0] == [] and all(row == list(range(1, 10)) for row in found[1:])
    some = rows_of(*route(x, beta=-INF))
    assert some == found  # finite scores decide on mean and spread; all finite ones lie above
    limited = rows_of(*route(x, beta=0.0))
    for row, blocks in zip(x.flatten(0, -2), limited):
        assert blocks == [i for i in range(1, 10) if row[i] > row[1:10].mean()]


def test_the_result_is_a_blocks():
    x = scores(columns=9)
    blocks = Blocks(*route(x, keep=20), q_len=5 * 16, kv_len=9 * 16 - 3, block_q=16, block_kv=16)
    assert blocks.density() == 1.0
    blocks = Blocks(*route(x, keep=3), q_len=5 * 16, kv_len=9 * 16 - 3, block_q=16, block_kv=16)
    assert torch.equal(blocks.mask().sum(-1), torch.full((2, 3, 5), 3))


def test_lists_of_a_mask():
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    counts, lists = to_lists(mask, 5)
    assert counts.tolist() == [3, 0, 5]
    assert lists.tolist() == [[1, 2, 4, 0, 0], [0] * 5, [0, 1, 2, 3, 4]]


def test_shapes_are_known_without_looking():
    """A fake tensor has no values, so a host synchronisation would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(1, 2, 5, 37)
        counts, lists = route(x, keep=4, beta=1.0, forced=torch.empty(5, 37, dtype=torch.bool))
    assert counts.shape == (1, 2, 5) and lists.shape == (1, 2, 5, 37)


def test_errors():
    with pytest.raises(ValueError, match="one of them must choose"):
        route(scores())
    with pytest.raises(ValueError, match="keep=0"):
        route(scores(), keep=0)
    with pytest.raises(ValueError, match="float32"):
        route(scores().double(), keep=1)
