from dataclasses import replace

import pytest
import torch

from gen_accel.families import family_of
from gen_accel.forecast import ASSUMED, Rates, attention_flop, forecast, matrix_flop, read_rates
from gen_accel.layout import TokenGrid
from gen_accel.published import MODELS, published


@pytest.mark.parametrize(
    ("name", "billions", "tokens"),
    [
        # Parameters as the authors state them; Cosmos' 7B is 6.66 plus 0.6 of its learnt positions.
        ("hunyuan-video", 12.8, 118_800),
        ("wan2.1-14b", 14.3, 75_600),
        ("wan2.1-1.3b", 1.42, 32_760),
        ("flux-dev", 11.9, 65_536),
        ("cosmos-7b", 7.1, 56_320),
    ],
)
def test_the_architectures_are_the_published_ones(name, billions, tokens):
    model = published(name)
    with torch.device("meta"):
        transformer = model.build("meta", torch.bfloat16)
    count = sum(p.numel() for p in transformer.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.05)
    assert model.grid(*model.size).numel == tokens
    assert family_of(transformer).name == model.family


@pytest.mark.parametrize(
    ("name", "attention", "linear"),
    [
        ("hunyuan-video", 10.45, 1.62),
        ("wan2.1-14b", 4.68, 1.84),
        ("wan2.1-1.3b", 0.20, 0.085),
        ("flux-dev", 3.06, 0.85),
        ("cosmos-7b", 1.46, 0.75),
    ],
)
def test_work_is_that_of_the_table_by_hand(name, attention, linear):
    model = published(name)
    tokens = model.grid(*model.size).numel
    assert attention_flop(model, tokens) / 1e15 == pytest.approx(attention, rel=0.02)
    assert matrix_flop(model, tokens) / 1e15 == pytest.approx(linear, rel=0.02)


def test_matrix_work_is_that_of_the_modules():
    """Counted by hooks on every Linear of a small model."""
    model = published("wan-narrow")
    grid = TokenGrid(2, 4, 6)
    transformer = model.build("cpu", torch.float32)
    seen = [0.0]

    def count(module, args, out):
        seen[0] += 2.0 * args[0].numel() * module.out_features

    for module in transformer.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    inputs = model.inputs(grid, "cpu", torch.float32)
    timestep = model.timestep(0.5, "cpu", torch.float32)
    with torch.no_grad():
        transformer(**inputs, timestep=timestep)
    cross_attention = 4.0 * model.depth * model.width * grid.numel * model.text
    assert matrix_flop(model, grid.numel) == pytest.approx(seen[0] + cross_attention, rel=0.01)


def test_a_cut_keeps_every_kind_of_block():
    model = published("hunyuan-video")
    assert dict(model.cut(6).layers) == {"num_layers": 2, "num_single_layers": 4}
    assert model.cut(None) is model and model.cut(600) is model
    with pytest.raises(ValueError, match="layers=1: hunyuan-video has 2 kinds"):
        model.cut(1)


@pytest.mark.parametrize(
    ("size", "message"), [((721, 1280, 81), "height=721"), ((720, 1280, 80), "num_frames=80")]
)
def test_sizes_that_do_not_divide_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        MODELS["wan2.1-14b"].grid(*size)


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="choose from hunyuan-video"):
        published("wan")


def test_a_forecast_follows_its_rates():
    model = published("wan2.1-14b")
    grid = model.grid(*model.size)
    found = forecast(model, grid, 0.2, ASSUMED["h200"])
    # performance.md, Amdahl: about 1.7 with a fifth of the steps dense.
    speed = forecast(model, grid, 1.0, ASSUMED["h200"]).run(50, 50) / found.run(50, 10)
    assert 0.65 < found.attention_share < 0.78 and 1.5 < speed < 1.9
    fast = replace(ASSUMED["h200"], windows={0.2: 960e12})
    assert forecast(model, grid, 0.2, fast) == found
    window = forecast(model, grid, 0.2, fast, windows=True)
    assert window.sparse < found.sparse and window.dense_forward == found.dense_forward
    twice = Rates(2 * 650e12, 2 * 576e12, {1.0: 2 * 480e12}, 2 * 3.4e12)
    assert forecast(model, grid, 0.2, twice).sparse_forward == pytest.approx(
        found.sparse_forward / 2
    )


def test_rates_come_from_rows():
    def row(name, value, density=1.0):
        config = {"dtype": "fp32", "density": density}
        return {"kind": "rate", "name": name, "value": value, "config": config, "device": "cpu: x"}

    rows = [row("linear", 5.0), row("attention", 3.0), row("memory", 7.0)]
    with pytest.raises(ValueError, match="no rate of sparse"):
        read_rates(rows)
    rates = read_rates([*rows, row("sparse 0.1", 1.0, 0.1), row("sparse 0.3", 2.0, 0.3)])
    assert (rates.linear, rates.attention, rates.memory, rates.bytes) == (5.0, 3.0, 7.0, 4)
    assert [rates.sparse_at(d) for d in (0.05, 0.2, 0.9)] == pytest.approx([1.0, 1.5, 2.0])
    assert rates.sparse_at(0.2, windows=True) == rates.sparse_at(0.2)
    window = [row("sparse 0.1", 1.0, 0.1), row("windows 0.1", 4.0, 0.1)]
    rates = read_rates([*rows, *window])
    assert (rates.sparse_at(0.2), rates.sparse_at(0.2, windows=True)) == (1.0, 4.0)
    config = {"case": "W", "lists": "dense", "tflop": 100.0}
    kernel = {"kind": "kernel", "name": "triton", "value": 200.0, "device": "cuda: x"}
    sparse = {"case": "W", "lists": "realistic", "tflop": 20.0, "density": 0.2, "tail": "drop"}
    rates = read_rates([{**kernel, "config": config}, {**kernel, "value": 50.0, "config": sparse}])
    assert rates.attention == 500e12 and rates.sparse_at(0.2) == 400e12


def test_rates_are_of_one_device_and_of_attention_alone():
    dense = {"case": "W", "lists": "dense", "tflop": 100.0}
    lists = {"case": "W", "lists": "realistic", "tflop": 20.0, "density": 0.2, "tail": "drop"}
    kernel = {"kind": "kernel", "name": "triton", "device": "cuda: x"}
    rows = [
        {**kernel, "value": 1.0, "config": dense, "device": "cuda: faster"},
        {**kernel, "value": 200.0, "config": dense},
        {**kernel, "value": 50.0, "config": lists},
        {**kernel, "value": 20.0, "config": {**lists, "precision": "int8"}},
        {**kernel, "value": 70.0, "config": {**lists, "places": True}},
        {**kernel, "value": 90.0, "config": dense, "name": "sageattention"},
    ]
    rates = read_rates(rows)
    assert rates.attention == 500e12 and rates.sparse_at(0.2) == 400e12
