import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig

from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.parallel import by_part, by_rank, enable_context_parallelism
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


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "flux", "cosmos"])
def test_every_family_and_selection_gives_what_one_process_gives(ranks, family):
    for found in ranks:
        cases = {k: v for k, v in found["families"].items() if k.startswith(f"{family} ")}
        assert len(cases) == 6
        for case, (error, *matters) in cases.items():
            assert error <= 2e-5, case
            if matters and "every" not in case:
                assert matters[0] > 1e-3, case


def test_shards_are_ordered_by_part_and_back():
    layout = TokenLayout(TokenGrid(1, 2, 3), text_before=2, text_after=4)
    x = torch.tensor([0, 2, 3, 4, 8, 9, 1, 5, 6, 7, 10, 11.0]).view(1, 12, 1, 1)
    ordered = by_part(x, layout, 2)
    assert ordered.flatten().tolist() == list(range(12))
    assert torch.equal(by_rank(ordered, layout, 2), x)
    with pytest.raises(ValueError, match="6 video and 6 text tokens on 4 ranks"):
        by_part(x, layout, 4)


def test_what_counts_the_first_frames_tokens_is_not_sharded():
    model, _, _ = dits.hunyuan_token_replace()
    with pytest.raises(ValueError, match="token_replace"):
        enable_context_parallelism(model, ContextParallelConfig(ulysses_degree=2))


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
        (dits.hunyuan, {"ring_degree": 2}, "ring_degree=2"),
        (dits.flux, {"ring_degree": 2}, "ring_degree=2"),
        (dits.cosmos, {"ring_degree": 2}, "ring_degree=2"),
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
