import pytest
import torch

from gen_accel.families import base, families, family_of, flux, hunyuan_video
from gen_accel.families.base import argument, prefix_lengths, read_once
from gen_accel.layout import TokenGrid, TokenLayout, Unsupported
from helpers import tiny
from helpers.dense import Dense, installed


def layout(model, *args, **kwargs):
    return family_of(model).layout(model, args, kwargs)


def img_ids(height, width, dtype=torch.float32):
    ids = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in (height, width)))
    return ids.to(dtype)


def flux_layout(ids, image=None, text=8):
    model = tiny.flux_transformer(layers=1, single_layers=1)
    image = torch.zeros(1, ids.shape[-2] if image is None else image, 16)
    states = torch.zeros(1, text, 32)
    return layout(model, hidden_states=image, encoder_hidden_states=states, img_ids=ids)


def hunyuan_layout(mask):
    model = tiny.hunyuan_transformer(layers=1, single_layers=1)
    return layout(
        model,
        hidden_states=torch.zeros(len(mask), 4, 5, 8, 12),
        encoder_hidden_states=torch.zeros(*mask.shape, 16),
        encoder_attention_mask=mask,
    )


def test_video_grid_is_after_patchify_however_it_is_passed():
    latents = torch.zeros(1, 16, 5, 8, 12)
    for model in (tiny.wan_transformer(), tiny.cosmos_transformer(in_channels=16)):
        assert layout(model, latents) == TokenLayout(TokenGrid(5, 4, 6))
        assert layout(model, hidden_states=latents) == TokenLayout(TokenGrid(5, 4, 6))


def test_hunyuan_text_is_behind_the_video():
    mask = torch.zeros(2, 32, dtype=torch.long)
    mask[0, :3] = mask[1, :32] = 1
    assert hunyuan_layout(mask) == TokenLayout(
        TokenGrid(5, 4, 6), text_after=32, text_valid=(3, 32)
    )
    assert hunyuan_layout(torch.ones(2, 32)).text_valid is None


@pytest.mark.parametrize("padding", ["left", "hole"])
def test_hunyuan_padding_must_be_on_the_right(padding):
    mask = torch.ones(2, 32)
    mask[1, : 4 if padding == "left" else None] = 0
    mask[1, 30:] = 1
    with pytest.raises(Unsupported, match="sample 1 is not a prefix"):
        hunyuan_layout(mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(4, 6), (6, 4), (1, 6), (6, 1), (300, 2), (2, 300)])
def test_flux_grid_from_ids(size, dtype):
    """300 rows in bf16: ids above 256 repeat, the rows do not."""
    expected = TokenLayout(TokenGrid(1, *size), text_before=8)
    assert flux_layout(img_ids(*size, dtype)) == expected
    assert flux_layout(img_ids(*size, dtype)[None]) == expected


def test_flux_reference_tokens_are_unsupported():
    ids = img_ids(4, 6)
    reference = ids.clone()
    reference[:, 0] = 1
    with pytest.raises(Unsupported, match="Kontext"):
        flux_layout(torch.cat([ids, reference]))
    with pytest.raises(Unsupported):
        flux_layout(torch.cat([ids, img_ids(3, 5)]))
    with pytest.raises(Unsupported):
        flux_layout(ids, image=48)


def test_ids_are_read_once():
    reads = []

    def read(tensor):
        reads.append(float(tensor.sum()))
        return reads[-1]

    ids = torch.ones(3)
    assert [read_once(ids, read) for _ in range(3)] == [3.0] * 3 and len(reads) == 1
    ids[0] = 5.0  # changed in place: what we knew is void
    assert read_once(ids, read) == 7.0 and len(reads) == 2
    assert read_once(torch.ones(3), read) == 3.0  # equal, but another tensor
    with torch.inference_mode():
        frozen = torch.ones(2)
    assert read_once(frozen, read) == 2.0
    before = len(base._FACTS)
    del ids, frozen
    assert len(base._FACTS) < before


@pytest.mark.parametrize(
    ("build", "module", "name"),
    [(tiny.tiny_flux, flux, "_read_grid"), (tiny.tiny_hunyuan, hunyuan_video, "prefix_lengths")],
)
def test_a_run_waits_for_the_device_once(build, module, name, monkeypatch):
    reads = []
    read = getattr(module, name)

    def counted(tensor):
        reads.append(tensor.shape)
        return read(tensor)

    monkeypatch.setattr(module, name, counted)
    pipe, call = build()
    with installed(pipe.transformer, Dense()) as attend:
        tiny.run(pipe, **{**call, "num_inference_steps": 3})
    assert len(attend.calls) == 4 * 3 and len(reads) == 1


def test_prefix_lengths():
    rows = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1], [1, 0, 1]])
    assert prefix_lengths(rows) == (2, 0, 3, -1, -1)
    assert prefix_lengths(rows[:, None, None].bool()) == (2, 0, 3, -1, -1)


def test_argument_finds_positional_and_missing_ones():
    model = tiny.wan_transformer(layers=1)
    assert argument(model, ("x", "t"), {"encoder_hidden_states": "e"}, "timestep") == "t"
    assert argument(model, ("x", "t"), {"encoder_hidden_states": "e"}, "hidden_states") == "x"
    assert argument(model, ("x",), {}, "encoder_hidden_states_image") is None


def test_family_of_subclass_compiled_and_unknown():
    class Mine(type(tiny.wan_transformer(layers=1))):
        pass

    assert family_of(tiny.wan_transformer(layers=1, cls=Mine)).name == "wan"
    compiled = torch.compile(tiny.flux_transformer(layers=1, single_layers=1), backend="eager")
    assert family_of(compiled).name == "flux"
    with pytest.raises(ValueError, match=r"Linear: no family .*FluxTransformer2DModel"):
        family_of(torch.nn.Linear(1, 1))
    names = [name for family in families() for name in family.transformers]
    assert len(names) == len(set(names))
