import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM


sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.credit import report, statistics
from benchmarks.credit.arms import ARMS
from benchmarks.credit.cell import Cell
from benchmarks.credit.exact import exact_values, monte_carlo_values, transitions
from benchmarks.credit.fits import Fit, make_tokenizer
from benchmarks.credit.grid import read_grid, run_grid
from benchmarks.credit.noise import Moments, measure_noise
from benchmarks.credit.sampling import sample
from benchmarks.credit.tasks import TASKS, prepare
from benchmarks.credit.walks import WalkTask
from trl_credit.toy.task import solve


SMALL = WalkTask(symbols=5, steps=3, marks=(1, 2), counts=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("fits")


@pytest.fixture(scope="module")
def tiny(cache):
    task, folder, _ = prepare("tiny", 0, cache)
    return task, AutoModelForCausalLM.from_pretrained(folder).eval()


# --- Walks


@pytest.mark.parametrize("symbols", [3, 4, 5, 50, 400])
def test_right_steps_and_slips_nowhere_agree(symbols):
    f, g = WalkTask(symbols=symbols, steps=2, marks=(1,)).permutations()
    assert f.sort().values.tolist() == g.sort().values.tolist() == list(range(symbols))
    assert not (f == g).any()


def test_reward_is_one_from_the_pass_mark_on():
    f, g = SMALL.permutations()
    start, (one, two) = 3, (SMALL.words.index("m1"), SMALL.words.index("m2"))
    right = f[start]
    slipped = g[right]
    again = f[slipped]
    counts = [5, 6, 6]  # 0, 1, 1
    walk = torch.stack([torch.tensor(5), right, torch.tensor(6), slipped, torch.tensor(6), again])
    once = torch.cat([walk[:-1], g[slipped].unsqueeze(0)])
    prompts = torch.tensor([[one, start], [two, start], [one, start], [two, start]])
    completions = torch.stack([walk, walk, once, once])
    assert SMALL.rewards(prompts, completions).tolist() == [1, 1, 1, 0]
    assert SMALL.truth(prompts, completions).all()
    path = SMALL.follow(prompts, completions)
    assert path.right[0].tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert path.left[0].tolist() == [3, 3, 2, 2, 1, 1, 0]
    assert completions[0, ::2].tolist() == counts


def test_a_false_count_is_told_and_costs_nothing():
    f, _ = SMALL.permutations()
    walk = torch.stack([torch.tensor(5), f[0], torch.tensor(5), f[f[0]], torch.tensor(7), f[f[f[0]]]]).unsqueeze(0)
    prompts = torch.tensor([[SMALL.words.index("m2"), 0]])
    assert SMALL.truth(prompts, walk).tolist() == [[True, False, True]]
    assert SMALL.rewards(prompts, walk).tolist() == [1]


def test_nothing_counts_after_a_step_to_no_symbol():
    f, _ = SMALL.permutations()
    eos = SMALL.words.index("<eos>")
    for broken in ([5, 6, 6, int(f[0]), 6, 0], [eos, int(f[0]), 6, int(f[f[0]]), 7, 0]):
        path = SMALL.follow(torch.tensor([[8, 0]]), torch.tensor([broken]))
        assert path.right[0, -1] == 0 and path.left[0, -1] == 0


def test_teacher_is_right_as_often_as_it_is_said_to_be():
    task = WalkTask(symbols=100, steps=10, marks=(5,))
    prompts = task.prompts(20_000, torch.Generator().manual_seed(0))
    path = task.follow(prompts, task.teach(prompts, torch.Generator().manual_seed(1)))
    right = (path.right[:, 1:] - path.right[:, :-1]).float()
    skill = task.skill()[path.symbol[:, :-1]]
    assert (path.left[:, -1] == 0).all()
    assert right[skill > 0.5].mean().item() == pytest.approx(0.9, abs=0.005)
    assert right[skill < 0.5].mean().item() == pytest.approx(0.35, abs=0.005)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "chain"])
def test_every_word_is_one_token(name):
    task = TASKS[name]
    tokenizer = make_tokenizer(task)
    prompts = task.prompts(8, torch.Generator().manual_seed(0))
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == prompts.tolist()
    assert len(task.words) == len(set(task.words))
    # After all walks the model has said as many tokens as there is room for.
    assert task.teach(prompts, torch.Generator().manual_seed(0)).shape[1] == task.completion_length


