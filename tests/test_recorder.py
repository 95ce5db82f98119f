import pytest
import torch

from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.axis import AXIS_ORDERS, axis_order
from gen_accel.recorder import Measurement, Recorder
from helpers.planted import planted_heads

GRID = TokenGrid(8, 12, 16)
NAMES = list(AXIS_ORDERS)


def with_text(x, before, after):
    """Text that looks at nothing in particular, around the video."""
    text = 0.1 * torch.randn(x.shape[0], before + after, *x.shape[2:])
    return torch.cat([text[:, :before], x, text[:, before:]], 1)


@pytest.mark.parametrize("before, after", [(0, 0), (40, 0), (0, 40)])
def test_orders_and_masks_of_planted_heads(before, after):
    layout = TokenLayout(GRID, before, after)
    q, k = (with_text(x, before, after) for x in planted_heads(GRID, NAMES))
    recorder = Recorder(layout, Measurement(density=0.3, block=32))
    recorder.observe_orders(0, q, k, layout)
    recorder.observe_mass(0, q, k, layout)
    plan = recorder.layer_plan(0)
    assert plan.orders == axis_order(range(6))
    assert plan.masks.shape == (1, 6, 48, 48)
    assert plan.masks.float().mean() == pytest.approx(0.3, abs=1e-3)
    assert 0.9 < plan.mass_kept[0] < 1

    raster = Recorder(layout, Measurement(density=0.3, block=32, order="raster"))
    raster.observe_mass(0, q, k, layout)
    flat = raster.layer_plan(0)
    assert flat.orders == axis_order([0] * 6)
    assert flat.mass_kept[0] < plan.mass_kept[0] - 0.02


def test_keys_behind_the_valid_text_need_not_be_there():
    layout = TokenLayout(GRID, 0, 64, text_valid=(24,))
    q, k = (with_text(x, 0, 64) for x in planted_heads(GRID, NAMES))
    recorder = Recorder(layout, Measurement(density=0.3, block=32))
    recorder.observe_mass(0, q, k[:, : GRID.numel + 24], layout)
    assert recorder.layer_plan(0).orders == axis_order(range(6))


def test_masses_are_averaged_over_calls_and_kept_apart_by_group():
    layout = TokenLayout(GRID)
    recorder = Recorder(layout, Measurement(density=0.3, block=32), groups=3)
    same = planted_heads(GRID, NAMES)
    other = planted_heads(GRID, NAMES[::-1], seed=1)
    recorder.observe_orders(0, *same, layout)
    recorder.observe_mass(0, *same, layout, group=0)
    recorder.observe_mass(0, *same, layout, group=0)
    recorder.observe_mass(0, *other, layout, group=1)
    plan = recorder.layer_plan(0)
    once = Recorder(layout, Measurement(density=0.3, block=32))
    once.observe_mass(0, *same, layout)
    assert torch.equal(plan.masks[0], once.layer_plan(0).masks[0])
    assert not torch.equal(plan.masks[1], plan.masks[0])
    assert torch.equal(plan.masks[2], plan.masks[1]), "a group nobody saw takes its neighbour's"


def test_an_image_has_two_orders():
    grid = TokenGrid(1, 24, 32)
    layout = TokenLayout(grid)
    q, k = planted_heads(grid, ["HWF", "WHF"])
    recorder = Recorder(layout, Measurement(density=0.3, block=16))
    assert recorder.candidates == (0, 1)
    recorder.observe_mass(0, q, k, layout)
    assert recorder.layer_plan(0).orders.heads == (0, 1)


def test_nan_is_named():
    layout = TokenLayout(GRID)
    q, k = planted_heads(GRID, NAMES)
    q[0, 5, 2, 1] = float("nan")
    with pytest.raises(ValueError, match="layer 7: .* NaN or infinity"):
        Recorder(layout, Measurement(block=32, rows_per_block=None)).observe_mass(7, q, k, layout)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(density=0), r"density=0: .* \(0, 1\]"),
        (dict(density=1.2), "density=1.2"),
        (dict(block=48), "block=48: choose one of 16, 32, 64, 128"),
        (dict(criterion="best"), "criterion='best'"),
        (dict(rows_per_block=0), "rows_per_block=0"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        Measurement(**bad)


def test_a_grid_smaller_than_two_blocks():
    with pytest.raises(ValueError, match="choose a smaller block"):
        Recorder(TokenLayout(TokenGrid(1, 4, 6)), Measurement(block=16))
