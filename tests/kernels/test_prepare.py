import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm

from gen_accel.families import base
from gen_accel.families.base import norm_rotate, rotate
from gen_accel.kernels.prepare import AxisPlaces, IndexPlaces, Rope, prepare, restore
from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.axis import _AXES, AxisOrder
from gen_accel.order.tile import TileOrder, _indices

GRID = TokenGrid(3, 4, 5)
TEXTS = [(0, 0), (7, 0), (0, 6), (2, 3)]


def case(before=0, after=0, heads=6, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, GRID.numel + before + after, heads, dim, generator=generator)
    return x, TokenLayout(GRID, text_before=before, text_after=after)


def axis_places(before, heads=6):
    return AxisPlaces.from_axes([_AXES[i % 6] for i in range(heads)], tuple(GRID), before)


def tile_places(before, after):
    """Tiles of 2x2x2 in blocks of ten, so that places repeat tokens."""
    order = TileOrder((2, 2, 2), block=10)
    cpu = torch.device("cpu")
    return order, IndexPlaces(*_indices(order, GRID, before, after, cpu))


def angles(tokens, dim, seed=1):
    generator = torch.Generator().manual_seed(seed)
    angle = 6 * torch.rand(tokens, dim // 2, generator=generator)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("before, after", TEXTS)
def test_axis_places_are_the_axis_order(before, after):
    x, layout = case(before, after)
    order, places = AxisOrder(tuple(range(6))), axis_places(before)
    ordered = prepare(x, places)
    assert torch.equal(ordered, order.reorder(x, layout).transpose(1, 2))
    assert torch.equal(restore(ordered, places), x)
    assert torch.equal(order.restore(ordered.transpose(1, 2), layout), x)


@pytest.mark.parametrize("before, after", TEXTS)
def test_index_places_are_the_tile_order(before, after):
    x, layout = case(before, after)
    order, places = tile_places(before, after)
    ordered = prepare(x, places)
    assert ordered.shape[2] > x.shape[1]
    assert torch.equal(ordered, order.reorder(x, layout).transpose(1, 2))
    assert torch.equal(restore(ordered, places), x)


def test_no_order_moves_the_heads_only():
    x, _ = case(before=2)
    assert torch.equal(prepare(x), x.transpose(1, 2)) and prepare(x).is_contiguous()
    assert torch.equal(restore(prepare(x)), x)


def test_rope_is_that_of_the_models():
    x, _ = case()
    cos, sin = angles(GRID.numel, 8)
    twice = [t.repeat_interleave(2, 1) for t in (cos, sin)]  # as Wan, FLUX and HunyuanVideo hold it
    got = prepare(x, rope=Rope(twice[0][:, ::2], twice[1][:, 1::2])).transpose(1, 2)
    torch.testing.assert_close(got, apply_rotary_emb(x, twice, sequence_dim=1))
    torch.testing.assert_close(got, rotate(x, cos, sin))
    halves = [torch.cat([t, t], 1) for t in (cos, sin)]  # as Cosmos
    got = prepare(x, rope=Rope(halves[0][:, :4], halves[1][:, 4:], halves=True)).transpose(1, 2)
    torch.testing.assert_close(got, rotate(x, cos, sin, halves=True))
    some = rotate(x, cos[:5], sin[:5])
    assert torch.equal(some[:, 5:], x[:, 5:]) and not torch.equal(some[:, 1:5], x[:, 1:5])
    right = apply_rotary_emb(x, halves, sequence_dim=1, use_real_unbind_dim=-2)
    torch.testing.assert_close(got, right)


def test_rope_then_order():
    """Angles belong to the token, not to the place it ends at; text is not turned."""
    x, _ = case(before=2, after=3)
    rope = Rope(*angles(GRID.numel, 8), start=2)
    turned = prepare(x, rope=rope).transpose(1, 2)
    assert torch.equal(turned[:, :2], x[:, :2]) and torch.equal(turned[:, -3:], x[:, -3:])
    assert not torch.isclose(turned[:, 2:-3], x[:, 2:-3]).all(-1).any()
    for places in (axis_places(2), tile_places(2, 3)[1]):
        assert torch.equal(prepare(x, places, rope), prepare(turned, places))


def norm_module(kind, width):
    norm = kind(width, eps=1e-3)
    generator = torch.Generator().manual_seed(4)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    return norm.requires_grad_(False)


@pytest.fixture
def fused(monkeypatch):
    """What a GPU takes, here in torch operations; counts how often it was taken."""
    taken = []

    def prepare_(x, *args):
        taken.append(args)
        return prepare(x, *args)

    monkeypatch.setattr(base, "fused", lambda *tensors: True)
    monkeypatch.setattr(base, "prepare", prepare_)
    return taken


@pytest.mark.parametrize("kind", [torch.nn.RMSNorm, RMSNorm])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_norm_and_rope_in_one_are_those_of_the_models(kind, across, halves, fused, monkeypatch):
    x, layout = case(after=6)
    norm = norm_module(kind, 6 * 8 if across else 8)
    cos, sin = angles(GRID.numel, 8)
    found = norm_rotate(norm, x, cos, sin, halves=halves, across=across)
    assert len(fused) == 1
    monkeypatch.setattr(base, "fused", lambda *tensors: False)
    stock = norm(x.flatten(2)).view(x.shape) if across else norm(x)
    torch.testing.assert_close(found, rotate(stock, cos, sin, halves))
    assert torch.equal(
        norm_rotate(norm, x, cos, sin, halves=halves, across=across),
        rotate(stock, cos, sin, halves),
    )
    assert len(fused) == 1


def _double(norm):
    norm.register_forward_hook(lambda module, args, out: 2 * out)
    return norm


def _offloaded(norm):
    class Double(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    return add_hook_to_module(norm, Double())


@pytest.mark.parametrize(
    "change",
    [
        _double,
        _offloaded,
        lambda norm: RMSNorm(8, eps=1e-3, bias=True).requires_grad_(False),
        lambda norm: RMSNorm(8, eps=1e-3, elementwise_affine=False),
        lambda norm: norm.double(),
        lambda norm: torch.nn.LayerNorm(8),
        lambda norm: None,
    ],
    ids=["hook", "offload", "bias", "plain", "dtype", "layer norm", "none"],
)
def test_whatever_is_not_a_plain_norm_runs_itself(change, fused):
    x, _ = case()
    norm = change(norm_module(RMSNorm, 8))
    cos, sin = angles(GRID.numel, 8)
    right = rotate(x if norm is None else norm(x), cos, sin)
    assert torch.equal(norm_rotate(norm, x, cos, sin), right)
    assert all(len(args) == 2 for args in fused)  # RoPE alone
