"""Processes read as many batches of a critic, of about the same size, and learn together what one learns."""

import json

import pytest
import tokens_worker
from launch import BIN, CONFIGS, TESTS, accelerate, run
from safetensors.torch import load_file
from sppo_runs import critic_dir
from tiny import tiny_model_dir


pytestmark = pytest.mark.distributed

ENGINES = {
    "ddp": "DistributedDataParallel",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
    "fsdp2": "FSDPModule",
}
# Seen: 2e-7.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tiny_model_dir(tmp_path_factory.mktemp("model"))
    critic_dir(folder / "critic")
    return folder


@pytest.fixture(scope="module")
def one_process(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_process")
    for scenario in tokens_worker.SCENARIOS:
        settings = {"use_cpu": True, "gradient_accumulation_steps": 4}
        tokens_worker.train(str(model_dir), str(folder / scenario), scenario, **settings)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_keep_step_share_the_work_and_learn_what_one_learns(engine, model_dir, one_process, tmp_path):
    script = [TESTS / "distributed" / "tokens_worker.py", model_dir, tmp_path, *tokens_worker.SCENARIOS]
    if engine == "ddp":
        run([BIN / "torchrun", "--standalone", "--nproc-per-node", 2, *script], engine=engine)
    else:
        run(accelerate(CONFIGS / f"{engine}.yaml", *script), engine=engine)
    for scenario in tokens_worker.SCENARIOS:
        found, alone = (
            json.loads((folder / scenario / "found.json").read_text()) for folder in (tmp_path, one_process)
        )
        assert ENGINES[engine] in found["engine"]["classes"] and found["engine"]["processes"] == 2
        one, other = found["passes"]
        assert [rows for rows, _ in one] == [rows for rows, _ in other]
        tokens = [sum(rows * width for rows, width in passes) for passes in (one, other)]
        assert abs(tokens[0] - tokens[1]) < 0.25 * max(tokens), scenario
        # Together they read what one reads, but for padding and for prompts that keep a process in step.
        assert sum(tokens) < 1.25 * sum(rows * width for rows, width in alone["passes"][0]), scenario
        for network in ("", "critic"):
            weights, expected = (
                load_file(folder / scenario / network / "model.safetensors") for folder in (tmp_path, one_process)
            )
            for name, weight in expected.items():
                assert (weights[name] - weight).abs().max() <= TOLERANCE, (scenario, network, name)
