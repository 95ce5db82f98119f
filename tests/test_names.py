import subprocess
import sys

import pytest

import gen_accel


@pytest.mark.parametrize("name", gen_accel.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(gen_accel, name).__doc__
    assert name in dir(gen_accel)


def test_there_are_few_public_names():
    assert len(gen_accel.__all__) < 15


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'ParoProcesor'"):
        _ = gen_accel.ParoProcesor


def test_the_import_is_light():
    code = "import gen_accel, sys; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_names_are_not_hidden_by_modules():
    code = "import gen_accel.calibration; from gen_accel import calibrate; calibrate([])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "missing 1 required positional argument" in out.stderr
