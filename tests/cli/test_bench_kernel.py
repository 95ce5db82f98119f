import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch

from gen_accel.cli.bench import kernel_pieces, tune
from gen_accel.cli.bench.kernel import SUITES, Case, Suite
from gen_accel.cli.bench.kernel_pieces import Piece, _poisoned, relative
from gen_accel.cli.main import main
from gen_accel.eval.harness import append_rows, read_rows
from gen_accel.kernels import gather

# A ragged end, text that shares a block with the video, three rounds.
CASE = Case("tiny", (2, 7, 7), 9, 3, dim=16, block=16)
TINY = Suite((CASE,), "cpu", ("gather",), flex=False, densities=(0.3, 0.5), repeats=3)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SUITES, "tiny", TINY)


def bench(folder, *options):
    return main(["bench", "kernel", "--suite=tiny", f"--out={folder / 'r.jsonl'}", *options])


def test_the_suite_is_that_of_the_issue():
    cases = {c.name: (c.tokens, c.text, c.heads, c.dim) for c in SUITES["hopper"].cases}
    assert cases == {
        "Wan-14B 720p": (75_600, 0, 40, 128),
        "HunyuanVideo 720p": (118_800 + 256, 256, 24, 128),
        "FLUX-4K": (65_536 + 512, 512, 24, 128),
        "Cosmos-7B": (56_320, 0, 32, 128),
        "Wan-1.3B 480p": (32_760, 0, 12, 128),
    }
    assert SUITES["hopper"].repeats == 20


def test_rows_page_and_plot(tiny, tmp_path, capsys):
    page, plot = tmp_path / "page.md", tmp_path / "plot.svg"
    assert bench(tmp_path, f"--table={page}", f"--plot={plot}") == 0
    assert "WRONG" not in capsys.readouterr().out
    rows = read_rows(tmp_path / "r.jsonl")
    assert len(rows) == 3 + 9 + 2 * (3 + 1)
    assert all(row["n"] == 3 and row["value"] > 0 for row in rows)
    assert all(row["shape"] == [1, 107, 3, 16] for row in rows)
    parts = list(dict.fromkeys(row["config"]["part"] for row in rows))
    assert parts[:4] == ["dense", "realistic 0.3", "realistic 0.5", "around"]
    text = page.read_text()
    assert text.count("\n| ") == len(rows) + 1 and "gather, joint tail" in text
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_what_is_in_the_file_is_not_measured_again(tiny, tmp_path, monkeypatch, capsys):
    assert bench(tmp_path) == 0
    first = read_rows(tmp_path / "r.jsonl")
    assert bench(tmp_path) == 0
    assert read_rows(tmp_path / "r.jsonl") == first
    # A piece that is missing, and rows of another machine.
    (tmp_path / "r.jsonl").unlink()
    kept = [row for row in first if row["config"]["part"] != "around"]
    append_rows(tmp_path / "r.jsonl", kept[:3] + [{**row, "device": "other"} for row in kept[3:]])
    capsys.readouterr()
    assert bench(tmp_path) == 0
    out = capsys.readouterr().out
    assert "tiny, around" in out and "tiny, uniform 0.5" in out and "tiny, dense" not in out
    assert bench(tmp_path, "--again") == 0
    assert "tiny, dense" in capsys.readouterr().out


def test_when_time_is_up_the_rest_is_named(tiny, tmp_path, capsys):
    assert bench(tmp_path, "--limit=0") == 0
    assert capsys.readouterr().out.count("not measured, time was up: tiny, ") == 6
    assert not (tmp_path / "r.jsonl").exists()


def test_a_wrong_result_has_no_time(tiny, tmp_path, monkeypatch, capsys):
    right = gather.run

    def wrong(call):
        out, lse = right(call)
        if call.blocks is not None:
            out = out.clone()
            out[:, 0] += 1
        return out, lse

    monkeypatch.setattr(gather, "run", wrong)
    assert bench(tmp_path) == 1
    assert "WRONG: error" in capsys.readouterr().out
    names = {row["name"] for row in read_rows(tmp_path / "r.jsonl")}
    assert "gather" in names and "gather, all blocks listed" not in names
    parts = {row["config"]["part"] for row in read_rows(tmp_path / "r.jsonl")}
    assert parts == {"dense", "around"}


