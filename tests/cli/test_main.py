import json
import os
import subprocess
import sys

import pytest
import torch

from gen_accel.cli import main as cli
from gen_accel.cli.main import main


def run(capsys, *words):
    code = main(list(words))
    output = capsys.readouterr()
    return code, output.out, output.err


def test_help_is_instant_and_lists_the_commands():
    code = (
        "import sys; from gen_accel.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        "assert 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("demo", "generate", "calibrate", "doctor"):
        assert name in done.stdout


def test_module_form_and_exit_codes():
    command = [sys.executable, "-m", "gen_accel"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("gen-accel ")
    done = subprocess.run([*command, "genrate"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "gen-accel: error: unknown command 'genrate'; did you mean generate?\n"


def test_without_a_command_it_shows_the_help(capsys):
    code, out, _ = run(capsys)
    assert code == 0 and "COMMAND" in out


@pytest.mark.parametrize("command", ["demo", "doctor", "generate", "calibrate"])
def test_unknown_options_are_one_line(capsys, command):
    code, out, err = run(capsys, command, "--jsno")
    assert code == 2 and out == ""
    assert err.startswith("gen-accel: error: unknown option --jsno; ") and err.count("\n") == 1


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="--model is missing"):
        main(["--debug", "generate", "--prompt", "x"])


def test_a_bug_is_not_dressed_up_as_a_user_error(monkeypatch):
    from gen_accel.cli import doctor

    def broken(args):
        raise TypeError("a bug")

    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(TypeError, match="a bug"):
        main(["doctor"])


def test_a_command_whose_import_fails_is_not_hidden(monkeypatch, tmp_path):
    (tmp_path / "broken_command.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        cli._import("broken_command")
    assert cli._import("no_such_command") is None


def test_doctor_tells_where_quantised_calls_run(capsys):
    facts = json.loads(run(capsys, "doctor", "--json")[1])["precisions"]
    assert set(facts) == {"int8", "int8+fp8", "int8+int8", "int4", "int4+int4"}
    if not torch.cuda.is_available():
        assert set(facts.values()) == {"gather, emulated: accuracy only, no speed"}


def test_doctor_as_text(capsys):
    code, out, err = run(capsys, "doctor")
    assert code == 0 and err == ""
    for word in (
        "python",
        "torch",
        "triton",
        "diffusers",
        "transformers",
        "ffmpeg",
        "cpu",
        "gather",
    ):
        assert word in out
    assert "gather" in out and "available" in out


def test_doctor_as_json(capsys):
    import diffusers
    import torch

    from gen_accel.kernels.api import available

    code, out, _ = run(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["packages"]["diffusers"] == diffusers.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["devices"][0].startswith(f"cpu: {os.cpu_count()} cores")
    assert set(facts["carriers"]) == set(available())
    for name, reason in available().items():
        assert facts["carriers"][name] == (reason or "available")


def test_a_setting_given_as_an_option_is_told_how_to_write_it(capsys):
    code, _, err = run(capsys, "generate", "--density", "0.3")
    assert code == 2
    assert err == "gen-accel: error: unknown option --density; write processor.density=VALUE\n"
