import pytest

from gen_accel.layout import ForwardContext, TokenGrid, TokenLayout
from gen_accel.schedule import Schedule


def at(step, steps, tokens=(8, 32, 32)):
    return ForwardContext(TokenLayout(TokenGrid(*tokens)), step=step, steps=steps)


@pytest.mark.parametrize(
    "share, steps, dense", [(0.2, 10, 2), (0.2, 11, 3), (0.0, 10, 0), (1.0, 7, 7), (0.25, 4, 1)]
)
def test_first_share_of_the_steps_is_dense(share, steps, dense):
    schedule = Schedule(dense_steps=share)
    reasons = [schedule.step_reason(at(step, steps)) for step in range(steps)]
    assert (
        sum(reason is not None for reason in reasons) == dense == schedule.dense_step_count(steps)
    )
    assert all(reasons[:dense])


def test_last_share_of_the_steps_is_dense():
    schedule = Schedule(dense_steps=0, dense_last_steps=0.3)
    assert [schedule.step_reason(at(s, 10)) is not None for s in range(10)] == [False] * 7 + [
        True
    ] * 3


def test_short_sequences_and_unknown_grids_are_dense():
    schedule = Schedule(dense_steps=0, min_tokens=4096)
    assert schedule.step_reason(at(5, 10, (1, 8, 8))) == "64 tokens < min_tokens=4096"
    assert schedule.step_reason(ForwardContext(reason="reference tokens")) == "reference tokens"
    assert schedule.step_reason(at(5, 10)) is None
    assert Schedule().step_reason(at(None, None)) is None


def test_layers_count_from_both_ends():
    schedule = Schedule(dense_layers=(0, -1, 99))
    assert [schedule.is_dense_layer(i, 5) for i in range(5)] == [True, False, False, False, True]


@pytest.mark.parametrize(
    "bad", [dict(dense_steps=1.5), dict(dense_last_steps=-1), dict(min_tokens=-1)]
)
def test_bad_input(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Schedule(**bad)
