"""VinePPO, and the services it samples and scores by, on two processes of each engine, started for real with gloo."""

import json

import pytest
import vine_worker
from launch import BIN, CONFIGS, TESTS, accelerate, run
from safetensors.torch import load_file
from tiny import tiny_model_dir


pytestmark = pytest.mark.distributed

ENGINES = {"ddp": "DistributedDataParallel", "zero3": "DeepSpeedEngine", "fsdp2": "FSDPModule"}
TOLERANCE = 1e-5


class Run:
    def __init__(self, folder):
        self.processes = [json.loads(path.read_text()) for path in sorted(folder.glob("process_*.json"))]
        self.steps = self.processes[0]["steps"]
        self.weights = load_file(folder / "model.safetensors")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def runs(model_dir, tmp_path_factory):
    """All scenarios, by name; each engine is started once."""
    cache = {}

    def get(engine: str) -> dict[str, Run]:
        if engine not in cache:
            folder = tmp_path_factory.mktemp(engine)
            script = [TESTS / "distributed" / "vine_worker.py", model_dir, folder, *vine_worker.SCENARIOS]
            if engine == "ddp":
                command = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2, *script]
            else:
                command = accelerate(CONFIGS / f"{engine}.yaml", *script)
            run(command, engine=engine)
            cache[engine] = {scenario: Run(folder / scenario) for scenario in vine_worker.SCENARIOS}
        return cache[engine]

    return get


@pytest.fixture(scope="session")
def one_process(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "greedy"
    vine_worker.train(str(model_dir), str(folder), "greedy", use_cpu=True, gradient_accumulation_steps=4)
    return Run(folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_this_engine(runs, engine):
    for trained in runs(engine).values():
        assert len(trained.processes) == 2 == trained.processes[0]["processes"]
        assert ENGINES[engine] in trained.processes[0]["classes"]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_are_one_where_continuations_do_not_depend_on_chance(runs, one_process, engine):
    found = runs(engine)["greedy"]
    for step, other in zip(found.steps, one_process.steps, strict=True):
        for name in ("loss", "vine/value_mean", "vine/explained_variance", "vine/explained_variance_within_prompt"):
            assert step[name] == pytest.approx(other[name], abs=TOLERANCE, nan_ok=True), name
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=TOLERANCE)
        assert step["vine/value_noise"] == 0
        # Every process has the states of its own completions.
        assert step["vine/states"] >= other["vine/states"]
        assert step["vine/states"] + step["vine/equal_states"] == other["vine/states"] + other["vine/equal_states"]
    for name, weight in one_process.weights.items():
        assert (found.weights[name] - weight).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("engine", ENGINES)
def test_processes_have_different_numbers_of_states(runs, engine):
    first, second = runs(engine)["own completions"].processes
    assert first["states"] != second["states"]
    assert first["longest"] <= first["room"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_with_nothing_to_sample_or_score_keeps_step_with_one_that_has(runs, engine):
    first, second = runs(engine)["uneven"].processes
    assert len(first["extra"]) == 9 and all(1 <= len(tokens) <= 2 + i for i, tokens in enumerate(first["extra"]))
    assert second["extra"] == [] and first["extra_scores"] == []
    assert second["extra_scores"] == pytest.approx([(i % 2 == 0) - 0.4 for i in range(70, 77)])


@pytest.mark.parametrize("engine", ENGINES)
def test_processes_sample_with_numbers_of_their_own(runs, engine):
    first, second = runs(engine)["uneven"].processes
    for one, other in zip(first["continuations"], second["continuations"], strict=True):
        shared = min(len(one), len(other))
        assert one[:shared] != other[:shared] or shared == 0
