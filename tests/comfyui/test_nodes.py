"""The nodes themselves, on a fake of ComfyUI's schema; their graphs run in test_server.py."""

import asyncio
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gen_accel.comfy.patch import patch_of
from helpers import fake_comfy
from helpers.fake_comfy import ModelPatcher, sample

ROOT = Path(__file__).resolve().parents[2]
WITH_SCHEMAS = ("entry", "attention", "plans", "quality", "widgets")


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    """Node id -> class, from the entry point that ComfyUI calls in a clone."""
    for name, module in fake_comfy.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    folders = ModuleType("folder_paths")
    folders.models_dir = str(tmp_path)
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    for name in WITH_SCHEMAS:
        monkeypatch.delitem(sys.modules, f"gen_accel.comfy.{name}", raising=False)
    spec = importlib.util.spec_from_file_location("custom_node", ROOT / "__init__.py")
    clone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(clone)

    async def load():
        return await (await clone.comfy_entrypoint()).get_node_list()

    yield {node.define_schema().node_id: node for node in asyncio.run(load())}
    for name in WITH_SCHEMAS:
        sys.modules.pop(f"gen_accel.comfy.{name}", None)


def defaults(node):
    return {i.id: i.default for i in node.define_schema().inputs if hasattr(i, "default")}


def test_schemas_explain_themselves_and_fit_what_is_executed(nodes):
    assert len(nodes) == 10
    for name, node in nodes.items():
        schema = node.define_schema()
        assert name.startswith("GenAccel") and schema.display_name and schema.description
        ports = [*schema.inputs, *schema.outputs]
        assert all(len(port.tooltip) > 10 for port in ports), name
        assert all(port.display_name for port in schema.outputs), name
        assert len({i.id for i in schema.inputs}) == len(schema.inputs), name
        takes = inspect.signature(node.execute).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            assert set(takes) == {i.id for i in schema.inputs}, name
        for port in schema.inputs:
            if port.kind == "Combo":
                assert port.default in port.options and len(set(port.options)) == len(port.options)


@pytest.mark.parametrize("name", ["SparseAttention", "Paro", "SpaAttn", "Gna", "DenseBackend"])
def test_defaults_sample(nodes, name):
    node = nodes[f"GenAccel{name}"]
    model, latent = ModelPatcher(fake_comfy.WanModel()), torch.randn(1, 4, 4, 16, 16)
    settings = defaults(node) | ({"min_tokens": 0} if name != "DenseBackend" else {})
    (out,) = node.execute(model=model, **settings).values
    assert out is not model and model.get_attachment("gen_accel") is None
    sample(out, latent)
    result = nodes["GenAccelReport"].execute(model=out, after={"samples": latent})
    after, text, picture = result.values
    assert after == {"samples": latent} and result.ui == {"text": (text,)}
    assert picture.ndim == 4 and picture.shape[-1] == 3 and 0 <= picture.min() <= 1
    if name != "DenseBackend":
        assert "12 sparse calls, 4 dense" in text and picture.min() < 0.9
        assert "density by step: 1: 0." in text


def test_the_scripts_are_shipped(nodes):
    source = (ROOT / "__init__.py").read_text()
    (folder,) = re.findall(r'WEB_DIRECTORY = "(.*)"', source)
    assert list((ROOT / folder).glob("*.js"))
    assert '"gen_accel.comfy" = ["web/*.js"]' in (ROOT / "pyproject.toml").read_text()


def test_presets_override(nodes):
    node = nodes["GenAccelSpaAttn"]
    settings = defaults(node) | {"preset": "wan2.1-t2v-14b", "dense_blocks": "7"}
    (out,) = node.execute(model=ModelPatcher(fake_comfy.WanModel()), **settings).values
    patch = patch_of(out)
    assert (patch.span.start, patch.span.end) == (0.1, 1.0)
    assert patch.policy.dense_layers == (0, 1) and patch.policy.block == 128
    assert patch.policy.first_frame and patch.policy.density == 0.25


def test_dense_blocks_and_numbers(nodes):
    widgets = sys.modules["gen_accel.comfy.widgets"]
    assert widgets.block_numbers("0, 1 37-39,-1") == (0, 1, 37, 38, 39, -1)
    assert widgets.block_numbers("  ") == ()
    for text in ("one", "3-", "-", "1-2-3", "1.5"):
        with pytest.raises(ValueError, match="neither a number nor a range"):
            widgets.block_numbers(text)
    with pytest.raises(ValueError, match="'56-37' ends before it begins; write 37-56"):
        widgets.block_numbers("0, 56-37")
    assert widgets.numbers("tile", " auto ") == "auto"
    assert widgets.numbers("tile", "4, 8 8") == (4, 8, 8) and widgets.numbers("stride", "2") == 2
    with pytest.raises(ValueError, match="stride='': write auto"):
        widgets.numbers("stride", "")


