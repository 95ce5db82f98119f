import json
import subprocess

import pytest
import torch

from gen_accel.eval import harness
from gen_accel.eval.harness import Timing, append_rows, measure, read_rows, result_row


def test_measure_runs_everything_in_every_round():
    calls = []
    timings = measure({n: lambda n=n: calls.append(n) for n in "abc"}, repeats=4, warmup=1)
    assert set(timings) == set("abc")
    assert all(len(t.seconds) == 4 and min(t.seconds) > 0 for t in timings.values())
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 15, 3)]
    assert rounds == ["cab", "abc", "bca", "cab", "abc"]


def test_measure_times_each_function_by_itself(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def work(seconds):
        def run():
            now[0] += seconds

        return run

    timings = measure({"slow": work(3.0), "fast": work(1.0)}, repeats=5, warmup=2)
    assert timings["slow"].seconds == (3.0,) * 5
    assert timings["fast"].speedup_over(timings["slow"]) == 3.0


@pytest.mark.parametrize(("fns", "repeats"), [({}, 3), ({"a": print}, 0)])
def test_nothing_to_measure(fns, repeats):
    with pytest.raises(ValueError, match="at least one of each"):
        measure(fns, repeats)


def test_timing():
    timing = Timing((4.0, 1.0, 3.0, 2.0, 10.0))
    assert timing.median == 3.0
    assert timing.spread == (2.0, 4.0)
    assert [timing.quantile(q) for q in (0, 0.125, 1)] == [1.0, 1.5, 10.0]
    assert Timing((2.0,)).spread == (2.0, 2.0)


def test_speedup_is_paired():
    # A load on the machine doubles both times of some rounds.
    assert Timing((1.0, 2.0, 1.0)).speedup_over(Timing((4.0, 8.0, 4.0))) == 4.0


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    rows = [
        result_row(
            "attention",
            "whole call",
            12.5,
            "ms",
            n=9,
            spread=(12.0, 13.0),
            config={"density": 0.25},
            shape=torch.Size([1, 8, 2, 4]),
            seed=0,
        ),
        result_row("quality", "psnr", 30, "dB", model="toy"),
    ]
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    assert read_rows(path) == rows
    assert len(path.read_text().splitlines()) == 2
    assert list(rows[0]) == [
        "kind", "name", "value", "unit", "n", "spread", "config", "model", "shape", "seed",
        "device", "versions", "commit", "time",
    ]  # fmt: skip
    assert rows[0]["shape"] == [1, 8, 2, 4]
    assert rows[0]["versions"]["torch"] == torch.__version__
    assert rows[0]["device"].startswith("cpu: ")


def test_a_bad_row_writes_nothing(tmp_path):
    path = tmp_path / "results.jsonl"
    good = result_row("k", "n", 1.0, "s")
    for bad in (float("nan"), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="finite numbers and plain data"):
            append_rows(path, [good, result_row("k", "n", bad, "s")])
    assert not path.exists()


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write results to"):
        append_rows(tmp_path / "file" / "results.jsonl", [result_row("k", "n", 1, "s")])


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2: not JSON"), ('{"kind": 1}', "line 2: a row needs")]
)
def test_a_damaged_file(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(result_row("k", "n", 1, "s")) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_rows(path)


@pytest.fixture(autouse=True)
def fresh_commit():
    yield
    harness.commit.cache_clear()


def test_commit_without_git(monkeypatch):
    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    harness.commit.cache_clear()
    monkeypatch.setattr(subprocess, "run", no_git)
    assert harness.commit() is None


def test_commit_of_a_package_that_is_no_clone(monkeypatch, tmp_path):
    harness.commit.cache_clear()
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "eval" / "harness.py"))
    assert harness.commit() is None
    harness.commit.cache_clear()
    (tmp_path / ".commit").write_text("0123456789ab\n")  # a copy that was told
    assert harness.commit() == "0123456789ab"
