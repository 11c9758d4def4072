"""The error on fixed probes during training: what is logged is the error, and the run is the run without it."""

import json

import pytest
import torch
from datasets import Dataset
from launch import BIN, TESTS, run
from probe_worker import TRAINERS, measured, probes_of, train

from trl_credit import CriticProbeCallback, GRPOLambdaConfig, GRPOLambdaTrainer
from trl_credit.critic_report import PromptCritic, TokenCritic, evaluate_critic


@pytest.fixture(scope="module")
def probes_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("probes"))


@pytest.fixture(scope="module")
def probes(model_dir, probes_dir):
    return probes_of(model_dir, probes_dir)


@pytest.fixture(scope="module")
def trained(model_dir, probes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: train(name, model_dir, probes, str(folder / name)) for name in TRAINERS}


def offline(name, trainer):
    if name == "vapo":
        return TokenCritic(trainer.critic)
    return PromptCritic(trainer.critic, trainer.critic_processing_class, trainer.args.critic_loss)


@pytest.mark.parametrize("name", TRAINERS)
def test_it_logs_what_the_report_says_of_the_critic_of_that_step(name, trained, model_dir, probes, tmp_path):
    log = measured(trained[name])
    assert [line["step"] for line in log] == [0, 2]
    assert log[0]["critic_probe/mse"] != log[1]["critic_probe/mse"]
    later = train(name, model_dir, probes, str(tmp_path), callback=False, max_steps=2)  # the critic of step 2
    rows = evaluate_critic(offline(name, later), probes, draws=2).rows
    for metric in ("mse", "explained_variance", "bias"):
        assert log[1][f"critic_probe/{metric}"] == pytest.approx(rows[f"error/{metric}"].estimate, abs=1e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_it_changes_nothing_in_the_run(name, trained, model_dir, probes, tmp_path):
    without = train(name, model_dir, probes, str(tmp_path), callback=False)
    for network in ("model", "critic"):
        pairs = zip(getattr(trained[name], network).parameters(), getattr(without, network).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_it_refuses_what_it_cannot_measure(trained, model_dir, probes, tmp_path):
    config = GRPOLambdaConfig(str(tmp_path), bf16=False, use_cpu=True, per_device_train_batch_size=8)
    data = Dataset.from_dict({"prompt": ["a"] * 8})
    plain = GRPOLambdaTrainer(model_dir, lambda completions, **_: [1.0] * len(completions), config, data)
    with pytest.raises(TypeError, match="needs a trainer with a critic, got a GRPOLambdaTrainer"):
        CriticProbeCallback(plain, probes)
    with pytest.raises(ValueError, match="`every_n_steps` must be a whole number of at least 1, got 0"):
        CriticProbeCallback(trained["vapo"], probes, every_n_steps=0)


@pytest.mark.distributed
def test_two_processes_measure_what_one_does(trained, model_dir, probes_dir, probes, tmp_path):
    script = [TESTS / "distributed" / "probe_worker.py", model_dir, probes_dir, tmp_path]
    run([BIN / "torchrun", "--standalone", "--nproc-per-node", 2, *script])
    for name in TRAINERS:
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert (result["engine"], result["processes"]) == ("DistributedDataParallel", 2)
        alone = measured(trained[name])
        assert [line["step"] for line in result["log"]] == [0, 2]
        for metric in ("mse", "explained_variance", "bias"):
            here, there = (log[0][f"critic_probe/{metric}"] for log in (alone, result["log"]))
            assert there == pytest.approx(here, abs=1e-6)
