"""Rewards per turn, from reward functions and from environments."""

import json
import math
from importlib.resources import files
from unittest.mock import patch

import pytest
import sppo_runs
import torch
from datasets import Dataset
from test_turns import credit_of_turns
from tiny import tiny_model_dir
from vapo_oracle import policy_lambda
from vapo_runs import SETTINGS, Watched, fixed_rollout, make_trainer, samples_of

from trl_credit import VAPOConfig
from trl_credit.credit.boundaries import turn_ends


def told_rollout(prompts, trainer):
    """Completions of one to three turns, and for the reward functions who wrote which token."""
    rollout = fixed_rollout(prompts, trainer)
    return {**rollout, "chosen": [list(mask) for mask in rollout["env_mask"]]}


def turns_of(chosen) -> list[int]:
    """The last token of each turn, one token at a time."""
    return [t for t, own in enumerate(chosen) if own and (t + 1 == len(chosen) or not chosen[t + 1])]


def per_turn(completion_ids, chosen, **kwargs):
    return [[0.25 * (k + 1) - 0.4 for k in range(len(turns_of(mask)))] for mask in chosen]


def test_the_end_of_a_turn_is_its_last_token():
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    assert turn_ends(mask).int().tolist() == [[0, 1, 0, 1, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    "settings",
    [
        {"time_step": "turn", "policy_lambda": 0.6, "gamma": 0.9, "critic_lambda": 0.8},
        {"time_step": "turn", "length_adaptive_alpha": 1.5, "reward_range": "running"},
        {"time_step": "token", "policy_lambda": 0.7, "gamma": 0.95},
    ],
    ids=["turns", "turns, bounded", "tokens"],
)
def test_advantages_are_those_of_rewards_at_the_last_tokens_of_turns(settings, model_dir, tmp_path):
    settings = {"per_device_train_batch_size": 8, "positive_lm_coef": 0.0, **settings}
    trainer = make_trainer(model_dir, tmp_path, per_turn, told_rollout, **settings)
    trainer.train()
    (rollout,), (rewards,) = trainer.rollouts_seen, trainer.rewards_seen
    several = 0
    for row, sample in enumerate(samples_of(trainer, rollout, rewards)):
        ends = turns_of(sample.trained)
        sample.rewards = [0.0] * len(sample.completion)
        for k, end in enumerate(ends):
            sample.rewards[end] = 0.25 * (k + 1) - 0.4
        assert rewards[row].item() == pytest.approx(sum(sample.rewards), abs=1e-6)
        values = [*rollout["values"][row].double().tolist(), 0.0]
        if trainer.args.time_step == "turn":
            lam = policy_lambda(trainer.args, len(ends))
            expected = {t: a for t, (a, _, _) in credit_of_turns(sample, values, trainer.args.gamma, lam, 0.0).items()}
        else:
            expected, following, advantage = {}, 0.0, 0.0
            for t in reversed([t for t, own in enumerate(sample.trained) if own]):
                delta = sample.rewards[t] + trainer.args.gamma * following - values[t]
                advantage = delta + trainer.args.gamma * 0.7 * advantage
                following = values[t]
                expected[t] = advantage
        for t, advantage in expected.items():
            assert rollout["advantages"][row, t].item() == pytest.approx(advantage, abs=1e-5)
        several += len(ends) > 1
    assert several > 1


def test_rewards_per_turn_per_token_and_of_all_are_added_where_they_fall(model_dir, tmp_path):
    def first_token(completion_ids, **kwargs):
        return [[1.0] + [0.0] * (len(ids) - 1) for ids in completion_ids]

    def of_all(completion_ids, **kwargs):
        return [10.0] * len(completion_ids)

    settings = {"reward_weights": [2.0, 1.0, 1.0], "per_device_train_batch_size": 8}
    trainer = make_trainer(model_dir, tmp_path, [per_turn, first_token, of_all], told_rollout, **settings)
    fallen = []
    before = trainer.rewards_where_they_fall
    trainer.rewards_where_they_fall = lambda *args: fallen.append(before(*args)) or fallen[-1]
    trainer.train()
    (rollout,) = trainer.rollouts_seen
    for row, mask in enumerate(rollout["completion_mask"]):
        chosen = rollout["tool_mask"][row][: int(mask.sum())].tolist()
        expected = torch.zeros(len(mask))
        for k, end in enumerate(turns_of(chosen)):
            expected[end] += 2 * (0.25 * (k + 1) - 0.4)
        expected[0] += 1
        expected[max(t for t, own in enumerate(chosen) if own)] += 10
        torch.testing.assert_close(fallen[0][row], expected)


def test_a_turn_that_is_not_scored_earns_nothing(model_dir, tmp_path):
    def last_alone(completion_ids, chosen, **kwargs):
        rows = [[None] * (len(turns_of(mask)) - 1) + [0.5] for mask in chosen]
        rows[0] = [None for _ in rows[0]]
        return rows

    trainer = make_trainer(model_dir, tmp_path, last_alone, told_rollout, per_device_train_batch_size=8)
    trainer.train()
    rewards = trainer.rewards_seen[0].tolist()
    assert math.isnan(rewards[0]) and rewards[1:] == [0.5] * 7


def test_a_completion_that_is_masked_needs_no_turns(model_dir, tmp_path):
    settings = {"mask_truncated_completions": True, "per_device_train_batch_size": 8}
    trainer = make_trainer(model_dir, tmp_path, per_turn, told_rollout, **settings)
    trainer.train()
    (rollout,) = trainer.rollouts_seen
    masked = ~rollout["completion_mask"].any(1)
    assert 0 < masked.sum() < 8 and rollout["advantages"].isfinite().all() and not rollout["advantages"][masked].any()


# --- What is refused


def test_another_number_than_that_of_the_turns_is_refused_by_name(model_dir, tmp_path):
    def one_too_many(completion_ids, chosen, **kwargs):
        return [[0.0] * (len(turns_of(mask)) + 1 + (len(mask) == 2)) for mask in chosen]

    trainer = make_trainer(model_dir, tmp_path, one_too_many, told_rollout)
    message = r"'one_too_many' returned \d rewards for completion 0, which has \d+ tokens in \d turns? of the policy"
    with pytest.raises(ValueError, match=message.replace("turns?", "turns")):
        trainer.train()


def test_a_turn_that_is_infinite_is_named(model_dir, tmp_path):
    def infinite(completion_ids, chosen, **kwargs):
        return [[math.inf] * len(turns_of(mask)) for mask in chosen]

    with pytest.raises(ValueError, match="'infinite' returned inf for turn 0 of completion"):
        make_trainer(model_dir, tmp_path, infinite, told_rollout).train()


def test_a_trainer_that_gives_a_completion_one_advantage_refuses_them_by_name(model_dir, tmp_path):
    def two_turns(completion_ids, **kwargs):
        return [[0.5, 0.5]] * len(completion_ids)

    with pytest.raises(
        TypeError, match=r"\(list\) for completion 0.* are for trainers that place them, as VAPOTrainer"
    ):
        sppo_runs.make_trainer(model_dir, tmp_path, two_turns).train()


# --- An environment


class Doors:
    """Each turn opens a door; the environment says what that was worth, and what the last word was worth."""

    def reset(self, **kwargs):
        self.worth = []

    def open(self, number: int) -> str:
        """
        Opens a door.

        Args:
            number: Which one.

        Returns:
            What is behind it.
        """
        self.worth.append(0.5 * number)
        return "A wall."

    def get_reward(self):
        return [*self.worth, -1.0]


def test_an_environment_rewards_each_turn(tmp_path):
    template = (files("trl") / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    model_dir = str(tiny_model_dir(tmp_path, chat_template=template, max_position_embeddings=4096))
    settings = {"time_step": "turn", "policy_lambda": 1.0, "critic_initial_value": 0.25}
    args = VAPOConfig(str(tmp_path), **{**SETTINGS, **settings, "max_completion_length": 2048})
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Go."}]] * 4})
    trainer = Watched(model_dir, args=args, train_dataset=prompts, environment_factory=Doors)
    tokenizer = trainer.processing_class
    calls = [json.dumps({"name": "open", "arguments": {"number": number}}) for number in (1, 3)]
    said = iter([*(f"<tool_call>\n{call}\n</tool_call><|im_end|>" for call in calls), "No.<|im_end|>"])

    def write(input_ids, **kwargs):
        return torch.cat([input_ids, torch.tensor([tokenizer(next(said))["input_ids"]] * len(input_ids))], 1)

    with patch.object(trainer.model, "generate", write):
        trainer.train()
    (rollout,), (rewards,) = trainer.rollouts_seen, trainer.rewards_seen
    assert rewards.tolist() == [0.5 + 1.5 - 1.0] * 4
    ends = turns_of(rollout["tool_mask"][0].tolist())
    assert len(ends) == 3
    to_come = [1.0, 0.5, -1.0]
    assert [rollout["advantages"][0, end].item() for end in ends] == pytest.approx([x - 0.25 for x in to_come])