def test_segments_end_before_the_steps():
    assert SMALL.segment_ends(6) == [1, 3, 5, 6]
    assert replace(SMALL, counts=False).segment_ends(3) == [1, 2, 3]
    assert SMALL.segment_ends(0) == []


# --- Exact values


def test_exact_values_are_those_of_counting_all_walks():
    task = WalkTask(symbols=4, steps=3, marks=(2,))
    f, _ = task.permutations()
    steps = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)).double()
    steps = 0.9 * steps / steps.sum(1, keepdim=True)  # a tenth of the steps go to no symbol
    table = task.values_to_go(steps)
    for start, need in itertools.product(range(4), range(3)):
        total = 0.0
        for length in range(4):  # a walk of fewer than 3 steps has ended early
            for walk in itertools.product(range(4), repeat=length):
                path = [start, *walk]
                probability = 1.0 if length == 3 else 0.1
                for x, y in itertools.pairwise(path):
                    probability *= steps[x, y].item()
                right = sum(f[x].item() == y for x, y in itertools.pairwise(path))
                total += probability * (right >= need)
        assert table[3, start, need].item() == pytest.approx(total, abs=1e-12), (start, need)


@pytest.mark.slow
def test_exact_values_are_what_the_model_earns(tiny):
    task, model = tiny
    generator = torch.Generator().manual_seed(0)
    prompts = task.prompts(4000, generator)
    completions = sample(model, prompts, torch.ones_like(prompts), task.completion_length, generator)
    rewards = task.rewards(prompts, completions)
    values = exact_values(model, task, prompts, completions)
    assert values.shape == (4000, task.completion_length + 1)
    assert (values[:, -1] == rewards).all()
    for at in (0, 3, 7, 11):
        assert values[:, at].mean().item() == pytest.approx(rewards.mean().item(), abs=0.03), at
        slope = torch.cov(torch.stack([values[:, at], rewards]))[0, 1] / values[:, at].var()
        assert slope.item() == pytest.approx(1.0, abs=0.12), at


@pytest.mark.slow
def test_exact_values_are_the_means_of_continuations(tiny):
    task, model = tiny
    generator = torch.Generator().manual_seed(1)
    prompts = task.prompts(6, generator)
    completions = sample(model, prompts, torch.ones_like(prompts), task.completion_length, generator)
    estimate, tokens = monte_carlo_values(model, task, prompts, completions, 400, generator)
    exact = exact_values(model, task, prompts, completions)
    assert tokens == pytest.approx(6 * 400 * sum(range(1, task.completion_length + 1)), rel=0.01)  # few end early
    assert (estimate[:, -1] == task.rewards(prompts, completions)).all()
    # Five standard errors of a mean of 400, and what the model steps otherwise late in a walk.
    assert (estimate - exact).abs().max() < 0.16
    assert (estimate - exact).abs().mean() < 0.04


