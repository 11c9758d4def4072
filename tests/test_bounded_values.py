"""Values that are bounded to the range of the reward."""

import json

import pytest
import torch
from vapo_runs import even_tokens, make_trainer, share_of_even

from trl_credit.credit.bounded_values import bounded_values, output_for, position_in_range
from trl_credit.critics.loading import load_critic


def right(completion_ids, **kwargs):
    """A verifiable reward."""
    return [float(len(ids) % 2) for ids in completion_ids]


def two(completion_ids, **kwargs):
    return [2.0] * len(completion_ids)


def test_a_logit_of_0_is_the_middle_and_large_ones_are_the_ends():
    values = bounded_values(torch.tensor([-100.0, 0.0, torch.tensor(3.0).log().item(), 100.0]), (-1, 3))
    assert values.tolist() == pytest.approx([-1, 1, 2, 3])


def test_an_output_without_a_range_is_the_value():
    assert bounded_values(torch.tensor([7.0]), None).tolist() == [7.0]
    assert output_for(7.0, None) == 7.0


@pytest.mark.parametrize("value", [-0.9, 0.0, 2.75])
def test_the_output_for_a_value_gives_that_value(value):
    output = torch.tensor(output_for(value, (-1, 3)), dtype=torch.float64)
    assert bounded_values(output, (-1, 3)).item() == pytest.approx(value)


def test_targets_are_where_a_return_lies_in_the_range():
    assert position_in_range(torch.tensor([-1.0, 0.0, 3.0, 3.00001]), (-1, 3)).tolist() == [0, 0.25, 1, 1]


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_a_fresh_critic_starts_at_the_mean_reward_and_stays_in_range(loss, model_dir, tmp_path):
    settings = {"critic_loss": loss, "reward_range": [0, 1], "critic_learning_rate": 0.3, "max_steps": 3}
    trainer = make_trainer(model_dir, tmp_path, right, **settings)
    trainer.train()
    first, last = trainer.rollouts_seen[0], trainer.rollouts_seen[-1]
    mean = trainer.rewards_seen[0].mean().item()
    assert 0.05 < mean < 0.95
    assert first["values"][first["critic_mask"]].tolist() == pytest.approx([mean] * int(first["critic_mask"].sum()))
    values = last["values"][last["critic_mask"]]
    assert values.std() > 0.01 and values.min() >= 0 and values.max() <= 1
    assert trainer.critic(input_ids=last["prompt_ids"]).logits.abs().max() > 1  # the network puts out logits


def test_a_mean_at_the_end_of_the_range_still_has_a_logit(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, two, reward_range=[0, 2])
    trainer.train()
    rollout = trainer.rollouts_seen[0]
    assert rollout["values"][rollout["critic_mask"]].unique().item() == pytest.approx(1.9)


def test_cross_entropy_alone_learns_the_range(model_dir, tmp_path):
    assert make_trainer(model_dir, tmp_path, right, critic_loss="bce").args.reward_range == "running"


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_a_reward_outside_is_refused_and_its_function_named(loss, model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, two, critic_loss=loss, reward_range=[0, 1])
    with pytest.raises(ValueError, match=r"reward 2 of completion 0 .* `reward_range=\[0.0, 1.0\]` \('two' gave 2"):
        trainer.train()


def test_rewards_per_token_whose_return_leaves_the_range_are_refused(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, even_tokens, reward_range=[-0.1, 0.1])
    with pytest.raises(ValueError, match="reward_range"):
        trainer.train()


def test_what_is_still_to_come_at_a_token_counts_not_only_the_sum(model_dir, tmp_path):
    def up_and_down(completion_ids, **kwargs):
        return [[1.0] * (len(ids) > 1) + [0.0] * (len(ids) - 2) + [-1.0] for ids in completion_ids]

    trainer = make_trainer(model_dir, tmp_path, up_and_down, None, reward_range=[-0.5, 1])
    with pytest.raises(ValueError, match=r"returns at step 0 go from -1 to .* outside of `reward_range"):
        trainer.train()


def test_a_saved_critic_is_read_as_it_was_trained(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, reward_range=[-0.4, 0.6], critic_learning_rate=0.3, max_steps=2)
    trainer.train()
    rollout = trainer.rollouts_seen[-1]
    trainer.save_model()
    folder = tmp_path / "critic"
    assert json.loads((folder / "critic.json").read_text())["settings"]["reward_range"] == [-0.4, 0.6]
    assert "values = -0.4 + 1 * outputs.sigmoid()" in (folder / "README.md").read_text()
    ours, loaded = trainer.state_values(rollout), load_critic(str(folder), trainer.processing_class)
    assert loaded.reward_range == [-0.4, 0.6]
    torch.testing.assert_close(loaded.state_values(rollout), ours, equal_nan=True)

    again = make_trainer(model_dir, tmp_path / "again", critic=str(folder))
    assert again.args.reward_range == [-0.4, 0.6]  # of its own accord
    with pytest.raises(ValueError, match=r"`reward_range=\[0.0, 1.0\]` is asked for"):
        make_trainer(model_dir, tmp_path / "other", critic=str(folder), reward_range=[0, 1])


def test_resuming_gives_the_values_of_a_run_that_went_on(model_dir, tmp_path):
    settings = {"reward": share_of_even, "reward_range": [-0.4, 0.6], "critic_loss": "bce", "save_strategy": "steps"}
    whole = make_trainer(model_dir, tmp_path, max_steps=2, save_steps=1, **settings)
    whole.train()
    resumed = make_trainer(model_dir, tmp_path, max_steps=2, save_steps=1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(resumed.rollouts_seen[-1]["values"], whole.rollouts_seen[-1]["values"])
