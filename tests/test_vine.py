"""VinePPO: its functions and its trainer against the paper written as loops in float64."""

import random

import pyarrow.parquet as pq
import pytest
import torch
import vine_oracle
from chain_policy import LENGTH as CHAIN_LENGTH
from chain_policy import chain_policy_dir, no_x, true_value
from datasets import Dataset
from vine_runs import PROMPTS, fixed_rollout, make_trainer, share_of_even

from trl_credit.credit.segment_gae import segment_of_token
from trl_credit.credit.vine import monte_carlo_values, vine_advantages


# --- Functions


def test_values_and_errors_are_those_of_the_oracle_also_where_rewards_are_missing():
    rng = random.Random(0)
    rewards = [[rng.choice([0.0, 1.0, 0.3, None]) for _ in range(5)] for _ in range(40)] + [
        [None] * 5,
        [1, *[None] * 4],
    ]
    table = torch.tensor([[float("nan") if r is None else r for r in row] for row in rewards], dtype=torch.float64)
    values, errors = monte_carlo_values(table)
    for row, value, error in zip(rewards, values.tolist(), errors.tolist(), strict=True):
        expected = vine_oracle.mean(row), vine_oracle.standard_error(row)
        assert [value, error] == pytest.approx([float("nan") if x is None else x for x in expected], nan_ok=True)


def test_advantages_are_differences_of_neighbouring_values_on_every_token():
    rng = random.Random(1)
    ends = [[3, 5, 9], [7], [], [1, 2, 3, 4, 9]]
    returns = [[[rng.random() for _ in range(3)] for _ in row] for row in ends]
    returns[3][2] = [None] * 3  # a state of which no continuation was scored
    rewards = [0.4, -1.0, 0.0, 1.0]
    values = torch.full((4, 5), torch.nan, dtype=torch.float64)
    for row, of_row in enumerate(returns):
        for k, of_state in enumerate(of_row):
            value = vine_oracle.mean(of_state)
            values[row, k] = torch.nan if value is None else value
    mask = torch.arange(9) < torch.tensor([row[-1] if row else 0 for row in ends]).unsqueeze(1)
    found = vine_advantages(values, torch.tensor(rewards), segment_of_token(ends, mask))
    for row, own_ends in enumerate(ends):
        expected = vine_oracle.advantages(own_ends, returns[row], rewards[row])
        assert found[row].tolist() == pytest.approx(expected + [0.0] * (9 - len(expected)), abs=1e-7)
    assert found[3, 1] == found[3, 2] == 0 != found[3, 0]


def test_advantages_of_a_completion_sum_to_its_reward_less_the_prompts_value_once_a_segment():
    values = torch.tensor([[0.5, 0.25, 0.75]])
    advantages = vine_advantages(values, torch.tensor([1.0]), torch.tensor([[0, 0, 1, 2]]))
    assert advantages.tolist() == [[-0.25, -0.25, 0.5, 0.25]]
    assert advantages[0, [0, 2, 3]].sum() == 1 - 0.5


# --- The trainer


def of_prefix(trainer, prompt, written):
    """Rewards of the continuations that were sampled from a state."""
    (prefixes, continuations), (_, completions, rewards) = trainer.sampled[-1], trainer.scored[-1]
    found = [i for i, prefix in enumerate(prefixes) if list(prefix) == [*prompt, *written]]
    for i in found:
        assert completions[i] == [*written, *continuations[i]]
    return [None if rewards[i] != rewards[i] else rewards[i].item() for i in found]


def assert_as_the_oracle(trainer, number):
    rollout, rewards, _ = trainer.rollouts_seen[-1]
    for row, reward in enumerate(rewards.tolist()):
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()].tolist()
        ids = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()].tolist()
        ends = trainer.segmenter(ids, trainer.processing_class)
        if reward != reward or not ids:
            assert rollout["advantages"][row].eq(0).all()
            continue
        returns = [of_prefix(trainer, prompt, ids[:start]) for start in [0, *ends[:-1]]]
        assert {len(of_state) for of_state in returns} == {number}
        expected = vine_oracle.advantages(ends, returns, reward)
        assert rollout["advantages"][row, : len(ids)].tolist() == pytest.approx(expected, abs=1e-6)
        assert rollout["advantages"][row, len(ids) :].eq(0).all()


