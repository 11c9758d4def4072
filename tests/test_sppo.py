"""SPPO as a trainer, against the paper's equations written as loops in float64."""

import pytest
import torch
from sppo_oracle import Oracle
from sppo_runs import (
    CONVERSATIONS,
    critic_dir,
    critic_ids,
    make_trainer,
    samples_of,
    share_of_even,
    unscored_now_and_then,
)
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return critic_dir(tmp_path_factory.mktemp("critic"))


def one_to_minus_one(completion_ids, **kwargs):
    return [1 - 2 * share for share in share_of_even(completion_ids)]


def policy_ids(prompt):
    return tiny_tokenizer()(prompt)["input_ids"]


IN_GROUPS = {"num_generations": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
SCENARIOS = {
    "a critic of another family": {},
    "conversations": {"prompts": CONVERSATIONS},
    "three completions a prompt": {"prompts": CONVERSATIONS, **IN_GROUPS},
    "unscored": {"reward": unscored_now_and_then, **IN_GROUPS},
    "another range": {"reward": one_to_minus_one, "reward_range": [-1, 1]},
    "squared error": {"reward": one_to_minus_one, "critic_loss": "mse"},
    "a critic like the policy": {"critic": None, "critic_initial_value": 0.3},
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_steps_are_the_papers(name, model_dir, critic, tmp_path):
    """Values, advantages, losses, gradient norms and the weights of both networks after two updates on one rollout."""
    settings = {"critic": critic, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 2}
    settings |= {"learning_rate": 0.3, **SCENARIOS[name]}
    trainer = make_trainer(model_dir, tmp_path, **settings)
    read = critic_ids if settings["critic"] else policy_ids
    oracle = Oracle(model_dir, trainer.critic, trainer.args, read)
    start = trainer.critic.score.weight.clone()
    trainer.train()

    (rollout,), (rewards,), (rows,) = trainer.rollouts_seen, trainer.rewards_seen, trainer.rows_seen
    samples = samples_of(rollout, rewards)
    # The rollout has what makes this hard.
    assert len(samples) == (12 if "num_generations" in settings else 8)
    assert len({len(sample.prompt) for sample in samples}) > 2
    assert any(not all(sample.trained) for sample in samples)
    assert rewards.isnan().any() == (name == "unscored")

    credit = oracle.judge(samples, [row["prompt"] for row in rows])
    for row, (advantage, value) in enumerate(credit):
        assert rollout["values"][row].item() == pytest.approx(value, abs=1e-6)
        assert rollout["advantages"][row].item() == pytest.approx(advantage or 0, abs=1e-6)
    values = rollout["values"]
    assert values.unique().numel() == (1 if settings["critic"] is None else len(set(map(str, oracle.prompts))))

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
    assert (trainer.critic.score.weight - start).abs().max() > 1e-4
