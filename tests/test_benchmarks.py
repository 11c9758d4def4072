import json
import math
import random
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from trl_credit.toy.tiny_model import TinyModelSettings, fit_and_save


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import measuring
import sppo_cost
import sppo_learning


# --- What is made of the runs


def test_interval_is_by_students_t():
    assert measuring.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert measuring.interval([1.0]) == (1.0, math.inf)


def test_intervals_hold_the_mean_95_times_in_100():
    rng = random.Random(0)
    for seeds in (2, 5, 10):
        held = 0
        for _ in range(1000):
            mean, half = measuring.interval([rng.gauss(3.0, 2.0) for _ in range(seeds)])
            held += abs(mean - 3.0) <= half
        assert held / 1000 == pytest.approx(0.95, abs=0.02), seeds


def fake_run(method: str, seed: int, end: float) -> dict:
    """A run in which ever more is right, 100 tokens a step."""
    rewards = [end * step / 20 for step in range(1, 21)]
    curve = [{"step": s, "tokens": 100 * s, "sampled": end * s / 20, "greedy": 0.5} for s in (0, 10, 20)]
    return {
        "method": method,
        "settings": {"learning_rate": 1e-3},
        "seed": seed,
        "steps": 20,
        "problems": 8,
        "curve": curve,
        "tokens": [100 * step for step in range(1, 21)],
        "rewards": rewards,
    }


def test_tokens_until_a_level_are_those_of_the_first_window_that_reaches_it():
    run = fake_run("a", 0, 1.0)  # the mean of ten steps is that of step 5.5, 6.5, ...
    assert sppo_learning.tokens_until(run, 0.5) == 100 * 15
    assert sppo_learning.tokens_until(run, 0.9) == math.inf


def test_a_method_is_ahead_only_when_the_seeds_agree():
    ends = {"ours": (0.8, 0.7, 0.9), "worse": (0.6, 0.52, 0.71), "much the same": (0.9, 0.6, 0.9)}
    groups = {name: [fake_run(name, seed, end) for seed, end in enumerate(of)] for name, of in ends.items()}
    groups["worse"].reverse()  # a seed is held against the same seed
    words = sppo_learning.comparison(groups)
    assert "- sampled, end: ours over worse\n" in words
    assert "- greedy, end: none is told apart from another\n" in words
    assert "| ours − worse | 3 | **+9.5 ± 1.2** |" in words


# --- Runs


def test_the_baseline_without_a_critic_is_the_mean_of_the_batch():
    rollout = sppo_learning.BatchMeanTrainer.assign_credit(
        None, {"kept": 1}, torch.tensor([1.0, 0.0, 0.0, 0.0]), "train"
    )
    assert rollout["advantages"].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert rollout["kept"] == 1


@pytest.mark.slow
def test_every_method_runs_on_as_many_completions_and_once(tmp_path, monkeypatch):
    start = tmp_path / "start"
    fit_and_save(TinyModelSettings(hidden_size=32, layers=1, heads=2, steps=2, batch_size=4), start)
    monkeypatch.setattr(sppo_learning, "start_model", lambda folder: start)
    monkeypatch.setattr(sppo_learning, "COMPLETIONS_PER_STEP", 16)
    monkeypatch.chdir(tmp_path)
    options = ["--seeds", "3", "--steps", "2", "--points", "2", "--problems", "8", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sppo_learning.py", *options])
    sppo_learning.main()
    written = (tmp_path / "sppo_learning.json").read_text()
    runs = json.loads(written)
    assert [run["method"] for run in runs] == [*sppo_learning.ARMS]
    for run in runs:
        assert [point["step"] for point in run["curve"]] == [0, 1, 2]
        assert [point["tokens"] for point in run["curve"][1:]] == run["tokens"]
        assert 2 * 16 <= run["tokens"][-1] <= 2 * 16 * 40
        assert all((16 * reward).is_integer() for reward in run["rewards"])
    assert len(runs[0]["critic/brier"]) == 2
    page = (tmp_path / "sppo_learning.md").read_text()
    assert "| RLOO, N=8 | 0.0003 | 1 |" in page
    assert "Brier score" in page

    monkeypatch.setattr(sppo_learning, "measure", None)
    sppo_learning.main()
    assert (tmp_path / "sppo_learning.json").read_text() == written


def test_critics_have_the_sizes_they_are_named_by():
    tokenizer = measuring.make_tokenizer()
    policy = measuring.make_model(tokenizer, 256, 6, 4096).num_parameters()
    for name, (_, size) in sppo_cost.ARMS.items():
        if size is not None:
            critic = measuring.make_model(tokenizer, int(256 * size[0]), int(6 * size[1]), 4096).num_parameters()
            named = float(Fraction(name.split()[-1].removesuffix("×")))
            assert critic / policy == pytest.approx(named, rel=0.05), name


def test_the_cost_of_a_step_holds_that_of_its_critic(monkeypatch, capsys):
    options = ["--prompts", "2", "--length", "4", "--steps", "2", "--arm", "SPPO, N=1, critic 1/16×"]
    monkeypatch.setattr(sys, "argv", ["sppo_cost.py", *options])
    sppo_cost.main()
    run = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run["tokens"] == 2 * 4
    assert len(run["steps"]) == 2
    for step in run["steps"]:
        assert 0 < step["critic"][0] < step["whole"][0]
