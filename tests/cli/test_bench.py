import pytest
import torch

from gen_accel.cli import bench
from gen_accel.cli.bench import attention, masks
from gen_accel.cli.main import main
from gen_accel.eval.harness import read_rows
from gen_accel.kernels import flex, gather
from gen_accel.layout import TokenGrid

SMALL = ["bench", "attention", "--tokens=250", "--heads=3", "--head-dims=16", "--dtypes=fp32,bf16"]
SMALL += ["--densities=0.5", "--block=32", "--repeats=2"]


@pytest.fixture(autouse=True)
def no_flex(monkeypatch):
    """Its compilation would take longer than all of these tests."""
    monkeypatch.setattr(flex, "missing", lambda: "no compiler; install one")


def test_table_and_rows(capsys, tmp_path):
    path = tmp_path / "results.jsonl"
    assert main([*SMALL, f"--out={path}"]) == 0
    table = capsys.readouterr().out
    assert "250 tokens, 3 heads, head_dim 16, bf16" in table and "WRONG" not in table
    assert "FlexAttention was not measured: no compiler; install one" in table

    rows = read_rows(path)
    times = [row for row in rows if row["unit"] == "ms"]
    names = {(row["name"], row["config"]["mask"], row["config"]["dtype"]) for row in times}
    assert len(names) == len(times) == 2 * (4 + 2 * 2)
    assert ("whole call", "calibrated 0.5", "bf16") in names and ("SDPA", "dense", "fp32") in names
    assert all(row["value"] > 0 and row["spread"][0] <= row["spread"][1] for row in times)
    assert all(row["shape"] == [1, 250, 3, 16] and row["n"] == 2 for row in rows)
    assert {row["config"]["over"] for row in rows if row["unit"] == "x"} <= {
        "SDPA",
        "fastest dense",
    }


def test_a_wrong_result_has_no_time(capsys, tmp_path, monkeypatch):
    right = gather.run

    def wrong(call):
        out, lse = right(call)
        return (out if call.blocks is None else out + 1e-3), lse

    monkeypatch.setattr(gather, "run", wrong)
    path = tmp_path / "results.jsonl"
    assert main([*SMALL, f"--out={path}"]) == 1
    assert "WRONG: error" in capsys.readouterr().out
    fp32 = {row["name"] for row in read_rows(path) if row["config"]["dtype"] == "fp32"}
    assert "SDPA" in fp32 and not fp32 & {"kernel", "whole call"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tokens=0", "'0' must be a positive whole number"),
        ("--dtypes=fp32,int8", "'int8' must be one of fp32, bf16, fp16"),
        ("--densities=1.5", r"'1.5' must be a share in (0, 1]"),
        ("--densities=some", r"'some' must be a share in (0, 1]"),
        ("--device=cuda", "torch sees no GPU"),
        ("--out=/proc/none/results.jsonl", "cannot write to /proc/none"),
    ],
)
def test_bad_options(option, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*SMALL, option]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_threads_are_put_back(capsys):
    before = torch.get_num_threads()
    main([*SMALL, "--threads=2", "--dtypes=fp32"])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5, 1.0])
def test_masks_have_the_density(density):
    generator = torch.Generator().manual_seed(0)
    uniform = masks.uniform_mask(4, 64, density, generator)
    calibrated = masks.calibrated_mask(4, 64, density, generator)
    for mask in (uniform, calibrated):
        assert mask.shape == (1, 4, 64, 64)
        assert float(mask.float().mean()) == pytest.approx(density, abs=1e-3)
        assert mask.any(-1).all()
    assert len(uniform.sum(-1).unique()) == 1
    if density < 1:
        heads = calibrated.float().mean((0, 2, 3))
        assert heads.max() > 2 * heads.min()
        assert len(calibrated.sum(-1).unique()) > 20


@pytest.mark.parametrize("tokens", [1, 7, 250, 8192, 17550])
def test_grids_hold_all_tokens(tokens):
    assert attention.cubic_grid(tokens).numel == tokens


def test_the_grid_is_cubic_where_it_can_be():
    assert attention.cubic_grid(8192) == TokenGrid(16, 16, 32)


def test_without_a_name_it_is_attention(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "run", lambda args: asked.append(args) or 0)
    assert main(["bench"]) == 0
    (args,) = asked
    assert args.what == "attention" and args.head_dims == (64, 128) and args.tokens == 8192


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_each_has_help_and_options_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", name, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert f"bench {name}``" in text and "--out FILE" in text and "None" not in text
    assert ("--expressions" in text) == (name == "ground")
    assert main(["bench", name, "--denisty=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gen-accel: error: unknown option --denisty; ")
    assert ("did you mean --density?" in error) == ("--density" in text)


def test_unknown_names(capsys):
    assert main(["bench", "attentoin"]) == 2
    error = capsys.readouterr().err
    assert "attentoin" in error and len(error.strip().splitlines()) == 1
