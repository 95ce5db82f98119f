import pytest
import torch

from gen_accel.capture import Captured, capture
from gen_accel.cli.bench import mixtures, tails
from gen_accel.cli.main import main
from gen_accel.eval.harness import read_rows
from gen_accel.kernels import flex
from gen_accel.layout import ForwardContext, TokenGrid, TokenLayout
from helpers import tiny

LAYOUT = TokenLayout(TokenGrid(3, 8, 8), 0, 5)


def calls(seed, number=4):
    """Attention that looks at near tokens, as trained models do."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.cartesian_prod(*(torch.arange(n) / n for n in LAYOUT.grid))
    wave = torch.cat([torch.cos(6 * place), torch.sin(6 * place)], 1).repeat(1, 2)
    made = []
    for n in range(number):
        q, k, v = torch.randn(3, 1, LAYOUT.tokens, 2, 12, generator=generator)
        for x in (q, k):
            x[:, : LAYOUT.grid.numel] *= 0.5
            x[:, : LAYOUT.grid.numel] += 3 * wave[:, None]
        context = ForwardContext(LAYOUT, step=n, steps=number)
        made.append(Captured(n % 2, context, LAYOUT, q, k, v))
    return made


def test_tables_rank_what_can_be_ranked():
    bench = tails.TailBench(calls(0), calls(1), "hunyuan-video")
    found = {row["name"]: row for row in bench.selections((0.25,))}
    assert set(found) == set(bench.planners())
    assert all(0 < row["value"] < 1 for row in found.values())
    for name in ("raster+pooled", "curve+pooled", "curve+sub-blocks"):
        assert found[name]["config"]["kept"] == pytest.approx(0.25)
        assert 0.9 * found[name]["config"]["best"] < found[name]["value"]
        assert found[name]["value"] <= found[name]["config"]["best"] + 1e-5
    rows = bench.tails((0.5, 0.2))
    error = {(r["name"], r["config"]["tail"], r["config"]["density"]): r["value"] for r in rows}
    assert len(error) == len(found) * len(tails.TAILS) * 2
    for name in found:
        assert error[name, "joint", 0.2] < error[name, "drop", 0.2]
        assert error[name, "drop", 0.5] < error[name, "drop", 0.2]
    text = tails.table(rows[:14], "name", "tail", "title")
    assert text.splitlines()[0].startswith("| title | drop | rectified |")


def test_all_kept_has_no_error():
    bench = tails.TailBench(calls(0, 2), calls(1, 2), "hunyuan-video")
    for row in bench.tails((1.0,)):
        assert row["value"] < 1e-5 and row["config"]["kept"] == 1.0, row["name"]


def test_captured_calls_have_no_padding():
    pipe, call = tiny.tiny_hunyuan()
    call.pop("generator", None)
    prompt = call.pop("prompt")
    seen = capture(pipe, [prompt] if isinstance(prompt, str) else prompt[:1], steps=(1,), **call)
    assert seen and {c.context.step for c in seen} == {1}
    for c in seen:
        assert c.q.shape == c.k.shape == c.v.shape and c.q.shape[1] == c.layout.tokens
    layers = 1 + max(c.layer for c in seen)
    assert len(seen) == layers


def test_bench_pooled(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(flex, "missing", lambda: "no compiler; install one")
    path = tmp_path / "rows.jsonl"
    small = ["--tokens=512", "--heads=2", "--head-dims=16", "--densities=0.25", "--block=32"]
    assert main(["bench", "pooled", *small, "--repeats=2", f"--out={path}"]) == 0
    table = capsys.readouterr().out
    assert "WRONG" not in table and "selection alone" in table
    masks = {row["config"]["mask"] for row in read_rows(path)}
    assert "0.25, block means, joint" in masks and "0.25, 4x4 sub-blocks, drop" in masks


def test_bench_mixtures(capsys, tmp_path, monkeypatch):
    pipe, call = tiny.tiny_hunyuan()
    call = {k: v for k, v in call.items() if k not in ("prompt", "generator", "output_type")}
    monkeypatch.setattr("gen_accel.eval.toys.load_toy", lambda *_: pipe)
    monkeypatch.setattr("gen_accel.eval.toys.toy_call", lambda _: call)
    monkeypatch.setattr(mixtures, "MIXTURES", (("curve", "pooled"), ("axis", "static")))
    monkeypatch.setattr(mixtures, "TAILS", ("drop", "joint"))
    monkeypatch.setattr(mixtures, "STEPS", 5)
    path = tmp_path / "rows.jsonl"
    words = ["bench", "mixtures", "--prompts=2", "--densities=0.3", f"--out={path}"]
    assert main(words) == 0
    assert "density 0.3: PSNR to dense" in capsys.readouterr().out
    rows = read_rows(path)
    assert [(r["name"], r["config"]["tail"]) for r in rows] == [
        (name, tail) for name in ("curve+pooled", "axis+static") for tail in ("drop", "joint")
    ]
    assert all(r["n"] == 2 and r["spread"][0] <= r["value"] <= r["spread"][1] for r in rows)


def test_the_plot_is_a_file(tmp_path):
    bench = tails.TailBench(calls(0, 2), calls(1, 2), "hunyuan-video")
    tails.plot(bench.tails((0.5, 0.3)), tmp_path / "tails.svg")
    assert (tmp_path / "tails.svg").read_text().startswith("<?xml")


def test_bench_tails(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tails, "_calls", lambda args: (calls(0, 2), calls(1, 2)))
    monkeypatch.setattr(tails, "DENSITIES", (0.3,))
    rows, page, picture = (tmp_path / name for name in ("rows.jsonl", "page.md", "plot.svg"))
    where = [f"--out={rows}", f"--table={page}", f"--plot={picture}"]
    assert main(["bench", "tails", *where]) == 0
    assert page.read_text() in capsys.readouterr().out + "\n" and picture.exists()
    assert {row["kind"] for row in read_rows(rows)} == {"selection", "tail"}
