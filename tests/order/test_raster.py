import pytest
import torch

from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.axis import axis_order
from gen_accel.order.raster import RasterOrder


@pytest.mark.parametrize("before, after", [(0, 0), (0, 3), (5, 0), (2, 4)])
def test_it_is_the_first_axis_order(before, after):
    layout = TokenLayout(TokenGrid(2, 3, 4), before, after)
    x = torch.randn(2, layout.tokens, 3, 4)
    expected = axis_order([0, 0, 0]).reorder(x, layout)
    assert torch.equal(RasterOrder().reorder(x, layout), expected)
    assert torch.equal(RasterOrder().restore(expected, layout), x)
    assert RasterOrder().permutation(layout.grid).tolist() == list(range(24))
