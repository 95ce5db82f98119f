import csv
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch

from gen_accel.cli.bench import e2e, e2e_steps
from gen_accel.cli.bench.e2e import Case, Suite, _tiny
from gen_accel.cli.bench.e2e_check import check
from gen_accel.cli.bench.e2e_page import e2e_tables, front
from gen_accel.cli.bench.e2e_rates import of_precision
from gen_accel.cli.main import main
from gen_accel.eval.energy import Energy
from gen_accel.eval.harness import append_rows, newest, read_rows
from gen_accel.forecast import ASSUMED, forecast
from gen_accel.kernels import gather
from gen_accel.published import MODELS
from helpers import tiny

WAN = Case("wan", _tiny(MODELS["wan2.1-1.3b"]), (64, 96, 17), rounds=2)


@pytest.fixture
def suite(monkeypatch):
    """A suite of one case, whatever is asked for."""

    def use(*cases):
        monkeypatch.setattr(e2e, "suites", lambda: {"tiny": Suite(cases)})

    use(WAN)
    return use


def bench(folder, *words):
    return main(["bench", "e2e", "--suite=tiny", f"--output={folder}", "--threads=1", *words])


def steps_of(folder):
    rows = read_rows(folder / "results.jsonl")
    return {r["name"]: r for r in rows if r["kind"] == "e2e" and r["value"] is not None}