def test_sampling_follows_the_model_and_leaves_training_its_random_numbers(tiny):
    task, model = tiny
    prompts = torch.tensor([[task.words.index("m3"), 2]]).expand(20_000, -1)
    before = torch.random.get_rng_state()
    tokens = sample(model, prompts, torch.ones_like(prompts), 2, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.no_grad():
        context = torch.cat([prompts[:1], tokens[:1, :1]], dim=1)
        wanted = model(context).logits[0, -1].softmax(-1)
    same = tokens[:, 0] == tokens[0, 0]
    drawn = torch.bincount(tokens[same, 1], minlength=len(wanted)) / same.sum()
    assert (drawn - wanted).abs().max() < 0.02


# --- Start models


def test_another_fit_or_task_is_another_start_model():
    fit, task = Fit(), TASKS["vote"]
    others = [fit.fingerprint(TASKS["marks"]), fit.fingerprint(replace(task, seed=1))]
    others += [replace(fit, **{name: getattr(fit, name) * 2 + 1}).fingerprint(task) for name in fit.__dict__]
    assert len({fit.fingerprint(task), *others}) == 1 + len(others)


@pytest.mark.slow
def test_a_start_model_is_the_same_when_made_again(tmp_path, cache):
    _, first, _ = prepare("tiny", 0, cache)
    _, again, _ = prepare("tiny", 0, tmp_path)
    assert first.name == again.name
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


# --- Runs


@pytest.mark.parametrize("trainer", ARMS)
@pytest.mark.slow
def test_every_arm_trains_and_counts_its_tokens(trainer, cache):
    settings = {"learning_rate": 1e-3}
    if trainer == "vapo":
        settings["critic_pretraining_steps"] = 2
    cell = Cell("a", trainer, "tiny", 0, 0, 400, settings, evaluate_every=1, evaluation_prompts=64)
    rows = cell.run(cache).to_pylist()
    length = 16 * TASKS["tiny"].completion_length
    pretraining = 2 if trainer == "vapo" else 0
    assert rows[0]["tokens_generated"] == pytest.approx(pretraining * length, rel=0.05)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["kl"] != 0 and rows[-1]["tokens_generated"] >= 400
    assert all(0 <= row["reward"] <= 1 and 0 <= row["truth"] <= 1 for row in rows)
    steps = rows[-1]["step"]
    if trainer == "vineppo":
        continuations = sum(json.loads(row["metrics"])["vine/continuation_tokens"] for row in rows[1:])
        # From each state that differs from the others the rest of the walk, nine times.
        most = 9 * 16 * sum(12 - end for end in (0, 1, 3, 5, 7, 9, 11))
        assert 0.5 * most * steps < continuations <= most * steps
        assert rows[-1]["tokens_generated"] == pytest.approx(steps * length + continuations, rel=0.05)
    else:
        assert rows[-1]["tokens_generated"] == pytest.approx((steps + pretraining) * length, rel=0.05)
    # A critic reads what it values and what it learns from, prompts too; VAPO's once for both after its pretraining.
    read = {"vapo": (steps + 2 * pretraining) * (length + 32), "ppo": 2 * steps * (length + 32)}
    if trainer in read:
        assert rows[-1]["tokens_read"] == pytest.approx(read[trainer], rel=0.05)
    else:
        assert (rows[-1]["tokens_read"] > 0) == (trainer == "sppo")


def test_chains_are_trained_on_and_scored(cache, monkeypatch):
    from benchmarks.credit import chain

    short = {"hidden_size": 32, "layers": 1, "heads": 2, "steps": 2, "batch_size": 4}
    settings = chain.TinyModelSettings
    monkeypatch.setattr(chain, "TinyModelSettings", lambda **given: settings(**short, **given))
    cell = Cell("a", "probe", "chain", 0, 0, 300, {"learning_rate": 1e-3, "beta": 0.03}, evaluation_prompts=16)
    row = cell.run(cache).to_pylist()[-1]
    assert row["tokens_generated"] >= 300 and "truth" not in row
    task = TASKS["chain"]
    prompts = task.prompts(3, torch.Generator().manual_seed(0))
    tokenizer = task.make_tokenizer()
    problems = [text.rstrip("=") for text in tokenizer.batch_decode(prompts, skip_special_tokens=True)]
    solved = tokenizer([solve(problem) + "<|im_end|>" for problem in problems], padding=True)
    completions = torch.tensor(solved["input_ids"])
    assert task.rewards(prompts, completions).tolist() == [1, 1, 1]
    assert task.rewards(prompts, completions.roll(1, 0)).sum() < 3


def test_the_probe_critic_of_the_package_is_asked_between_the_tasks_segments_at_no_cost(cache, tmp_path):
    settings = {"learning_rate": 1e-3, "beta": 0.03, "probe_layers": [1, -1]}
    cell = Cell("a", "probe", "tiny", 0, 0, 400, settings, evaluation_prompts=16)
    rows = cell.run(cache).to_pylist()
    assert rows[-1]["tokens_read"] == 0
    metrics = json.loads(rows[-1]["metrics"])
    assert metrics["critic/states"] == 7  # the first symbol, then a count and a symbol for each of six steps
    assert 0 <= metrics["critic/trust"] <= 1


@pytest.mark.slow
def test_an_untrusted_probe_critic_is_the_batch_mean(cache):
    weights = []
    for trainer, own in (("batch_mean", {}), ("probe", {"critic_trust": 0.0})):
        settings = {"learning_rate": 1e-3, "beta": 0.03, **own}
        cell = Cell("a", trainer, "tiny", 0, 0, 400, settings, evaluation_prompts=64)
        weights.append([row["reward"] for row in cell.run(cache).to_pylist()])
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_oracle_soon_solves_the_task(cache):
    cell = Cell("a", "oracle", "tiny", 0, 0, 6000, {"learning_rate": 1e-3}, evaluate_every=100, evaluation_prompts=512)
    rows = cell.run(cache).to_pylist()
    assert rows[0]["reward"] < 0.6
    assert rows[-1]["reward"] > 0.9


# --- The grid


GRID = """
tasks: [tiny]
fits: [0]
seeds: [0, 1]
tokens: 200
evaluation_prompts: 16
methods:
  - {name: GRPO, trainer: grpo, sweep: {learning_rate: [1.0e-3, 3.0e-3]}}
  - {name: mean, trainer: batch_mean, settings: {learning_rate: 1.0e-3}, seeds: [0], tokens: 100}
"""


def test_a_grid_is_every_method_on_every_task_fit_and_seed(tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID)
    cells = read_grid(tmp_path / "grid.yaml")
    assert [(c.method, c.seed, c.tokens) for c in cells] == [
        ("GRPO, learning_rate 0.001", 0, 200),
        ("GRPO, learning_rate 0.001", 1, 200),
        ("GRPO, learning_rate 0.003", 0, 200),
        ("GRPO, learning_rate 0.003", 1, 200),
        ("mean", 0, 100),
    ]
    assert [c.settings for c in cells[1:3]] == [{"learning_rate": 1e-3}, {"learning_rate": 3e-3}]
    assert len({c.key for c in cells}) == 5
    assert replace(cells[0], method="another name").key == cells[0].key


@pytest.mark.parametrize(
    "wrong, said", [("seeds", "seedz"), ("trainer: grpo", "trainer: gpro"), ("tasks: [tiny]", "tasks: [tinny]")]
)
def test_a_grid_with_a_slip_of_the_pen_is_refused(wrong, said, tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID.replace(wrong, said))
    with pytest.raises(ValueError, match=said.rsplit(" ", 1)[-1].strip("[]")):
        read_grid(tmp_path / "grid.yaml")


@pytest.mark.slow
def test_what_is_done_is_not_run_again(tmp_path, cache):
    (tmp_path / "grid.yaml").write_text(GRID)
    cells = read_grid(tmp_path / "grid.yaml")
    ran = []
    results = tmp_path / "results.parquet"
    run_grid(cells[:1], results, cache, on_done=lambda cell, done: ran.append(cell))
    # An interrupted grid leaves the cells that it finished.
    folder = results.with_suffix(".cells")
    folder.mkdir()
    results.rename(folder / f"{cells[0].key}.parquet")
    table = run_grid([cells[0], cells[4], cells[4]], results, cache, on_done=lambda cell, done: ran.append(cell))
    assert [cell.key for cell in ran] == [cells[0].key, cells[4].key]
    assert not folder.exists()
    assert pq.read_table(results).num_rows == table.num_rows
    assert set(table["cell"].to_pylist()) == {cells[0].key, cells[4].key}
    assert json.loads(table.to_pylist()[0]["settings"]) == {"learning_rate": 1e-3}
    words = report.table(table, (0.0, 2.0), ["mean"])
    assert "| mean | 1 | 0.0k | not reached | 0 of 1 |" in words


# --- Statistics


def test_interquartile_mean_is_that_of_the_middle_half():
    assert statistics.interquartile_mean([100, 1, 2, 3, 4, 5, 6, -100]) == pytest.approx(3.5)
    assert statistics.interquartile_mean([1, 2, 6]) == 3  # too few to cut
    assert statistics.interquartile_mean([1, 2, 3, np.inf]) == 2.5
    assert statistics.interquartile_mean([1, 2, np.inf, np.inf]) == np.inf


def test_probability_of_improvement_is_the_share_of_pairs():
    assert statistics.probability_of_improvement([3, 1], [2, 1]) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    two_tasks = np.array([[1, 0], [1, 0]])
    assert statistics.probability_of_improvement(two_tasks, np.array([[0, 1], [0, 1]])) == 0.5


@pytest.mark.slow
def test_bootstrap_interval_holds_the_mean_nearly_95_times_in_100():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        interval = statistics.stratified_bootstrap(np.mean, random.normal(2, 1, size=(20, 2)), resamplings=300)
        held += interval.low <= 2 <= interval.high
    assert held / 300 == pytest.approx(0.94, abs=0.04)


def test_bootstrap_resamples_runs_within_their_task():
    scores = np.array([[0.0, 10.0]] * 5)  # tasks differ, runs do not
    assert statistics.stratified_bootstrap(np.mean, scores) == (5, 5, 5)


def test_tokens_to_a_threshold_lie_on_the_line_between_two_points():
    tokens, rewards = [0, 100, 200, 300], [0.1, 0.3, 0.7, 0.5]
    assert statistics.tokens_to(tokens, rewards, 0.5) == pytest.approx(150)
    assert statistics.tokens_to(tokens, rewards, 0.1) == 0
    assert statistics.tokens_to(tokens, rewards, 0.8) == np.inf


def test_times_fewer_is_a_ratio_of_middles():
    assert statistics.times_fewer([10, 10, 10], [30, 30, 30]) == 3
    assert statistics.times_fewer([10], [np.inf]) == np.inf
    assert np.isnan(statistics.times_fewer([np.inf], [np.inf]))


def curve(method: str, fit: int, seed: int, tokens: int) -> list[dict]:
    """A run that reaches a reward of 0.8 after so many tokens."""
    run = {"method": method, "cell": f"{method} {fit} {seed}", "fit": fit, "cpu_seconds": 1.0}
    return [
        {**run, "step": 0, "tokens_generated": 0, "reward": 0.1},
        {**run, "step": 1, "tokens_generated": tokens, "reward": 0.8},
    ]


def test_runs_are_resampled_within_their_start_model():
    # Start models differ by a factor of ten, runs do not: with as many runs of each there is nothing to resample.
    rows = [row for fit in range(4) for seed in range(3) for row in curve("ours", fit, seed, 1000 * 10 ** (fit % 2))]
    assert "| 5.5k | 12 of 12 |" in report.table(pa.Table.from_pylist(rows), (0.8,))
    uneven = report.table(pa.Table.from_pylist(rows[2:]), (0.8,))
    assert "10.0k) | 11 of 11 |" in uneven


def test_a_method_is_compared_with_each_that_is_asked_for():
    runs = {"ours": 1000, "one": 2000, "two": 4000}
    rows = [row for method, tokens in runs.items() for fit in (0, 1) for row in curve(method, fit, 0, tokens)]
    head, _, ours, one, _ = report.table(pa.Table.from_pylist(rows), (0.8,), ["one", "two"]).splitlines()
    assert "times fewer than one | probability of improvement | times fewer than two" in head
    assert ours.endswith("| 2.0 | 1.00 | 4.0 | 1.00 |")
    assert one.endswith("|  |  | 2.0 | 1.00 |")


# --- Noise


def test_noise_scale_of_gaussian_gradients_is_trace_over_squared_mean():
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(50)
    mean[0] = 0.5
    moments = Moments()
    for _ in range(4000):  # parts of 4 completions, each of variance 1 in 50 dimensions
        moments.add(mean + torch.randn(50, generator=generator) / 2)
    assert moments.noise_scale(4) == pytest.approx(50 / 0.25, rel=0.05)


@pytest.mark.slow
def test_exact_credit_has_less_noise_than_a_baseline(cache):
    measured = measure_noise("tiny", 0, 1024, cache)
    noise, correlation = measured["noise_scale"], measured["correlation"]
    assert noise["exact, λ 0"] < 0.7 * noise["batch mean"]
    assert measured["headroom"] > 1.5
    assert correlation["exact, λ 0"] == pytest.approx(1.0, abs=1e-4)
    assert 0 < correlation["batch mean"] < correlation["exact, λ 0.9"] < 1


def test_the_table_of_steps_is_a_distribution(tiny):
    task, model = tiny
    steps = transitions(model, task)
    assert steps.shape == (16, 16)
    assert (steps.sum(1) > 0.98).all() and (steps.sum(1) <= 1 + 1e-5).all()
