"""The probe critic on the engines that people train on: two processes are one, and each has the same head."""

import json

import probe_critic_worker
import pytest
import torch
from launch import BIN, CONFIGS, TESTS, accelerate, run
from safetensors.torch import load_file
from tiny import tiny_model_dir


pytestmark = pytest.mark.distributed

ENGINES = {
    "ddp": "DistributedDataParallel",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
    "fsdp2": "FSDPModule",
}
TOLERANCE = 1e-4
METRICS = ("critic/trust", "critic/loss", "critic/explained_variance", "critic/value_mean", "critic/states", "loss")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one_process(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_process")
    probe_critic_worker.train(str(model_dir), str(folder), use_cpu=True, gradient_accumulation_steps=4)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_have_one_head_which_is_that_of_one_process(engine, model_dir, one_process, tmp_path):
    script = [TESTS / "distributed" / "probe_critic_worker.py", model_dir, tmp_path]
    if engine == "ddp":
        command = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2, *script]
    else:
        command = accelerate(CONFIGS / f"{engine}.yaml", *script)
    run(command, engine=engine)
    found, expected = (json.loads((folder / "history.json").read_text()) for folder in (tmp_path, one_process))
    assert ENGINES[engine] in found["engine"]["classes"] and found["engine"]["processes"] == 2
    for step, other in zip(found["steps"], expected["steps"], strict=True):
        for name in METRICS:
            assert step[name] == pytest.approx(other[name], rel=1e-3, abs=TOLERANCE), name

    heads = [torch.load(tmp_path / f"head_{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = torch.load(one_process / "head_0.pt", weights_only=True)
    for name, weight in alone.items():
        assert torch.equal(heads[0][name], heads[1][name]), name
        assert torch.allclose(heads[0][name].double(), weight.double(), atol=TOLERANCE), name
    assert heads[0]["head.2.weight"].abs().max() > 0.01
    policy, other = (load_file(folder / "model.safetensors") for folder in (tmp_path, one_process))
    assert all((policy[name] - weight).abs().max() < TOLERANCE for name, weight in other.items())