def test_every_candidate_is_measured_and_all_pages_follow(suite, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before <!-- e2e:begin -->old<!-- e2e:end --> after")
    assert bench(tmp_path, f"--docs={page}") == 0
    rows = steps_of(tmp_path)
    assert list(rows) == ["stock", "ours", "paro", "spaattn", "gna", "sparse"]
    for name, row in rows.items():
        config = row["config"]
        assert row["n"] == 2 and row["value"] > 0 and row["shape"] == [1, 120, 2, 128]
        assert config["dense"] == (name in ("stock", "ours")) and config["error"] < 1e-5
        assert config["dense"] or config["error"] > 0
        assert config["precision"] == "float32"
        assert config["predicted_ms"] > 0 and config["baseline"] in ("stock", "ours")
        assert 0 < config["attention_share"] < 1
    assert rows["paro"]["config"]["density"] < 0.6 and rows["stock"]["config"]["density"] == 1
    assert rows["paro"]["config"]["calibration_ms"] > 0 == rows["gna"]["config"]["calibration_ms"]
    assert {"order", "plan", "tail", "kernel", "rest"} <= rows["sparse"]["config"][
        "parts_ms"
    ].keys()

    text = (tmp_path / "index.md").read_text()
    assert text.count("\n| ") == len(rows) + 1 and "(extrapolated)" in text
    assert text.split("# tiny\n\n")[1].strip() in page.read_text()
    assert page.read_text().startswith("before ") and page.read_text().endswith(" after")
    with (tmp_path / "results.csv").open() as file:
        listed = [row["name"] for row in csv.DictReader(file)]
    assert listed[:3] == ["linear", "attention", "memory"] and listed[5:] == list(rows)
    assert [name.split()[0] for name in listed[3:5]] == ["sparse", "windows"]
    assert ElementTree.parse(tmp_path / "roofline.svg").getroot().tag.endswith("svg")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert all(state.startswith("done") for state in manifest["pieces"].values())
    assert "roofline.svg" in manifest["files"] and manifest["commit"]
    assert "WRONG" not in capsys.readouterr().out


def test_a_run_is_extrapolated_from_its_kinds_of_steps(suite, tmp_path):
    whole = replace(WAN.whole, layers={"num_layers": 8}, steps=20)
    suite(replace(WAN, whole=whole, layers=2, methods=("paro",)))
    assert bench(tmp_path) == 0
    rows = steps_of(tmp_path)
    config = rows["paro"]["config"]
    assert (config["blocks"], config["of_blocks"], config["dense_steps"]) == (2, 8, 4)
    dense = rows[config["baseline"]]["value"]
    times = config["forwards"] * 8 / 2
    calibration = times * config["calibration_ms"]  # of both branches
    expected = times * (4 * dense + 16 * rows["paro"]["value"]) + calibration
    assert config["run_s"] == pytest.approx(expected / 1e3)
    assert config["run_x"] == pytest.approx(times * 20 * dense / expected)


def test_only_what_is_missing_is_measured(suite, tmp_path, monkeypatch, capsys):
    suite(replace(WAN, methods=("gna",)))
    assert bench(tmp_path, "--limit=0") == 0
    left = json.loads((tmp_path / "manifest.json").read_text())["pieces"]
    assert set(left.values()) == {"left"}
    assert bench(tmp_path, "--piece=0") == 0
    first = read_rows(tmp_path / "results.jsonl")
    assert {row["kind"] for row in first} == {"rate"}
    assert bench(tmp_path) == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert rows[: len(first)] == first and {row["kind"] for row in rows} == {"rate", "e2e"}
    monkeypatch.setattr(e2e, "_measure", None)  # fails if it is called
    assert bench(tmp_path) == 0
    assert read_rows(tmp_path / "results.jsonl") == rows
    (tmp_path / "results.jsonl").unlink()
    append_rows(tmp_path / "results.jsonl", [{**row, "device": "another"} for row in rows])
    capsys.readouterr()
    assert bench(tmp_path) == 1  # rows of another machine are not what is asked for
    assert capsys.readouterr().out.count("FAILED: TypeError") == 2
    states = json.loads((tmp_path / "manifest.json").read_text())["pieces"].values()
    assert all(state.startswith("failed: TypeError") for state in states)


def test_a_wrong_baseline_is_told_and_not_timed(suite, tmp_path, monkeypatch, capsys):
    right = e2e_steps.Run.forward

    def forward(run, step):
        return right(run, step) * (1.001 if hasattr(run.transformer, "_gen_accel") else 1)

    monkeypatch.setattr(e2e_steps.Run, "forward", forward)
    suite(replace(WAN, methods=("gna",)))
    assert bench(tmp_path) == 1
    assert "ours WRONG: error" in capsys.readouterr().out
    assert list(steps_of(tmp_path)) == ["stock", "gna"]


def test_a_wrong_sparse_call_is_told_and_kept(suite, tmp_path, monkeypatch, capsys):
    suite(replace(WAN, methods=("paro", "sparse")))
    assert bench(tmp_path) == 0
    old = "2020-01-01T00:00:00+00:00"
    rows = [{**row, "time": old} for row in read_rows(tmp_path / "results.jsonl")]
    (tmp_path / "results.jsonl").unlink()
    append_rows(tmp_path / "results.jsonl", rows)
    right = gather.run

    def zeros(call):
        out, lse = right(call)
        return (out if call.blocks is None or call.blocks.density() == 1 else 0 * out), lse

    with monkeypatch.context() as patched:
        patched.setattr(gather, "run", zeros)
        assert bench(tmp_path, "--again") == 1
    said = capsys.readouterr().out
    for name in ("paro", "sparse"):
        assert f"{name} WRONG: a call's error 1.0e+00, allowed " in said
    assert bench(tmp_path) == 1  # nothing is left to do, and it is still wrong
    assert "steps: paro WRONG: a call's error" in capsys.readouterr().out
    assert "| paro | WRONG: a call's error" in (tmp_path / "index.md").read_text()


@pytest.mark.parametrize("tail", ["drop", "rectified", "joint/4"])
@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_a_call_is_compared_in_its_order(tail, precision):
    from gen_accel.kernels.api import block_sparse_attention
    from gen_accel.kernels.blocks import Blocks
    from gen_accel.kernels.prepare import AxisPlaces
    from gen_accel.tail import TailSetting

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 107, 3, 16, generator=generator) for _ in range(3))
    mask = torch.rand(1, 3, 7, 7, generator=generator) < 0.4
    mask.diagonal(dim1=2, dim2=3).fill_(True)
    blocks = Blocks.from_mask(mask, q_len=107, kv_len=107, block_size=16)
    stand_in = TailSetting.parse(tail).make(q, k, v, blocks, pooled=96)
    places = None
    if tail == "drop":
        places = AxisPlaces.from_axes([(2, 1, 0), (0, 1, 2), (1, 2, 0)], (2, 7, 7))
    options = {"tail": stand_in, "places": places, "precision": precision}
    out = block_sparse_attention(q, k, v, blocks, **options)
    found = check(q, k, v, blocks, out, seed=1, impl="auto", **options)
    assert found.error <= found.allowed < (0.1 if precision == "int8" else 1e-4)
    spoiled = out.roll(1, dims=1)
    assert check(q, k, v, blocks, spoiled, seed=1, **options).error > 0.1


def test_each_device_has_its_table(suite, tmp_path):
    suite(replace(WAN, methods=()))
    assert bench(tmp_path) == 0
    rows = read_rows(tmp_path / "results.jsonl")
    text = e2e_tables(newest([{**row, "device": "cuda: other"} for row in rows] + rows))
    assert text.count("**wan**") == 2 and "cuda: other, torch" in text


def test_forecasts_take_the_rate_of_the_precision():
    rows = [{"name": name, "value": value} for name, value in
            (("attention", 1), ("sparse 0.2", 2), ("int8 0.2", 3), ("windows 0.2", 4))]  # fmt: skip
    assert of_precision(rows, "bfloat16") == rows
    found = {row["name"]: row["value"] for row in of_precision(rows, "int8")}
    assert found == {"attention": 1, "windows 0.2": 4, "sparse 0.2": 3}


def test_dense_backends_that_are_here_are_baselines(suite, tmp_path, monkeypatch, capsys):
    found = {"flash": "_native_flash", "FA3": "_flash_3"}
    monkeypatch.setitem(e2e_steps.BACKENDS, "cpu", found)
    suite(replace(WAN, methods=("paro",)))
    assert bench(tmp_path) == 0
    rows = steps_of(tmp_path)
    assert list(rows) == ["stock", "flash", "ours", "paro"]
    assert rows["flash"]["config"]["parts_ms"].keys() == {"dense", "rest"}
    assert rows["paro"]["config"]["absent"].keys() == {"FA3"}
    assert "FA3 was not measured" in capsys.readouterr().out


