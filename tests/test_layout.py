import pytest

from gen_accel.layout import TokenGrid, TokenLayout


def test_counts():
    layout = TokenLayout(TokenGrid(21, 45, 80), 0, 256, text_valid=(17,))
    assert (layout.grid.numel, layout.text, layout.tokens) == (75_600, 256, 75_856)
    assert str(layout.grid) == "21x45x80"


@pytest.mark.parametrize(
    "bad",
    [
        dict(grid=TokenGrid(0, 4, 4)),
        dict(grid=TokenGrid(1, 4, 4), text_before=-1),
        dict(grid=TokenGrid(1, 4, 4), text_before=8, text_valid=(3,)),
    ],
)
def test_bad_layouts(bad):
    with pytest.raises(ValueError):
        TokenLayout(**bad)
