"""Critics on the engines that people train on, each started for real: two processes, gloo, no GPU, two networks."""

import json

import pytest
import torch
import vapo_worker
from launch import BIN, CONFIGS, TESTS, accelerate, run
from safetensors.torch import load_file
from sppo_runs import critic_dir
from tiny import tiny_model_dir
from transformers import AutoModelForTokenClassification


pytestmark = pytest.mark.distributed

ENGINES = {
    "ddp": {"class": "DistributedDataParallel", "zero_stage": None, "sharded": False},
    "zero2": {"class": "DeepSpeedEngine", "zero_stage": 2, "sharded": False},
    "zero3": {"class": "DeepSpeedEngine", "zero_stage": 3, "sharded": False},
    "fsdp2": {"class": "FSDPModule", "zero_stage": None, "sharded": True},
}
SPPO = [name for name in vapo_worker.SPPO_SCENARIOS if "a prompt" in name]
# Seen: weights of both networks 2e-7, losses 3e-7, gradient norms 2e-6 relative.
TOLERANCE = 1e-5
CRITIC_METRICS = ("critic/loss", "critic/grad_norm", "critic/explained_variance", "critic/value_mean")


def load_weights(folder):
    adapters = folder / "adapter_model.safetensors"
    return load_file(adapters if adapters.exists() else folder / "model.safetensors")


class Run:
    def __init__(self, folder):
        self.folder = folder
        history = json.loads((folder / "history.json").read_text())
        self.engines = {"policy": history["policy"], "critic": history["critic"]}
        self.steps, self.pretraining = history["steps"], history["pretraining"]
        self.error = history.get("error")
        self.critic_steps, self.prompts_read = history["critic_steps"], history.get("prompts_read")
        self.weights = {"policy": load_weights(folder), "critic": load_weights(folder / "critic")}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    folder = tiny_model_dir(tmp_path_factory.mktemp("model"))
    critic_dir(folder / "critic")
    return folder


@pytest.fixture(scope="session")
def runs(model_dir, tmp_path_factory):
    """All scenarios, by name; each engine is started once."""
    cache = {}

    def get(engine: str) -> dict[str, Run]:
        if engine not in cache:
            folder = tmp_path_factory.mktemp(engine)
            scenarios = [*vapo_worker.SCENARIOS, *vapo_worker.SPPO_SCENARIOS]
            scenarios = [name for name in scenarios if name != "shared" or engine == "ddp"]
            script = [TESTS / "distributed" / "vapo_worker.py", model_dir, folder, *scenarios]
            if engine == "ddp":
                command = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2, *script]
            else:
                command = accelerate(CONFIGS / f"{engine}.yaml", *script)
            run(command, engine=engine)
            cache[engine] = {scenario: Run(folder / scenario) for scenario in scenarios}
        return cache[engine]

    return get


@pytest.fixture(scope="session")
def one_process(model_dir, tmp_path_factory):
    runs = {}
    for scenario in ("full", "lora", "frozen", "shared", *SPPO):
        folder = tmp_path_factory.mktemp("one_process") / scenario
        vapo_worker.train(str(model_dir), str(folder), scenario, use_cpu=True, gradient_accumulation_steps=4)
        runs[scenario] = Run(folder)
    return runs


