import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig

from helpers import dits
from helpers.dense import Dense, installed

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two gloo processes found, see helpers/ulysses_worker.py."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "helpers.ulysses_worker", str(rank), str(store)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ended = [worker.communicate(timeout=180) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, ended):
        assert worker.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.mark.parametrize("case", ["stock", "timestep_per_token", "heads", "compiled"])
def test_two_processes_give_the_output_of_one(ranks, case):
    assert all(found[case] <= 1e-5 for found in ranks)
    assert all(found["heads_matter"] > 1e-3 for found in ranks)


def test_each_rank_attends_to_all_tokens_with_its_heads(ranks):
    assert [found["seen"] for found in ranks] == [[[120, 0, 2]], [[120, 2, 4]]]


def test_a_plan_gives_each_rank_its_heads(ranks):
    for found in ranks:
        assert found["plan"] <= 1e-5 < 1e-3 < found["plan_matters"]
        assert found["sparse_calls"] == 2


def test_a_rank_calibrates_its_own_heads_and_does_not_pass_them_for_all(ranks):
    for found in ranks:
        # One threshold over two heads instead of four: near the whole layer's choice, not equal.
        assert found["own_plan"] < found["plan_matters"]
        assert found["local_plan"].startswith("this rank calibrated 2 of 4 heads")


def test_heads_must_divide(ranks):
    for found in ranks:
        assert found["uneven_heads"].startswith("3 heads on 2 ranks")


def parallel(**degrees):
    return ParallelConfig(context_parallel_config=ContextParallelConfig(**degrees))


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (dits.wan, {"ring_degree": 2}, "ring_degree=2: .*use ContextParallelConfig"),
        (dits.wan, {"ulysses_degree": 2, "ring_degree": 2}, "ring_degree=2"),
        (dits.wan, {"ulysses_degree": 2, "ulysses_anything": True}, "ulysses_anything=True"),
        (dits.hunyuan, {"ulysses_degree": 2}, r"HunyuanVideoProcessor: .*remove\(\)"),
        (dits.flux, {"ulysses_degree": 2}, "FluxProcessor: only Wan"),
        (dits.cosmos, {"ulysses_degree": 2}, "CosmosProcessor: only Wan"),
    ],
)
def test_what_cannot_be_sharded_says_so(build, config, message):
    """Ignoring the configuration would give each rank attention over its own shard alone."""
    model, inputs, _ = build()
    with installed(model, Dense()):
        for module in model.modules():
            # As enable_parallelism() does.
            if hasattr(getattr(module, "processor", None), "_parallel_config"):
                module.processor._parallel_config = parallel(**config)
        with pytest.raises(ValueError, match=message):
            model(**inputs)
