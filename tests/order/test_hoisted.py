import pytest
import torch

from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.curve import CurveOrder
from gen_accel.order.hoisted import Hoisted

GRID = TokenGrid(3, 4, 5)


@pytest.mark.parametrize("text", [(0, 0), (0, 6), (5, 0), (5, 6)])
def test_first_the_video_then_the_rest_is_the_whole_order(text):
    layout = TokenLayout(GRID, *text)
    order, rest = CurveOrder(), Hoisted(CurveOrder())
    x = torch.randn(2, layout.tokens, 3, 4)
    index = torch.tensor(order.permutation(GRID))
    before, video, after = x.split([text[0], GRID.numel, text[1]], 1)
    hoisted = torch.cat([before, video[:, index], after], 1)
    ordered = rest.reorder(hoisted, layout)
    assert torch.equal(ordered, order.reorder(x, layout))
    assert torch.equal(rest.restore(ordered, layout), hoisted)


def test_nothing_moves_where_no_text_is_in_front():
    layout, rest = TokenLayout(GRID, 0, 6), Hoisted(CurveOrder())
    x = torch.randn(1, layout.tokens, 2, 4)
    assert rest.reorder(x, layout) is x and rest.restore(x, layout) is x


def test_memory_suits_carriers_and_models():
    layout, rest = TokenLayout(GRID, 5, 6), Hoisted(CurveOrder())
    ordered = rest.reorder(torch.randn(2, layout.tokens, 3, 4), layout)
    assert ordered.transpose(1, 2).is_contiguous()
    assert rest.restore(ordered, layout).is_contiguous()


def test_knows_where_tokens_stand():
    assert Hoisted(CurveOrder()).permutation(GRID) is CurveOrder().permutation(GRID)
    assert Hoisted(CurveOrder()) == Hoisted(CurveOrder()) != Hoisted(CurveOrder("F"))
