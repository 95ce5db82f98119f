import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.axis import axis_order
from gen_accel.plan import (
    FORMAT,
    AttentionPlan,
    ComponentPlan,
    LayerPlan,
    PlanError,
    default_block_size,
)

GRID, BLOCK, HEADS = TokenGrid(4, 5, 6), 16, 3


def make_plan(groups=2):
    generator = torch.Generator().manual_seed(0)
    blocks = GRID.numel // BLOCK
    component = ComponentPlan("WanTransformer3DModel/2x3x16", (0.7, 0.0)[-groups:])
    for layer in (0, 2):
        masks = torch.rand(groups, HEADS, blocks, blocks, generator=generator) < 0.4
        component.layers[layer] = LayerPlan(axis_order([layer, 1, 5]), masks, (0.9,) * groups)
    return AttentionPlan(GRID, BLOCK, 0.4, {"transformer": component}, {"prompts": 2})


def test_round_trip(tmp_path):
    plan = make_plan()
    loaded = AttentionPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert (loaded.grid, loaded.block, loaded.density) == (GRID, BLOCK, 0.4)
    assert loaded.info == plan.info
    mine, its = plan.components["transformer"], loaded.components["transformer"]
    assert (its.model, its.sigmas) == (mine.model, mine.sigmas)
    assert sorted(its.layers) == [0, 2]
    for layer, expected in mine.layers.items():
        assert its.layers[layer].orders == expected.orders
        assert torch.equal(its.layers[layer].masks, expected.masks)
        assert its.layers[layer].mass_kept == expected.mass_kept


def test_masks_are_stored_as_bits(tmp_path):
    path = make_plan().save(tmp_path / "plan.safetensors")
    bits = 2 * HEADS * (GRID.numel // BLOCK) ** 2
    assert load_file(path)["transformer.0.masks"].nbytes == -(-bits // 8)


def test_groups_are_found_by_noise_level():
    component = ComponentPlan("m", (0.9, 0.5, 0.1))
    assert [component.group(s) for s in (1.0, 0.9, 0.89, 0.5, 0.2, 0.05)] == [0, 0, 1, 1, 2, 2]
    assert component.group(None) == 2


@pytest.mark.parametrize(
    "text_before, text_after, valid", [(0, 0, 0), (0, 20, 20), (0, 20, 7), (9, 0, 0)]
)
def test_text_and_ragged_tail_are_always_kept(text_before, text_after, valid):
    layout = TokenLayout(GRID, text_before, text_after)
    layer = make_plan().components["transformer"].layers[0]
    blocks = layer.blocks(1, layout, BLOCK, torch.device("cpu"), text_before + valid)
    assert blocks.q_len == layout.tokens
    assert blocks.kv_len == GRID.numel + text_before + valid
    mask, video = blocks.mask()[0], GRID.numel // BLOCK
    assert torch.equal(mask[:, :video, :video], layer.masks[1])
    assert mask[:, video:].all() and mask[:, :, video:].all()


def test_heads_can_be_sliced():
    layer = make_plan().components["transformer"].layers[2]
    part = layer.heads(slice(1, 3))
    assert part.orders.heads == layer.orders.heads[1:3]
    assert torch.equal(part.masks, layer.masks[:, 1:3])


def test_plan_of_another_model_is_refused():
    plan = make_plan()
    plan.check({"transformer": "WanTransformer3DModel/2x3x16"})
    with pytest.raises(PlanError, match="transformer is WanTransformer3DModel/40x40x128"):
        plan.check({"transformer": "WanTransformer3DModel/40x40x128"})
    with pytest.raises(PlanError, match="no part for 'transformer_2'"):
        plan.check({"transformer_2": "x"})


def test_a_file_is_readable_as_any_other(tmp_path):
    path = make_plan().save(tmp_path / "plan.safetensors")
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "plan.safetensors"]


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="gen-accel calibrate"):
        AttentionPlan.load("/nowhere/plan.safetensors")


def test_every_damaged_byte_is_noticed(tmp_path):
    path = make_plan().save(tmp_path / "plan.safetensors")
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), 41):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(PlanError):
            AttentionPlan.load(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(PlanError, match="not a readable plan file"):
        AttentionPlan.load(path)


def test_foreign_files_are_refused(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(PlanError, match="not a readable plan file"):
        AttentionPlan.load(text)
    weights = tmp_path / "weights.safetensors"
    save_file({"w": np.zeros(3)}, weights)
    with pytest.raises(PlanError, match="not one that gen_accel wrote"):
        AttentionPlan.load(weights)
    newer = tmp_path / "newer.safetensors"
    save_file({}, newer, metadata={FORMAT: json.dumps({"format": FORMAT, "version": 99})})
    with pytest.raises(PlanError, match="format version 99"):
        AttentionPlan.load(newer)


def test_an_unwritable_folder_leaves_nothing_behind(tmp_path):
    with pytest.raises(OSError):
        make_plan().save(tmp_path / "missing" / "plan.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "grid, block",
    [
        ((21, 45, 80), 128),
        ((8, 32, 32), 128),
        ((8, 16, 32), 64),
        ((5, 4, 6), 16),
        ((1, 64, 64), 64),
    ],
)
def test_default_block_cuts_the_video_into_64(grid, block):
    assert default_block_size(TokenGrid(*grid)) == block