def test_one_token_has_no_window(nodes):
    model, suggest = ModelPatcher(fake_comfy.WanModel()), nodes["GenAccelGnaSuggest"]
    for size, fits in ((2, False), (16, True)):
        latent = {"samples": torch.randn(1, 4, 1, size, size)}
        settings = defaults(suggest) | {"model": model, "latent": latent}
        if fits:
            assert "density" in suggest.execute(**settings).values[2]
        else:
            with pytest.raises(ValueError, match="one token has no window"):
                suggest.execute(**settings)


def test_plans_stay_in_their_folder(nodes, tmp_path):
    model, latent = ModelPatcher(fake_comfy.WanModel()), torch.randn(1, 4, 4, 16, 16)
    paro, save = nodes["GenAccelParo"], nodes["GenAccelSavePlan"]
    settings = defaults(paro) | {"min_tokens": 0}
    (out,) = paro.execute(model=model, **settings).values
    with pytest.raises(ValueError, match="not sampled yet"):
        save.execute(model=out, after=None, name="plan")
    sample(out, latent)
    for name in ("../plan", "a/b", "", ".hidden", "c:plan"):
        with pytest.raises(ValueError, match="use letters"):
            save.execute(model=out, after=None, name=name)
    (path,) = save.execute(model=out, after=None, name="wan 480p").values
    assert Path(path) == tmp_path / "attention_plans" / "wan 480p.safetensors"
    (plan,) = (i for i in paro.define_schema().inputs if i.id == "plan")
    assert plan.options == ["none: calibrate", "wan 480p.safetensors"]
    settings["plan"] = plan.options[1]
    sample(paro.execute(model=model, **settings).values[0], latent)
    with pytest.raises(FileNotFoundError, match="no such file"):
        paro.execute(model=model, **settings | {"plan": "gone"})
    with pytest.raises(ValueError, match="no gen_accel node"):
        save.execute(model=model, after=None, name="plan")


def test_pictures_of_images_and_videos(nodes):
    grey = torch.full((4, 16, 16, 4), 0.5)  # with transparency
    video = SimpleNamespace(get_components=lambda: SimpleNamespace(images=grey))
    fidelity, guard = nodes["GenAccelFidelity"], nodes["GenAccelGuard"]
    near, alike, steady, text = fidelity.execute(images=video, reference=grey).values
    assert (near, steady) == (100.0, 0.0) and alike == pytest.approx(1) and "4 frames" in text
    near, _, steady, _ = fidelity.execute(images=grey[:1], reference=grey[:1] * 0.9).values
    assert near == pytest.approx(26.02, abs=0.01) and steady == 0.0
    black = grey.clone()
    black[1:3] = 0
    frames, count, text = guard.execute(images=black, on_broken="report").values
    assert frames is black and count == len(text.splitlines()) and "frames 1 to 2: black" in text
    with pytest.raises(ValueError, match="^images: frames 1 to 2: black"):
        guard.execute(images=black, on_broken="stop the run")


def test_a_clone_brings_its_own_package(tmp_path):
    """Without gen_accel installed, without a word to sys.path, and without diffusers."""
    code = f"""
import importlib.util, sys
from importlib.machinery import PathFinder
def find_spec(name, path=None, target=None, find=PathFinder.find_spec):
    absent = name.split(".")[0] in ("diffusers", "cv2", "imageio")
    return None if absent else find(name, path, target)
PathFinder.find_spec = staticmethod(find_spec)
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path[:] = [p for p in sys.path if p != ""]
assert importlib.util.find_spec("gen_accel") is None
name = {str(ROOT / "__init__.py")!r}
spec = importlib.util.spec_from_file_location(name.replace(".", "_x_"), name)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
path = list(sys.path)
assert "torch" not in sys.modules, "the loader waits for nothing"
module._find_package()
import gen_accel.comfy.patch, gen_accel.processors, gen_accel.eval.fidelity
assert sys.path == path and "diffusers" not in sys.modules
print(gen_accel.__file__)
"""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == ROOT / "gen_accel"
