"""VAPO as a trainer, against the papers' equations written as loops in float64."""

import copy

import pytest
import torch
from vapo_oracle import Oracle
from vapo_runs import even_tokens, make_trainer, samples_of, share_of_even


@pytest.fixture(scope="module")
def critic():
    """One that has learned something: the head of a fresh one is zero."""
    from tiny import tiny_model

    from trl_credit.critics.token import make_token_critic

    network = make_token_critic(tiny_model(seed=1))
    with torch.no_grad():
        network.score.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    return network


def unscored_now_and_then(completion_ids, **kwargs):
    rewards = share_of_even(completion_ids)
    return [None if len(ids) % 5 == 4 else reward for ids, reward in zip(completion_ids, rewards, strict=True)]


SCENARIOS = {
    # α·l is 1.5 at the shortest completion for which λ is not 0, and 18 at the longest.
    "vapo": {"length_adaptive_alpha": 1.5},
    "vapo, groups of 4": {"length_adaptive_alpha": 1.5, "num_generations": 4},
    "ppo": {
        "policy_lambda": 0.95,
        "critic_lambda": 0.95,
        "epsilon_high": 0.2,
        "positive_lm_coef": 0.0,
        "critic_clip_range": 0.05,
    },
    "vc_ppo": {"policy_lambda": 0.95, "positive_lm_coef": 0.0, "epsilon_high": 0.2},
    "bootstrap": {"policy_lambda": 0.7, "critic_lambda": 0.8, "gamma": 0.9, "truncation": "bootstrap"},
    "relative position": {"policy_lambda": "relative_position", "relative_position_weight": 0.3},
    "a reward per token": {"policy_lambda": 0.6, "gamma": 0.95, "reward": even_tokens},
    "bounded values": {"policy_lambda": 0.7, "reward_range": [-0.5, 1.0], "critic_clip_range": 0.05},
    "bounded values, cross-entropy": {
        "policy_lambda": 0.7,
        "critic_lambda": 0.9,
        "critic_loss": "bce",
        "reward_range": [-0.5, 0.75],
        "truncation": "bootstrap",
    },
    "unscored": {"length_adaptive_alpha": 1.5, "reward": unscored_now_and_then},
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_steps_are_the_textbooks(name, model_dir, critic, tmp_path):
    """Advantages, returns, losses, gradient norms and the weights of both networks after two updates on one rollout."""
    settings = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 2, **SCENARIOS[name]}
    trainer = make_trainer(model_dir, tmp_path, critic=copy.deepcopy(critic), learning_rate=0.3, **settings)
    oracle = Oracle(model_dir, trainer.critic, trainer.args)
    trainer.train()

    rollout, rewards = trainer.rollouts_seen[0], trainer.rewards_seen[0]
    assert len(trainer.rollouts_seen) == 1 and len(rewards) == 8
    samples = samples_of(trainer, rollout, rewards, per_token=settings.get("reward") is even_tokens)
    # The rollout has what makes this hard.
    assert any(sample.cut_off for sample in samples) and any(not sample.cut_off for sample in samples)
    assert any(not all(sample.trained) for sample in samples)
    assert any(not sample.trained[-1] for sample in samples) or settings.get("num_generations", 1) == 4
    assert (rewards.isnan().any()) == (name == "unscored")

    credit = oracle.judge(samples)
    for row, tokens in enumerate(credit):
        expected = torch.zeros(3, rollout["advantages"].shape[1], dtype=torch.float64)
        for t, numbers in tokens.items():
            expected[:, t] = torch.tensor(numbers)
        for key, numbers in zip(("advantages", "returns", "values"), expected, strict=True):
            torch.testing.assert_close(rollout[key][row].double(), numbers, rtol=1e-5, atol=1e-5)

    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in log:
        expected = oracle.step(samples, credit)
        assert entry["critic/loss"] == pytest.approx(expected["critic_loss"], rel=1e-4)
        assert entry["critic/grad_norm"] == pytest.approx(expected["critic_norm"], rel=1e-4)
        assert entry["grad_norm"] == pytest.approx(expected["policy_norm"], rel=1e-4)
    assert log[1]["clip_ratio/region_mean"] > 0  # the second update has ratios to clip
    for ours, theirs in ((trainer.model, oracle.policy), (trainer.critic, oracle.critic)):
        for (parameter_name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=2e-6, msg=parameter_name)
    moved = (trainer.critic.score.weight - critic.score.weight).abs().max()
    assert moved > 1e-4