def test_memory_nobody_wrote_is_noticed(tiny, tmp_path, monkeypatch, capsys):
    def forgetful(call):
        return torch.empty_like(call.q), None

    monkeypatch.setattr(gather, "run", forgetful)
    assert bench(tmp_path) == 1
    assert "WRONG: error nan" in capsys.readouterr().out


def test_a_fault_of_ours_is_not_an_absence(tiny, tmp_path, monkeypatch, capsys):
    def broken(call):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(gather, "run", broken)
    assert bench(tmp_path) == 1
    assert "WRONG: RuntimeError: illegal memory access" in capsys.readouterr().out


def test_a_piece_that_breaks_does_not_end_the_run(tiny, tmp_path, monkeypatch, capsys):
    build = Piece.build

    def scarce(piece):
        if piece.part == "realistic 0.3":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(piece)

    monkeypatch.setattr(Piece, "build", scarce)
    page = tmp_path / "page.md"
    assert bench(tmp_path, f"--table={page}") == 1
    said = capsys.readouterr().out
    assert "tiny, realistic 0.3\n  FAILED: OutOfMemoryError: CUDA out of memory" in said
    parts = {row["config"]["part"] for row in read_rows(tmp_path / "r.jsonl")}
    assert parts == {"dense", "around", "realistic 0.5", "uniform 0.3", "uniform 0.5"}
    assert page.exists()


def test_some_parts_alone(tiny, tmp_path, capsys):
    assert bench(tmp_path, "--parts=dense,uniform") == 0
    parts = {row["config"]["part"] for row in read_rows(tmp_path / "r.jsonl")}
    assert parts == {"dense", "uniform 0.3", "uniform 0.5"}
    assert main(["bench", "kernel", "--suite=tiny", "--parts=sparse"]) == 2
    assert "'sparse' must be one of dense, realistic" in capsys.readouterr().err


def test_what_is_not_installed_is_said(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gather, "missing", lambda: "nothing gathers here")
    assert bench(tmp_path) == 0
    assert (
        "not measured: ValueError: impl='gather': nothing gathers here" in capsys.readouterr().out
    )


@pytest.mark.parametrize("tail", [None, "joint", "rectified"])
def test_the_sample_is_the_definition(tail):
    from gen_accel.kernels import reference

    piece = Piece(TINY, CASE, "dense", 1)
    blocks = piece.blocks("realistic", 0.3)
    stand_in = piece.tail(tail, blocks)
    tensors = [x.double() for x in (piece.q, piece.k, piece.v)]
    right = reference.attention(*tensors, blocks, piece.scale, stand_in)[0]
    assert piece.error(blocks, stand_in, right) < 1e-7
    assert piece.sample.blocks[0] == 0 and piece.sample.blocks[-1] == 6
    spoiled = right.clone()
    spoiled[0, 106, 2, 0] += 0.1  # the last token of the last head
    assert piece.error(blocks, stand_in, spoiled) > 1e-3


def test_text_is_seen_by_all_and_sees_all():
    blocks = Piece(TINY, CASE, "dense", 1).blocks("uniform", 0.3)
    mask = blocks.mask()
    assert mask[..., 6:].all() and mask[..., 6:, :].all()  # tokens 96.. : two of video, text
    assert (mask[..., :6, :6].sum(-1) == 2).all()


def test_work_is_counted_in_pairs_of_tokens():
    piece = Piece(TINY, CASE, "dense", 1)
    assert piece.tflop(None) == pytest.approx(4e-12 * 16 * 3 * 107**2)
    mask = piece.blocks("uniform", 0.3).mask()
    elements = mask.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :107, :107]
    assert piece.tflop(piece.blocks("uniform", 0.3)) == pytest.approx(piece.tflop(None), rel=0.9)
    from gen_accel.kernels.blocks import Blocks

    blocks = Blocks.from_mask(mask, q_len=107, kv_len=107, block_size=16)
    assert piece.tflop(blocks) == pytest.approx(4e-12 * 16 * float(elements.sum()))


def test_poison():
    with _poisoned():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_relative_error_of_nan_is_nan():
    assert not relative(torch.tensor([torch.nan]), torch.ones(1)) <= 1


