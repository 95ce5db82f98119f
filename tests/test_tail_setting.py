import pytest
import torch

from gen_accel.kernels.blocks import Blocks
from gen_accel.kernels.tail import Pooled, Rectified
from gen_accel.tail import NAMES, TailSetting


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("drop", TailSetting()),
        ("rectified", TailSetting("rectified")),
        ("rectified+gapr", TailSetting("rectified", gapr="code")),
        ("joint", TailSetting("joint")),
        ("joint/8", TailSetting("joint", parts=8)),
        ("joint+variance", TailSetting("joint", variance=True)),
        ("joint/4+variance", TailSetting("joint", parts=4, variance=True)),
    ],
)
def test_names(name, setting):
    assert TailSetting.parse(name) == setting
    assert TailSetting.parse(setting) is setting


def call(tokens=64):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, tokens, 2, 8, generator=generator)
    mask = torch.eye(tokens // 16, dtype=torch.bool)[None, None]
    return q, k, v, Blocks.from_mask(mask, q_len=tokens, kv_len=tokens, block_size=16)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_setting_makes(name):
    tail = TailSetting.parse(name).make(*call(), pooled=48)
    kinds = {"drop": type(None), "rectified": Rectified, "joint": Pooled}
    assert isinstance(tail, kinds[name.split("+")[0]])
    if isinstance(tail, Pooled):
        assert tail.bias.numel() == 3 and (tail.variance is not None) == ("variance" in name)
    assert TailSetting.parse(name).make(*call(), pooled=0) is None


def test_parts_divide_the_block():
    assert TailSetting.parse("joint/4").make(*call(), pooled=64).per_block == 4
    odd = Blocks.from_mask(
        torch.eye(3, dtype=torch.bool)[None, None], q_len=64, kv_len=64, block_size=22
    )
    tail = TailSetting.parse("joint/4").make(*call()[:3], odd, pooled=44)
    assert tail.per_block == 2 and tail.bias.numel() == 4, "22 tokens have no quarters"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kind="mean"), "kind='mean'"),
        (dict(kind="rectified", gapr="both"), "gapr='both'"),
        (dict(kind="joint", gapr="code"), "belongs to kind='rectified'"),
        (dict(kind="drop", variance=True), "belong to kind='joint'"),
        (dict(kind="joint", parts=0), "parts=0"),
        (dict(kind="joint", parts=5), "parts=5: one of 1, 2, 4, 8, 16"),
        (dict(kind="joint", parts=32), "parts=32"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TailSetting(**settings)


def test_bad_names():
    with pytest.raises(ValueError, match=r"tail='rectify'.*did you mean 'rectified'"):
        TailSetting.parse("rectify")
    with pytest.raises(ValueError, match="tail='drop/4'"):
        TailSetting.parse("drop/4")
    with pytest.raises(TypeError, match="tail=3"):
        TailSetting.parse(3)
