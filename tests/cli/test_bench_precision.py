import pytest
import torch

from gen_accel.capture import Captured
from gen_accel.cli.bench import mixtures, precision
from gen_accel.cli.main import main
from gen_accel.eval.harness import read_rows
from gen_accel.kernels.quant import PRECISIONS
from gen_accel.layout import ForwardContext, TokenGrid, TokenLayout
from helpers import tiny

LAYOUT = TokenLayout(TokenGrid(4, 8, 8), 0, 5)


def calls(seed, number=2):
    """Attention along one axis, values that vary along it: what an order brings together."""
    generator = torch.Generator().manual_seed(seed)
    frame, row, column = torch.cartesian_prod(*(torch.arange(n) for n in LAYOUT.grid)).unbind(1)
    directions = torch.randn(64, 16, generator=generator)
    made = []
    for n in range(number):
        q, k, v = torch.randn(3, 1, LAYOUT.tokens, 2, 16, generator=generator)
        alike = directions[row * 8 + column]  # one place in all frames
        for x, loud in ((q, 1.0), (k, 1.0), (v, 3.0)):
            x[0, : LAYOUT.grid.numel] = loud * alike[:, None] + 0.3 * x[0, : LAYOUT.grid.numel]
        context = ForwardContext(LAYOUT, step=n, steps=number)
        made.append(Captured(n % 2, context, LAYOUT, q, k, v))
    return made


def test_order_and_groups_matter_for_rounded_weights():
    bench = precision.PrecisionBench(calls(0), calls(0), "hunyuan-video")
    found = {(r["name"], r["config"]["order"]): r["value"] for r in bench.weights()}
    assert found["incoherence", "axis"] < 0.9 * found["incoherence", "raster"]
    for bits in ("int8", "int4"):
        assert found[f"{bits}, block", "axis"] < found[f"{bits}, block", "raster"]
        for order in ("raster", "axis", "curve"):
            assert found[f"{bits}, tile", order] < found[f"{bits}, block", order]


def test_errors_of_outliers():
    bench = precision.PrecisionBench(calls(0), calls(1), "hunyuan-video")
    rows = bench.errors()
    error = {(r["name"], r["config"]["data"]): r["value"] for r in rows}
    assert {name for name, _ in error} == set(PRECISIONS)
    assert all(r["value"] <= r["config"]["worst"] for r in rows)
    for name in PRECISIONS:
        outlier = error[name, "K channel + 50 sd"]
        assert outlier == pytest.approx(error[name, "as captured"], rel=0.05)


def test_bench_precision(capsys, tmp_path, monkeypatch):
    pipe, call = tiny.tiny_hunyuan()
    call = {k: v for k, v in call.items() if k not in ("prompt", "generator", "output_type")}
    call["num_frames"] = 5  # decoding is what takes the time
    monkeypatch.setattr("gen_accel.eval.toys.load_toy", lambda *_: pipe)
    monkeypatch.setattr("gen_accel.eval.toys.toy_call", lambda _: call)
    monkeypatch.setattr(precision, "_calls", lambda args: (calls(0), calls(1)))
    monkeypatch.setattr(precision, "STEPS", 2)
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    assert main(["bench", "precision", "--prompts=1", f"--out={rows}", f"--table={page}"]) == 0
    assert page.read_text() in capsys.readouterr().out + "\n"
    clips = [row for row in read_rows(rows) if row["kind"] == "clip"]
    assert len(clips) == 2 * (1 + len(PRECISIONS)) and mixtures.STEPS == 12
    psnr = {(r["name"], r["config"]["attention"]): r["value"] for r in clips}
    assert psnr["fp32", "all blocks"] > psnr["int8", "all blocks"] > psnr["int4", "all blocks"]