def assert_same(found: Run, expected: Run, tolerance: float):
    assert len(found.steps) == len(expected.steps) == 3
    for step, other in zip(found.steps, expected.steps, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], abs=tolerance)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=tolerance)
        names = [name for name in CRITIC_METRICS if name in other]  # some are those of a rollout, which may last longer
        assert "critic/loss" in names and names == [name for name in CRITIC_METRICS if name in step]
        for name in names:
            assert step[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
    for network, weights in expected.weights.items():
        assert found.weights[network].keys() == weights.keys()
        for name, weight in weights.items():
            assert (found.weights[network][name] - weight).abs().max() <= tolerance, (network, name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("network", ["policy", "critic"])
def test_it_is_this_engine_for_both_networks(runs, engine, network):
    for trained in runs(engine).values():
        found = trained.engines[network]
        assert ENGINES[engine]["class"] in found["classes"]
        assert found.get("zero_stage") == ENGINES[engine]["zero_stage"]
        assert found["sharded"] == ENGINES[engine]["sharded"]
        assert found["processes"] == 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scenario", ["full", "lora", "frozen", *SPPO])
def test_two_processes_accumulating_2_train_both_networks_as_one_accumulating_4(runs, one_process, engine, scenario):
    assert_same(runs(engine)[scenario], one_process[scenario], TOLERANCE)


def test_a_critic_on_the_policys_base_trains_with_ddp_as_on_one_process(runs, one_process):
    assert_same(runs("ddp")["shared"], one_process["shared"], TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_fresh_head_starts_at_the_mean_reward_and_every_weight_of_the_critic_moves(runs, engine, model_dir):
    run = runs(engine)["full"]
    first = run.pretraining[0]
    mean = pytest.approx(first["critic_pretraining/reward"], rel=1e-5)
    assert first["critic_pretraining/value_min"] == first["critic_pretraining/value_max"] == mean != 0
    # The next rollout is valued by a head that has made a step from there, and not from 0.
    assert abs(run.pretraining[1]["critic_pretraining/value_mean"] / first["critic_pretraining/reward"]) > 0.1
    assert run.critic_steps == 2 + 3
    before = load_file(model_dir / "model.safetensors")
    for name, weight in run.weights["critic"].items():
        # Attention does not see a bias on all its keys.
        if name in before and not name.endswith("k_proj.bias"):
            assert (weight - before[name]).abs().max() > 10 * TOLERANCE, name


def test_14_adapters_on_a_base_in_bfloat16_are_trained_with_zero_3(model_dir, one_process, tmp_path):
    scenarios = list(vapo_worker.BF16_SCENARIOS)
    script = [TESTS / "distributed" / "vapo_worker.py", model_dir, tmp_path, *scenarios]
    run(accelerate(CONFIGS / "zero3.yaml", *script, precision="bf16"), engine="zero3")
    fresh, loaded = (Run(tmp_path / scenario) for scenario in scenarios)
    adapters = [name for name in fresh.weights["critic"] if "lora_" in name]
    for trained in (fresh, loaded):
        assert trained.engines["critic"]["zero_stage"] == 3 and trained.critic_steps == 5
        assert {trained.weights["critic"][name].dtype for name in adapters} == {torch.bfloat16}
    for name in adapters:
        assert (loaded.weights["critic"][name] - fresh.weights["critic"][name]).abs().max() > 0, name
    for step, other in zip(fresh.steps, one_process["lora"].steps, strict=True):
        assert step["critic/value_mean"] == pytest.approx(other["critic/value_mean"], rel=0.1)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_frozen_of_a_critic_stays_bit_for_bit(runs, engine, model_dir):
    before, after = load_file(model_dir / "model.safetensors"), runs(engine)["frozen"].weights["critic"]
    frozen = {name for name in after if "self_attn" in name or "embed_tokens" in name}
    assert len(frozen) > 4
    assert {name for name in after if name in before and after[name].equal(before[name])} == frozen


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_the_critic_that_is_not_finite_leaves_its_weights_as_they_were(runs, engine):
    run = runs(engine)["broken"]
    assert "gradient norm of the critic is" in run.error and "in its update 4" in run.error
    assert run.critic_steps == 3
    assert all(weight.isfinite().all() for weight in run.weights["critic"].values())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_policy_is_loaded_with_the_critic_of_its_step(runs, engine):
    run = runs(engine)["best"]
    for network, folder in (("policy", ""), ("critic", "critic")):
        first, last = (load_weights(run.folder / f"checkpoint-{step}" / folder) for step in (1, 3))
        assert all(weight.equal(first[name]) for name, weight in run.weights[network].items()), network
        assert any(not weight.equal(last[name]) for name, weight in run.weights[network].items()), network


@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_checkpointing_changes_nothing(runs, engine):
    assert_same(runs(engine)["checkpointing"], runs(engine)["full"], TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trainer", ["", "sppo, "], ids=["vapo", "sppo"])
def test_a_resumed_run_is_the_run(runs, engine, trainer):
    resumed, saved = runs(engine)[f"{trainer}resumed"], runs(engine)[f"{trainer}saved"]
    assert resumed.critic_steps == saved.critic_steps == 5
    assert_same(resumed, saved, 0)


def test_a_prompt_whose_completions_are_on_both_processes_goes_through_the_critic_once(runs):
    # Three prompts: two for one process, the other one for the second, which repeats it to keep step.
    assert [sum(read) for read in runs("ddp")["sppo, 4 a prompt"].prompts_read] == 2 * [5 * (2 + 2)]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_saved_critic_loads_without_the_engine(runs, engine):
    run = runs(engine)["full"]
    critic = AutoModelForTokenClassification.from_pretrained(run.folder / "critic")
    assert critic.config.num_labels == 1
    for name, weight in critic.state_dict().items():
        assert weight.equal(run.weights["critic"][name])
