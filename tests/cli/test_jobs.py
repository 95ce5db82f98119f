import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gen_accel.cli.jobs import Jobs, _locked
from gen_accel.cli.main import main
from gen_accel.cli.options import UsageError
from helpers import tiny

ROOT = Path(__file__).parents[2]
PROMPTS = ("a cat", "a dog", "a red fox", "a boat")


def make(folder, count=3, shared=True, **settings):
    return Jobs(folder, {"seed": 0, **settings}, count, shared=shared)


def finish(jobs):
    with jobs.finish() as records:
        return records


def test_each_piece_is_done_once_and_written_up_once(tmp_path):
    one, two = make(tmp_path), make(tmp_path)
    first = one.claims()
    assert next(first) == 0
    assert next(two.claims()) == 1  # 0 is claimed
    one.done(0, {"by": "one"})
    for jobs, name in ((one, "one"), (two, "two")):
        for i in jobs.claims():
            jobs.done(i, {"by": name})
    first.close()
    records = finish(two)
    assert len(records) == 3 and records[0] == {"by": "one"}
    assert finish(one) is None and one.complete
    assert os.listdir(tmp_path) == ["manifest.json"]
    assert json.loads((tmp_path / "manifest.json").read_text())["jobs"] == records
    assert list(make(tmp_path).claims()) == []


def test_what_another_holds_is_waited_for_and_taken_over(tmp_path):
    jobs = make(tmp_path)
    freed = threading.Event()

    def hold():
        with _locked(jobs.work / "0001.lock"):
            held.set()
            time.sleep(0.6)
        freed.set()

    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    order = []
    for i in jobs.claims():
        assert i != 1 or freed.is_set()
        order.append(i)
        jobs.done(i, {})
    thread.join()
    assert order == [0, 2, 1]


def test_nothing_begins_before_the_first_is_done(tmp_path):
    one, two = make(tmp_path), make(tmp_path)
    claims = one.claims(first_alone=True)
    assert next(claims) == 0
    got = []
    waiting = threading.Thread(target=lambda: got.append(next(two.claims(first_alone=True))))
    waiting.start()
    time.sleep(0.5)
    assert got == []
    one.done(0, {})
    claims.close()
    waiting.join(5)
    assert got == [1]


def test_a_folder_with_another_run_is_kept_for_it(tmp_path):
    jobs = make(tmp_path)
    jobs.done(0, {})
    with pytest.raises(UsageError, match="holds a run with other settings"):
        make(tmp_path, seed=1)
    assert [i for i, _ in zip(make(tmp_path, shared=False).claims(), range(1))] == [1]
    # One process alone begins anew.
    assert next(make(tmp_path, shared=False, seed=1).claims()) == 0


def test_a_run_that_gave_nothing_leaves_nothing(tmp_path):
    make(tmp_path / "a", shared=False).abandon()
    assert not (tmp_path / "a").exists()
    jobs = make(tmp_path / "b", shared=False)
    jobs.done(0, {})
    jobs.abandon()
    assert (tmp_path / "b" / "manifest.json").exists()


def test_a_run_that_gave_nothing_leaves_what_was_there(tmp_path):
    first = make(tmp_path, 1, shared=False)
    first.done(0, {"file": "000.mp4"})
    finish(first)
    before = (tmp_path / "manifest.json").read_text()
    for seed in (0, 1):
        make(tmp_path, 1, shared=False, seed=seed).abandon()
        assert (tmp_path / "manifest.json").read_text() == before
        assert os.listdir(tmp_path) == ["manifest.json"]


# ---- gen-accel generate in several processes -----------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_wan()[0].save_pretrained(folder / "wan")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    given = ["generate", f"--model={folder / 'wan'}", f"--prompts={folder / 'prompts.txt'}"]
    given += ["--height=64", "--width=96", "--num-frames=17", "--num-inference-steps=5"]
    given += ["--guidance-scale=1", "pipeline.max_sequence_length=32"]
    return [*given, "processor.min_tokens=0", "processor.block=16", "processor.density=0.4"]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    """The videos of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert main([*words, f"--output={out}"]) == 0
    return videos(out)


def videos(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.mp4"))}


def start(words, *launcher, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, *launcher, "-m", "gen_accel", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=env, **pipes)


def test_a_killed_worker_loses_nothing(words, alone, tmp_path):
    out = tmp_path / "out"
    words = [*words, f"--output={out}"]
    ranks = {"WORLD_SIZE": "2"}
    dying = start(words, **ranks, RANK="0", LOCAL_RANK="0")
    try:
        ends = time.monotonic() + 120
        while not (out / "work" / "0000.json").exists() and time.monotonic() < ends:
            assert dying.poll() is None, dying.stdout.read()
            time.sleep(0.01)
    finally:
        dying.send_signal(signal.SIGKILL)
        dying.wait()
    assert not (out / "index.html").exists() and (out / "work" / "plan.safetensors").exists()
    written = (out / "000.mp4").stat().st_mtime_ns

    workers = [start(words, **ranks, RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]
    said = [worker.communicate(timeout=180)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert (out / "000.mp4").stat().st_mtime_ns == written  # not rendered again
    assert videos(out) == alone  # the plan of the first prompt, in whatever process
    assert sum("wrote" in text for text in said) == 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert [job["prompt"] for job in manifest["jobs"]] == list(PROMPTS)


@pytest.mark.slow
def test_accelerate_launch_splits_the_prompts(words, alone, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    launcher += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    run = start([*words, f"--output={tmp_path}"], *launcher)
    said = run.communicate(timeout=240)[0]
    assert run.returncode == 0, said
    assert videos(tmp_path) == alone and said.count("wrote") == 1
