"""Turns as the time steps of an agent's credit."""

import copy

import pytest
import torch
from tiny import tiny_model
from vapo_oracle import policy_lambda, states
from vapo_runs import even_tokens, make_trainer, samples_of, share_of_even

from trl_credit.critics.token import make_token_critic


def credit_of_turns(sample, values, gamma, lam, after):
    """Advantage and return of each turn, by the first of its tokens, as loops in float64."""
    begins = [t for t, trained in enumerate(sample.trained) if trained and (t == 0 or not sample.trained[t - 1])]
    advantage, out = 0.0, {}
    for k in reversed(range(len(begins))):
        t = begins[k]
        end = begins[k + 1] if k + 1 < len(begins) else len(sample.completion)
        following = values[end] if k + 1 < len(begins) else after
        delta = sum(sample.rewards[t:end]) + gamma * following - values[t]
        advantage = delta + gamma * lam * advantage
        out[t] = (advantage, advantage + values[t], values[t])
    return out


@pytest.mark.parametrize(
    "settings",
    [
        {"policy_lambda": 0.7, "gamma": 0.9, "critic_lambda": 0.8},
        {"length_adaptive_alpha": 1.5},
        {"policy_lambda": 0.6, "gamma": 0.95, "reward": even_tokens},
        {"policy_lambda": 0.6, "truncation": "bootstrap", "reward_range": [-0.5, 1.0], "critic_loss": "mse"},
    ],
    ids=["terminal reward", "length-adaptive", "a reward per token", "bootstrap, bounded"],
)
def test_advantages_and_returns_are_those_of_turns(settings, model_dir, tmp_path):
    critic = make_token_critic(tiny_model(seed=1))
    with torch.no_grad():
        critic.score.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    settings = {"time_step": "turn", "per_device_train_batch_size": 8, "positive_lm_coef": 0.0, **settings}
    trainer = make_trainer(model_dir, tmp_path, critic=copy.deepcopy(critic), **settings)
    args = trainer.args
    trainer.train()
    rollout, rewards = trainer.rollouts_seen[0], trainer.rewards_seen[0]
    samples = samples_of(trainer, rollout, rewards, per_token=settings.get("reward") is even_tokens)
    loss, count, most_turns = 0.0, 0, 0
    for row, sample in enumerate(samples):
        outputs = states(copy.deepcopy(critic).double(), sample)
        if args.reward_range is not None:
            low, high = args.reward_range
            outputs = low + (high - low) / (1 + (-outputs).exp())
        values = outputs.tolist()
        after = values[-1] if args.truncation == "bootstrap" and sample.cut_off else 0.0
        turns = sum(trained and (t == 0 or not sample.trained[t - 1]) for t, trained in enumerate(sample.trained))
        advantages = credit_of_turns(sample, values, args.gamma, policy_lambda(args, turns), after)
        returns = credit_of_turns(sample, values, args.gamma, args.critic_lambda, after)
        expected = torch.zeros(2, rollout["advantages"].shape[1], dtype=torch.float64)
        begins = 0
        for t, trained in enumerate(sample.trained):
            begins = t if t in advantages else begins
            expected[:, t] = torch.tensor([advantages[begins][0], advantages[begins][2]]) * trained
        torch.testing.assert_close(rollout["advantages"][row].double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rollout["values"][row].double(), expected[1], rtol=1e-5, atol=1e-5)
        assert rollout["critic_mask"][row].nonzero().flatten().tolist() == sorted(returns)
        for t, (_, target, value) in returns.items():
            assert rollout["returns"][row, t].item() == pytest.approx(target, abs=1e-5)
            loss, count = loss + 0.5 * (value - target) ** 2, count + 1
        most_turns = max(most_turns, turns)
    assert most_turns > 1 and count < rollout["completion_mask"].sum()
    log = trainer.state.log_history[0]
    assert log["critic/loss"] == pytest.approx(loss / count, rel=1e-4)


def test_a_completion_without_tools_is_one_step(model_dir, tmp_path):
    settings = {"time_step": "turn", "policy_lambda": 0.3, "rollout": None}
    trainer = make_trainer(model_dir, tmp_path, share_of_even, **settings)
    trainer.train()
    rollout, rewards = trainer.rollouts_seen[0], trainer.rewards_seen[0]
    mask = rollout["completion_mask"].bool()
    expected = torch.where(mask, (rewards - rollout["values"][:, 0]).unsqueeze(1), 0)
    torch.testing.assert_close(rollout["advantages"], expected)
    assert rollout["critic_mask"].sum(1).tolist() == [1] * len(rewards)


def test_turns_are_not_for_a_probe_critic_which_has_boundaries_of_its_own(model_dir, tmp_path):
    with pytest.raises(ValueError, match="`time_step='turn'` cannot be had with a probe critic"):
        settings = {"critic_learning_rate": None, "time_step": "turn"}
        make_trainer(model_dir, tmp_path, critic="probe", beta=0.1, **settings)