def unscored_now_and_then(completion_ids, **kwargs):
    rewards = share_of_even(completion_ids)
    return [None if len(ids) % 4 == 3 else reward for ids, reward in zip(completion_ids, rewards, strict=True)]


@pytest.mark.parametrize(
    ("reward", "settings"),
    [
        (share_of_even, {}),
        (share_of_even, {"num_generations": 1, "vine_continuations": 1}),
        (unscored_now_and_then, {}),
        (share_of_even, {"mask_truncated_completions": True}),
        (share_of_even, {"rollout": fixed_rollout, "max_segments": 2, "vine_batch_tokens": 40}),
    ],
    ids=["plain", "1 and 1", "unscored", "truncated masked", "rollout function"],
)
def test_advantages_of_a_rollout_are_those_of_the_oracle(model_dir, tmp_path, reward, settings):
    trainer = make_trainer(model_dir, tmp_path, reward, **{"per_device_train_batch_size": 8, **settings})
    trainer.train()
    assert_as_the_oracle(trainer, trainer.args.vine_continuations)


def test_the_policy_moves_by_these_advantages_over_all_trained_tokens(model_dir, tmp_path):
    """The loss of the first update, where all ratios are 1, is minus the mean advantage of a token."""
    trainer = make_trainer(model_dir, tmp_path, rollout=fixed_rollout, per_device_train_batch_size=8)
    trainer.train()
    rollout, *_ = trainer.rollouts_seen[-1]
    expected = -rollout["advantages"].double().sum() / rollout["completion_mask"].sum()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_a_state_that_several_completions_share_is_sampled_once(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, num_generations=4, per_device_train_batch_size=8)
    trainer.train()
    (prefixes, _), log = trainer.sampled[0], trainer.state.log_history[0]
    states = {tuple(prefix) for prefix in prefixes}
    assert len(prefixes) == 3 * len(states)
    rollout, *_ = trainer.rollouts_seen[0]
    boundaries = sum(
        len(trainer.segmenter(ids[mask.bool()].tolist(), trainer.processing_class))
        for ids, mask in zip(rollout["completion_ids"], rollout["completion_mask"], strict=True)
    )
    assert log["vine/states"] == len(states)
    assert log["vine/equal_states"] == boundaries - len(states) >= 6  # two prompts for eight completions


def test_equal_prompts_of_which_the_rows_differ_are_judged_each_by_its_own(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, reward=lambda goal, **kwargs: goal, per_device_train_batch_size=4)
    trainer.train_dataset = Dataset.from_dict({"prompt": ["a"] * 2, "goal": [0.25, 0.75]})
    trainer.train()
    rollout, rewards, _ = trainer.rollouts_seen[0]
    assert sorted(rewards.tolist()) == [0.25, 0.25, 0.75, 0.75]
    assert rollout["advantages"].abs().max() == 0  # every continuation of a row has the row's reward


def test_nothing_is_sampled_after_the_end_and_no_continuation_outgrows_the_completion(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, per_device_train_batch_size=8, max_steps=2)
    trainer.train()
    end = trainer.processing_class.eos_token_id
    for prefixes, continuations in trainer.sampled:
        assert all(end not in prefix for prefix in prefixes)
        assert all(end not in tokens[:-1] for tokens in continuations)
    for _, completions, _ in trainer.scored:
        assert max(map(len, completions)) <= trainer.args.max_completion_length
        assert all(ids[-1] == end or len(ids) == trainer.args.max_completion_length for ids in completions)


@pytest.mark.slow
def test_values_are_the_probabilities_of_success_within_the_error_of_the_samples(tmp_path):
    """On a policy whose values can be computed: at the prompt and after two letters."""
    model_dir = chain_policy_dir(tmp_path / "model")
    prompts = list("abcd")
    trainer = make_trainer(
        model_dir,
        tmp_path / "run",
        no_x,
        prompts=prompts,
        segmenter=lambda ids, tokenizer, trainable=None: [*range(2, len(ids), 2), len(ids)],
        max_completion_length=CHAIN_LENGTH,
        per_device_train_batch_size=8,
        vine_continuations=400,
    )
    trainer.train()
    prefixes, (_, _, rewards) = trainer.sampled[0][0], trainer.scored[0]
    errors, states = [], list(dict.fromkeys(map(tuple, prefixes)))
    decode = trainer.processing_class.decode
    for state, value in zip(states, rewards.view(-1, 400).mean(1).tolist(), strict=True):
        truth = true_value(decode(state[:1]), decode(state[1:]))
        errors.append((value - truth) / max((truth * (1 - truth) / 400) ** 0.5, 1e-3))
    assert len(states) >= 10
    assert max(map(abs, errors)) < 4  # standard errors
    assert sum(error**2 for error in errors) / len(errors) < 2.5  # as large as they should be, and not larger


