"""GenAC on the engines that people train on, each started for real: two processes, gloo, no GPU, two networks."""

import genac_worker
import pytest
from genac_runs import fit_critic
from launch import BIN, CONFIGS, TESTS, accelerate, run
from safetensors.torch import load_file
from test_vapo_engines import ENGINES, Run
from tiny import tiny_model_dir
from transformers import AutoModelForCausalLM


pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
METRICS = ("loss", "critic/grad_norm", "mse", "parse_rate", "hint", "correlation", "segments", "generation_tokens")


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return tiny_model_dir(folder), fit_critic(folder / "critic")


@pytest.fixture(scope="session")
def runs(networks, tmp_path_factory):
    """All scenarios, by name; each engine is started once."""
    cache = {}

    def get(engine: str) -> dict[str, Run]:
        if engine not in cache:
            folder = tmp_path_factory.mktemp(engine)
            script = [TESTS / "distributed" / "genac_worker.py", *networks, folder, *genac_worker.SCENARIOS]
            if engine == "ddp":
                command = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2, *script]
            else:
                command = accelerate(CONFIGS / f"{engine}.yaml", *script)
            run(command, engine=engine)
            cache[engine] = {scenario: Run(folder / scenario) for scenario in genac_worker.SCENARIOS}
        return cache[engine]

    return get


@pytest.fixture(scope="session")
def one_process(networks, tmp_path_factory):
    runs = {}
    for scenario in ("full", "lora"):
        folder = tmp_path_factory.mktemp("one_process") / scenario
        genac_worker.train(*networks, folder, scenario, use_cpu=True, gradient_accumulation_steps=4)
        runs[scenario] = Run(folder)
    return runs


def assert_same(found: Run, expected: Run, tolerance: float):
    assert len(found.steps) == len(expected.steps) == 3
    for step, other in zip(found.steps, expected.steps, strict=True):
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=tolerance)
        for name in METRICS:
            name = name if "/" in name else f"critic/{name}"
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
@pytest.mark.parametrize("scenario", ["full", "lora"])
def test_two_processes_accumulating_2_train_both_networks_as_one_accumulating_4(runs, one_process, engine, scenario):
    assert_same(runs(engine)[scenario], one_process[scenario], TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_critic_answers_and_learns(runs, engine, networks):
    run = runs(engine)["full"]
    assert run.critic_steps == 2 + 3 and len(run.pretraining) == 2
    assert all(0.5 < step["critic/parse_rate"] <= 1 for step in run.steps)
    before = load_file(f"{networks[1]}/model.safetensors")
    for name, weight in run.weights["critic"].items():
        # Attention does not see a bias on all its keys.
        if not name.endswith("k_proj.bias"):
            assert (weight - before[name]).abs().max() > 10 * TOLERANCE, name


@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_checkpointing_changes_nothing(runs, engine):
    assert_same(runs(engine)["checkpointing"], runs(engine)["full"], TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_run(runs, engine):
    resumed, saved = runs(engine)["resumed"], runs(engine)["saved"]
    assert resumed.critic_steps == saved.critic_steps == 5
    assert_same(resumed, saved, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_saved_critic_loads_without_the_engine(runs, engine):
    run = runs(engine)["full"]
    critic = AutoModelForCausalLM.from_pretrained(run.folder / "critic")
    for name, weight in critic.state_dict().items():
        assert weight.equal(run.weights["critic"][name])