def test_smoke_runs_the_triton_kernel(tmp_path, capsys):
    pytest.importorskip("triton")
    out = tmp_path / "r.jsonl"
    assert main(["bench", "kernel", "--suite=smoke", f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert "not measured" not in said and "WRONG" not in said
    rows = read_rows(out)
    assert "triton, joint tail" in {row["name"] for row in rows}
    mine = [row for row in rows if row["config"]["part"].startswith("quantised")]
    names = ["triton", "triton, int8+int8", "triton, int8+int8, codes given"]
    assert [row["name"] for row in mine] == 2 * names
    assert [row["config"]["part"] for row in mine[::3]] == ["quantised dense", "quantised 0.3"]
    assert all(1e-3 < row["config"]["error"] < 0.05 for row in mine if "int8" in row["name"])
    from gen_accel.cli.bench.kernel_table import kernel_page

    assert kernel_page(rows).count("int8+int8") == 4


def test_torch_is_all_it_needs(tmp_path):
    """Neither diffusers nor anything else of our dependencies is imported."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Block())
from gen_accel.cli.bench import kernel
from gen_accel.cli.main import main
suite, case = kernel.SUITES["smoke"], kernel.Case("tiny", (2, 7, 7), 9, 2, 16, 16)
from dataclasses import replace
changes = {"cases": (case,), "impls": ("gather",), "precisions": ()}
kernel.SUITES["smoke"] = replace(suite, **changes)
sys.exit(main(["bench", "kernel", "--suite=smoke", "--out=" + sys.argv[2]]))
"""
    blocked = "diffusers,transformers,accelerate,safetensors,yaml,imageio,cv2,PIL"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, blocked, str(tmp_path / "r.jsonl")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "not measured" not in run.stdout, run.stdout
    assert len(read_rows(tmp_path / "r.jsonl")) == 3 + 9 + 3 + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_errors(capsys):
    assert main(["bench", "kernel"]) == 2
    assert "--suite hopper: torch sees no GPU; use --suite smoke" in capsys.readouterr().err
    assert main(["bench", "kernel", "--suite=ampere"]) == 2
    assert "it must be one of hopper, smoke" in capsys.readouterr().err
    assert main(["bench", "tune", "--suite=smoke"]) == 2
    assert "times of a CPU must not ship" in capsys.readouterr().err


def test_tune_writes_the_fastest(tmp_path, monkeypatch, capsys):
    configs = pytest.importorskip("gen_accel.kernels.triton.config")
    suite = tune.SUITES["smoke"]
    case = replace(suite.cases[0], grid=(1, 4, 9))
    monkeypatch.setitem(tune.SUITES, "smoke", replace(suite, cases=(case,), precisions=("int8",)))
    monkeypatch.setattr(configs, "DENSITIES", (1.0,))
    out = tmp_path / "tuned.json"
    command = ["bench", "tune", "--suite=smoke", "--block=16", "--head-dims=16", f"--out={out}"]
    assert main(command) == 0
    entries = configs.read(out)
    assert [e["key"]["tail"] for e in entries] == [False, True, False, True]
    assert [e["key"]["precision"] for e in entries] == ["", "", "int8", "int8"]
    for found in entries:
        key = configs.Key(**{**found["key"], "block": tuple(found["key"]["block"])})
        assert configs.Config(**found["config"]) in configs.candidates(key)
        assert found["ms"] > 0 and found["device"].startswith("cpu")
    assert out.read_text() == configs.dump(entries) and json.loads(out.read_text()) == entries
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out == f"{out}: 4 entries\n"
    out.unlink()
    assert main([*command, "--limit=0"]) == 0
    assert capsys.readouterr().out.endswith("time was up: 4; run the command again\n")
    assert not out.exists()


def test_rounds_fit_the_time_of_a_piece(monkeypatch):
    piece = Piece(replace(TINY, repeats=20), CASE, "dense", 1)
    seen = []

    def measure(fns, repeats, warmup, device):
        seen.append(repeats)
        return {}

    monkeypatch.setattr("gen_accel.eval.harness.measure", measure)
    with torch.no_grad():
        piece.measure(1e9)
        piece.measure(0.0)
    assert seen == [1, 20, 1, kernel_pieces._FEWEST]
