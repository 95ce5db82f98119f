"""The house installs as one package: as a wheel, an editable install, and as a bare clone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "*.egg-info", "__pycache__", "build", "dist", "outputs", "runs", "models"
)

# What a fresh interpreter sees: the folders under test first, then the packages of this
# environment, but not the finder of its own editable install (-S skips .pth files). torchvision is
# out of reach, because nothing here may need it.
PROLOGUE = """
import site, sys
from importlib.machinery import PathFinder

def find_spec(name, path=None, target=None, find=PathFinder.find_spec):
    return None if name.partition(".")[0] == "torchvision" else find(name, path, target)

PathFinder.find_spec = staticmethod(find_spec)
for folder in {folders!r}:
    site.addsitedir(folder)
sys.path.extend({dependencies!r})
"""

USE = """
import gen_accel
loaded = {"torch", "diffusers", "transformers", "numpy"} & set(sys.modules)
assert not loaded, f"import gen_accel loaded {loaded}"

import torch
from gen_accel import ParoProcessor, block_sparse_attention
from gen_accel.eval import fidelity, files, report, video
from gen_accel.kernels import api, blocks
import gen_accel.cli.main, gen_accel.demo

q = torch.randn(1, 70, 2, 16, generator=torch.Generator().manual_seed(0))
out = block_sparse_attention(q, q, q)
dense = torch.nn.functional.scaled_dot_product_attention(*[x.transpose(1, 2) for x in (q, q, q)])
assert torch.allclose(out.transpose(1, 2), dense, atol=1e-5)
ParoProcessor(density=0.5)
assert "torchvision" not in sys.modules
print(gen_accel.__file__, api.__file__, fidelity.__file__, sep="\\n")
"""


def python(code, *, folders=(), cwd, path=None):
    """Run ``code`` in a fresh interpreter and return its output."""
    dependencies = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    prologue = PROLOGUE.format(folders=[str(f) for f in folders], dependencies=dependencies)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, "-S", "-c", prologue + textwrap.dedent(code)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(*arguments, cwd):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The sources alone, as a clone has them."""
    folder = tmp_path_factory.mktemp("clone") / "gen_accel_pack"
    shutil.copytree(ROOT, folder, ignore=NOT_SOURCE)
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("src") / "pack"
    shutil.copytree(clone, source)  # setuptools leaves build/ behind
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def install(wheel, folder):
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder.parent)
    return folder


def assert_all_from(output, root):
    files = output.split()
    assert len(files) == 3
    for file in files:
        assert Path(file).is_relative_to(root), f"{file} is not the copy under test"


def test_wheel(wheel, tmp_path):
    site = install(wheel, tmp_path / "site")
    assert_all_from(python(USE, folders=[site], cwd=tmp_path), site)
    assert not (site / "kernels").exists() and not (site / "eval").exists()


def test_wheel_holds_every_module(wheel, clone, tmp_path):
    site = install(wheel, tmp_path / "site")
    for folder, inside in (
        ("gen_accel", "gen_accel"),
        ("kernels", "gen_accel/kernels"),
        ("pipelines", "gen_accel/pipelines"),
        ("eval", "gen_accel/eval"),
    ):
        for file in (clone / folder).rglob("*.py"):
            relative = file.relative_to(clone / folder)
            assert (site / inside / relative).is_file(), f"{folder}/{relative} is not in the wheel"
    assert (site / "gen_accel" / "py.typed").is_file()


def test_wheel_has_the_command(wheel, tmp_path):
    site = install(wheel, tmp_path / "site")
    (entry,) = site.glob("gen_accel-*.dist-info/entry_points.txt")
    assert "gen-accel = gen_accel.cli.main:main" in entry.read_text()
    code = """
        import runpy
        sys.argv = ["gen-accel", "--help"]
        try:
            runpy.run_module("gen_accel", run_name="__main__")
        except SystemExit as end:
            assert not end.code
        assert "torch" not in sys.modules, "--help must not wait for torch"
    """
    assert "generate" in python(code, folders=[site], cwd=tmp_path)


def test_editable_install(clone, tmp_path):
    source = tmp_path / "pack"
    shutil.copytree(clone, source)
    hook = "import sys, setuptools.build_meta as b; b.build_editable(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", hook, tmp_path], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.whl")
    site = install(built, tmp_path / "site")
    assert_all_from(python(USE, folders=[site], cwd=tmp_path), source)


def test_bare_clone_as_working_directory(clone):
    assert_all_from(python(USE, cwd=clone), clone)


def test_bare_clone_on_the_path(clone, tmp_path):
    assert_all_from(python(USE, cwd=tmp_path, path=clone), clone)


@pytest.mark.parametrize("where", ["cwd", "path"])
def test_an_installed_kernels_package_wins(clone, tmp_path, where):
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("__version__ = '9.9'\n")
    (site / "kernels-9.9.dist-info").mkdir()
    (site / "kernels-9.9.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 9.9\n")
    code = """
        import gen_accel.kernels.blocks
        import kernels
        from importlib.metadata import version
        assert kernels.__version__ == version("kernels") == "9.9", kernels
        assert not hasattr(kernels, "blocks")
        print(kernels.__file__, gen_accel.kernels.blocks.__file__)
    """
    place = {"cwd": clone} if where == "cwd" else {"cwd": tmp_path, "path": clone}
    theirs, ours = python(code, folders=[site], **place).split()
    assert Path(theirs).is_relative_to(site) and Path(ours).is_relative_to(clone)


def test_without_it_nobody_takes_our_folder_for_it(clone):
    code = """
        import gen_accel.kernels.blocks
        from diffusers.utils.import_utils import is_kernels_available as in_diffusers
        from transformers.utils import is_kernels_available as in_transformers
        try:
            from importlib.metadata import version
            version("kernels")
        except ModuleNotFoundError:
            assert not in_diffusers() and not in_transformers()
        from diffusers import WanPipeline
        from transformers import UMT5EncoderModel
    """
    python(code, cwd=clone)


def test_every_package_folder_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for top, name in (
        ("gen_accel", "gen_accel"),
        ("kernels", "gen_accel.kernels"),
        ("pipelines", "gen_accel.pipelines"),
        ("eval", "gen_accel.eval"),
    ):
        assert settings["package-dir"][name] == top
        for file in (ROOT / top).rglob("*.py"):
            found.add(".".join((name, *file.relative_to(ROOT / top).parent.parts)))
    # pipelines/ is listed before its first module stands there.
    assert found | {"gen_accel.pipelines"} == set(settings["packages"])


def test_the_top_level_folders_are_not_packages():
    for folder in ("kernels", "pipelines", "eval"):
        assert not (ROOT / folder / "__init__.py").exists(), (
            f"{folder}/__init__.py would shadow an installed package {folder} for whoever works in "
            "the clone"
        )
