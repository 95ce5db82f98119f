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
from gen_accel.cli.bench.kernel_table import kernel_page
from gen_accel.cli.main import main
from gen_accel.eval.harness import Timing, append_rows, read_rows
from gen_accel.forecast import read_rates
from gen_accel.kernels import gather
from gen_accel.kernels.quant import PRECISIONS

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
    rows = read_rows(tmp_path / "r.jsonl")
    timed = {(row["config"]["part"], row["name"]) for row in rows if row["value"] is not None}
    assert ("dense", "gather") in timed and ("dense", "gather, all blocks listed") not in timed
    assert {part for part, _ in timed} == {"dense", "around"}
    wrong = [row for row in rows if row["value"] is None]
    assert len(wrong) == 1 + 2 * (3 + 1)
    assert all(r["config"]["wrong"].startswith("error ") and r["n"] == 0 for r in wrong)


def test_a_wrong_result_is_not_forgotten(tiny, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    words = ["--parts=dense,realistic", f"--table={page}"]
    assert bench(tmp_path, *words) == 0
    assert "WRONG" not in page.read_text()
    with monkeypatch.context() as patched:
        patched.setattr(gather, "run", lambda call: (torch.zeros_like(call.q), None))
        _age(tmp_path / "r.jsonl")
        assert bench(tmp_path, "--again", *words) == 1
    capsys.readouterr()
    assert bench(tmp_path, *words) == 1
    assert "tiny, dense: gather WRONG: error 1.0e+00" in capsys.readouterr().out
    # No earlier time stands in for it.
    assert "| dense | 1.000 | gather | WRONG: error 1.0e+00" in page.read_text()
    assert page.read_text().count("| gather") == page.read_text().count("WRONG")
    read_rates(read_rows(tmp_path / "r.jsonl"))


def test_each_device_has_its_table(tiny, tmp_path):
    assert bench(tmp_path, "--parts=dense") == 0
    rows = read_rows(tmp_path / "r.jsonl")
    both = [{**row, "device": "cuda: other"} for row in rows] + rows
    text = kernel_page(both)
    assert "## tiny, cuda: other" in text and text.count("\n| dense") == 2 * len(rows)
    assert "## tiny\n" in kernel_page(rows)


def test_again_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Piece, "measure", _measured)
    assert bench(tmp_path) == 0
    _age(tmp_path / "r.jsonl")
    ticks = iter([0.0, 0.0, *[1e9] * 99])  # the first piece alone is in time
    with monkeypatch.context() as patched:
        patched.setattr("gen_accel.cli.bench.kernel.time.monotonic", lambda: next(ticks))
        assert bench(tmp_path, "--again") == 0
    (tmp_path / "r.jsonl.again").write_text("2021-01-01T00:00:00+00:00\n")
    capsys.readouterr()
    assert bench(tmp_path, "--again") == 0
    said = capsys.readouterr().out
    assert "--again goes on with what began" in said
    assert "tiny, dense\n" not in said and "tiny, around\n" in said
    assert not (tmp_path / "r.jsonl.again").exists()


def _age(path):
    rows = [{**row, "time": "2020-01-01T00:00:00+00:00"} for row in read_rows(path)]
    path.unlink()
    append_rows(path, rows)


def _measured(piece, seconds):
    piece.errors = {c.name: 0.0 for c in piece.candidates}
    piece.timings = {c.name: Timing((1.0,)) for c in piece.candidates}


FAULTS = {
    "a key beyond the end counts": lambda k, v, b: (
        *(torch.cat([x, torch.zeros_like(x[:, :112])], 1) for x in (k, v)), b
    ),
    "the last key is missed": lambda k, v, b: (k[:, :-1], v[:, :-1], b),
    "the last block in each list is missed": lambda k, v, b: (k, v, _less(b)),
}  # fmt: skip


def _less(blocks):
    return replace(blocks, full_kv_num_blocks=(blocks.full_kv_num_blocks - 1).clamp_min(1))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("precision", ["", "int8", "int8+int8"])
def test_faults_with_keys_are_noticed(fault, precision):
    # As many tokens as a short clip has, of which the sample's rows alone are computed.
    case = Case("long", (4, 30, 52), 0, 4, dim=64, block=128)
    piece = Piece(replace(TINY, cases=(case,)), case, "dense", 3)
    sparse = piece.blocks("realistic", 0.2)
    options = {"precision": PRECISIONS[precision]} if precision else {}
    for blocks in (None, sparse):
        if fault.startswith("the last block") and blocks is None:
            continue
        if precision and "beyond" in fault:
            continue  # their mean is subtracted; see Piece.plant
        allowed = piece.lossy(precision, blocks, None) if precision else piece.allowed()
        assert allowed < (0.1 if precision else 0.02)
        k, v, spoiled = FAULTS[fault](piece.k, piece.v, blocks)
        if spoiled is not None and k.shape != piece.k.shape:
            spoiled = replace(spoiled, kv_len=k.shape[1])
        out = piece.sample.right(piece.q, k, v, spoiled, None, piece.scale, **options)
        assert piece._off(out, blocks) > allowed


def test_nan_anywhere_is_noticed(tiny, tmp_path, monkeypatch, capsys):
    right = gather.run

    def patchy(call):
        out, lse = right(call)
        sample = Piece(TINY, CASE, "dense", 0).sample
        for token in set(range(107)) - set(sample.tokens("cpu").tolist()):
            out[:, token] = torch.nan
        return out, lse

    monkeypatch.setattr(gather, "run", patchy)
    assert bench(tmp_path, "--parts=dense") == 1
    assert "WRONG: error nan" in capsys.readouterr().out


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
    ordering = [f"{name}, from the model's order" for name in names[:2]]
    assert [row["name"] for row in mine] == [*names, *names, *ordering]
    parts = [row["config"]["part"] for row in mine]
    assert parts == 3 * ["quantised dense"] + 5 * ["quantised 0.3"]
    assert all(1e-3 < row["config"]["error"] < 0.05 for row in mine if "int8" in row["name"])
    assert kernel_page(rows).count("int8+int8") == 5


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
    # Again: what others have stays, and what was made since it began is not made twice.
    old = "2020-01-01T00:00:00+00:00"
    other = {**entries[0], "key": {**entries[0]["key"], "capability": 100}}
    wide = {**entries[0]["config"], "together": True, "programs": 2}
    other = {**other, "config": wide, "time": old}
    out.write_text(configs.dump([other, *({**e, "time": old} for e in entries[:3]), entries[3]]))
    (tmp_path / "tuned.json.again").write_text("2021-01-01T00:00:00+00:00")
    assert main([*command, "--again"]) == 0
    found = configs.read(out)
    assert [found[0], found[1]] == [other, entries[3]]
    assert len(found) == 5 and all(e["time"] > old for e in found[2:])
    assert not (tmp_path / "tuned.json.again").exists()
    out.write_text(configs.dump([{**found[1], "wrong": {"64 64": "error 1"}}, *found[2:]]))
    assert main(command) == 1
    assert "64 64 WRONG: error 1" in capsys.readouterr().out
    capsys.readouterr()
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