def test_compiled_blocks_are_candidates_of_their_own(suite, tmp_path, monkeypatch):
    compiled = torch.nn.Module.compile

    def eager(module, **options):
        compiled(module, **{**options, "backend": "eager"})

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    suite(replace(WAN, methods=("gna",), compiled=True))
    assert bench(tmp_path) == 0
    rows = steps_of(tmp_path)
    assert list(rows) == ["stock", "ours", "gna", "stock, compiled", "gna, compiled"]
    assert rows["gna, compiled"]["config"]["density"] == rows["gna"]["config"]["density"]


@pytest.mark.parametrize("name", ["hunyuan-video", "flux-dev", "cosmos-7b"])
def test_every_published_architecture_runs(suite, tmp_path, name):
    size = (128, 192, 1) if name == "flux-dev" else (64, 96, 17)
    suite(Case(name, _tiny(MODELS[name]), size, rounds=1, methods=("gna",)))
    assert bench(tmp_path) == 0
    assert list(steps_of(tmp_path)) == ["stock", "ours", "gna"]


def test_a_sweep_is_the_product_of_its_lists(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(e2e, "_measure", lambda case, *_: (seen.append(case), ([], {}))[1])
    sweep = tmp_path / "sizes.yaml"
    sweep.write_text(
        "model: wan2.1-1.3b\nheight: [480, 720]\nwidth: 832\nnum-frames: 81\n"
        "density: [0.2, 0.5]\nmethods: [dense, gna]\n"
    )
    words = ["bench", "e2e", f"--sweep={sweep}", f"--output={tmp_path / 'out'}"]
    assert main(words) == 0
    cases = seen[::2]  # rates, then steps of each
    assert [case.size for case in cases] == [(480, 832, 81), (720, 832, 81)]
    assert all(case.methods == ("gna",) and case.densities == (0.2, 0.5) for case in cases)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["suite"] == "sizes"


def test_a_checkpoint_renders_whole_clips(tmp_path, capsys):
    tiny.tiny_wan()[0].save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    words = ["bench", "e2e", f"--weights={tmp_path / 'model'}", f"--output={tmp_path / 'out'}"]
    words += ["--height=64", "--width=96", "--num-frames=17", f"--prompt-file={prompts}"]
    assert main([*words, "--methods=sparse", "--density=0.3"]) == 0
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    assert [row["name"] for row in rows] == ["dense", "sparse@0.3"]
    assert rows[1]["config"]["scores"].keys() == {"psnr", "ssim", "flicker"}
    assert rows[1]["config"]["density"] < 1 and rows[1]["n"] == 2
    assert ElementTree.parse(tmp_path / "out" / "pareto.svg").getroot().tag.endswith("svg")
    assert "| sparse@0.3 |" in (tmp_path / "out" / "index.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite=h20"], "did you mean h200?"),
        (["--suite=h200"], "torch sees no GPU"),
        (["--model=wan"], "choose from hunyuan-video"),
        (["--height=721"], "takes multiples of 16"),
        (["--methods=para"], "did you mean paro?"),
        (["--methods=none"], "dense is measured anyway"),
        (["--sweep=/nowhere.yaml"], "cannot be read"),
        (["--dtype=int4"], "use float32, bfloat16 or float16"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, tmp_path, words, message):
    assert main(["bench", "e2e", f"--output={tmp_path}", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()


def test_the_front_holds_what_nothing_beats():
    points = [(1.0, 99.0), (2.0, 30.0), (1.5, 25.0), (3.0, 20.0), (3.0, 10.0)]
    assert front(points) == [(1.0, 99.0), (2.0, 30.0), (3.0, 20.0)]


def test_energy_is_read_or_absent(tmp_path, monkeypatch):
    from gen_accel.eval import energy

    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    with Energy() as spent:
        pass
    assert spent.joules is None
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    counter.write_text("1000000\n")
    with Energy() as spent:
        counter.write_text("3500000\n")
    assert spent.joules == pytest.approx(2.5)


def test_every_piece_for_the_gpu_fits_into_nine_minutes():
    """By the forecast: dense candidates and calibration, methods at two densities, all rounds."""
    suite = e2e.suites()["h200"]
    assert {case.whole.name for case in suite.cases} == set(MODELS) - {"wan-narrow"}
    total = 0.0
    for case in suite.cases:
        found = forecast(case.model, case.grid, 0.2, ASSUMED["h200"])
        dense = 6 * (3 + case.rounds) + 2 * len(case.densities)
        sparse = len(case.methods) * len(case.densities) * (2 + case.rounds)
        seconds = dense * found.dense_forward + sparse * found.sparse_forward
        assert suite.limit + seconds < 600, case.name
        total += seconds
    assert total < 25 * 60