def test_what_is_logged_is_what_happened(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, per_device_train_batch_size=8)
    trainer.train()
    log = trainer.state.log_history[0]
    (_, continuations), (_, _, rewards) = trainer.sampled[0], trainer.scored[0]
    rollout, own, _ = trainer.rollouts_seen[0]
    written, tokens = sum(map(len, continuations)), rollout["completion_mask"].sum().item()
    assert log["vine/continuation_tokens"] == written
    assert log["vine/token_share"] == pytest.approx(written / (written + tokens))
    errors = [vine_oracle.standard_error(row) for row in rewards.view(-1, 3).tolist()]
    assert log["vine/value_noise"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert 0 < log["vine/continuation_time"] < log["step_time"]
    # Of the run itself, its own completions alone.
    assert log["num_tokens"] == tokens + rollout["prompt_mask"].sum().item()
    assert log["reward"] == pytest.approx(own.mean().item())
    assert log["completions/mean_length"] == pytest.approx(tokens / 8)


def test_evaluations_are_the_same_and_training_goes_on_as_if_there_were_none(model_dir, tmp_path):
    def run(folder, evaluations):
        # A rollout function, for TRL's own completions of an evaluation are the run's random numbers.
        trainer = make_trainer(
            model_dir,
            folder,
            rollout=fixed_rollout,
            max_steps=2,
            num_generations_eval=2,
            eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}),
        )
        found = [trainer.evaluate() for _ in range(evaluations)]
        trainer.train()
        return found, [entry for entry in trainer.state.log_history if "loss" in entry]

    (first, second), with_evaluations = run(tmp_path / "a", 2)
    names = [name for name in first if "vine/" in name and "time" not in name]
    assert "eval_vine/value_mean" in names and first["eval_vine/continuation_tokens"] > 0
    assert [first[name] for name in names] == pytest.approx([second[name] for name in names], nan_ok=True)
    _, without = run(tmp_path / "b", 0)
    for entry, other in zip(with_evaluations, without, strict=True):
        assert entry["vine/value_mean"] == other["vine/value_mean"]
        assert entry["loss"] == pytest.approx(other["loss"], abs=1e-6)  # rows are shuffled by the run's numbers


@pytest.mark.slow
def test_a_resumed_run_is_the_run_to_the_bit(model_dir, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = make_trainer(model_dir, tmp_path, **settings)
    whole.train()
    weights = {name: weight.clone() for name, weight in whole.model.state_dict().items()}
    resumed = make_trainer(model_dir, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (_, _, before), (_, _, after) in zip(whole.scored[2:], resumed.scored, strict=True):
        assert before.equal(after)
    assert all(weight.equal(weights[name]) for name, weight in resumed.model.state_dict().items())
    # And every step has continuations of its own.
    assert len({tuple(map(tuple, continuations)) for _, continuations in whole.sampled}) == 4


def test_the_viewer_gets_a_value_for_each_token_and_the_segments(model_dir, tmp_path):
    trainer = make_trainer(
        model_dir, tmp_path, per_device_train_batch_size=8, log_credit=True, log_credit_steps=1, log_completions=True
    )
    trainer.train()
    table = pq.read_table(next((tmp_path / "_credit").glob("*.parquet"))).to_pylist()
    assert len(table) == 8
    for row in table:
        length = len(row["token_ids"])
        assert [segment["end"] for segment in row["segments"]][-1] == length
        for segment in row["segments"]:
            inside = slice(segment["start"], segment["end"])
            number = segment["end"] - segment["start"]
            assert row["value"][inside] == pytest.approx([segment["value"]] * number)
            assert row["advantage"][inside] == pytest.approx([segment["advantage"]] * number)
    shown = list(trainer._logs["extra"]["values"])
    assert [len(values) for values in shown] == [len(row["segments"]) for row in table]
    assert shown[0] == [round(segment["value"], 3) for segment in table[0]["segments"]]
