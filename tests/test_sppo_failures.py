"""
What has gone wrong with critics elsewhere, for a critic that reads prompts. The numbers are those of the table in
`docs/failures.md`, which says where its other rows are tested.
"""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from sppo_runs import critic_dir, critic_tokenizer, make_critic, make_trainer, rollout_of
from tiny import tiny_model_dir


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return critic_dir(tmp_path_factory.mktemp("critic"))


def ones(completions, **kwargs):
    return [1.0] * len(completions)


def one_ends_at_once(prompts, trainer):
    rollout = rollout_of(prompts, trainer)
    end = {"completion_ids": trainer.processing_class.eos_token_id, "logprobs": 0.0, "env_mask": 1}
    for name, value in end.items():
        rollout[name][0] = [value]
    return rollout


def test_2_the_advantage_reaches_a_real_eos_when_pad_is_eos(tmp_path):
    model_dir = tiny_model_dir(tmp_path / "model", pad_is_eos=True)
    trainer = make_trainer(model_dir, tmp_path, ones, one_ends_at_once, critic_initial_value=0.5)
    trainer.train()
    rollout = trainer.rollouts_seen[0]
    is_eos = rollout["completion_ids"] == trainer.processing_class.eos_token_id
    real = (is_eos & rollout["completion_mask"].bool()).sum(1)
    assert real.max() == 1 and is_eos.sum() > real.sum() > 0, "one in the mask, and padding that is not"
    assert rollout["completion_mask"].sum(1).min() == 1, "a completion that is nothing but its end"
    assert rollout["advantages"].abs().min() > 0.4, "all scored: R is 1 and V a half"


def test_10_values_and_trained_weights_are_float32_where_the_checkpoint_is_read_in_bf16(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic, critic_model_init_kwargs={"dtype": "bfloat16"})
    trainer.train()
    assert trainer.critic.model.dtype == torch.float32 and trainer.critic.score.weight.dtype == torch.float32
    values = trainer.rollouts_seen[0]["values"]
    assert values.dtype == torch.float32 and (values != values.bfloat16().float()).any()
    assert math.isfinite(trainer.state.log_history[0]["critic/loss"])


def test_10_a_fresh_critic_explains_nothing_instead_of_minus_72(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["critic/explained_variance"] == pytest.approx(0, abs=1e-9)


def test_11_values_are_the_same_each_time_in_training_mode(model_dir, tmp_path):
    folder = critic_dir(tmp_path / "critic", attention_dropout=0.5)
    trainer = make_trainer(model_dir, tmp_path, critic=folder)
    trainer.critic.train()
    prompts = torch.tensor([[7, 8, 9], [10, 11, 12]])
    assert torch.equal(trainer.critic_reader.prompt_values(prompts), trainer.critic_reader.prompt_values(prompts))


def test_13_the_policy_is_saved_without_the_critic_in_it(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic)
    trainer.train()
    trainer.save_model()
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (model_dir, tmp_path))
    assert before.keys() == after.keys() and not before["lm_head.weight"].equal(after["lm_head.weight"])


def test_17_18_the_critic_gets_all_its_pretraining_steps_before_the_policy_moves(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic, critic_pretraining_steps=3)
    trainer.train()
    log = trainer.state.log_history
    assert len([entry for entry in log if "critic_pretraining/loss" in entry]) == 3
    assert trainer.engine.steps == 4
    assert [entry["learning_rate"] for entry in log if "loss" in entry] == [1e-2]
    # The values of each rollout are those of the critic that the updates before it have left.
    values = [rollout["values"].mean().item() for rollout in trainer.rollouts_seen]
    assert len(values) == len(set(values)) == 4


def test_17_pretraining_ends_early_at_its_thresholds(model_dir, critic, tmp_path):
    def run(**thresholds):
        trainer = make_trainer(model_dir, tmp_path, critic=critic, critic_pretraining_steps=4, **thresholds)
        trainer.train()
        return trainer._pretraining["pretraining_steps"]

    # The loss is the cross-entropy of every target, which is at least the entropy of the rewards.
    assert run(critic_pretraining_loss_threshold=5.0) == 1
    assert run(critic_pretraining_loss_threshold=0.01) == 4
    assert run(critic_pretraining_explained_variance_threshold=-1e3) == 1


def test_25_a_completion_without_a_reward_is_left_out_of_both_losses_and_poisons_nothing(model_dir, critic, tmp_path):
    def some(completions, **kwargs):
        return [None if i == 1 else 1.0 for i in range(len(completions))]

    trainer = make_trainer(model_dir, tmp_path, some, critic=critic)
    trainer.train()
    rollout = trainer.rollouts_seen[0]
    assert rollout["critic_targets"].isnan().tolist() == [False, True, False, False]
    assert rollout["advantages"][1] == 0 and rollout["advantages"].isfinite().all()
    assert sum(trainer.prompts_read) == 4 + 3, "no target, no pass"
    assert all(p.isfinite().all() for p in (*trainer.model.parameters(), *trainer.critic.parameters()))
    # -log V of the three, by the critic as it was.
    expected = -rollout["values"][[0, 2, 3]].double().log().mean().item()
    assert trainer.state.log_history[0]["critic/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_critic_as_it_was(model_dir, tmp_path):
    network = make_critic()
    with torch.no_grad():
        network.score.bias.fill_(torch.inf)
    settings = {"critic": network, "critic_processing_class": critic_tokenizer(), "critic_loss": "mse"}
    trainer = make_trainer(model_dir, tmp_path, prompts=["  "] * 8, **settings)
    weights = copy.deepcopy(trainer.critic.state_dict())
    rollout = {"critic_prompts": torch.tensor([[7, 8]]), "critic_targets": torch.tensor([1.0])}
    trainer.engine.begin(1)
    with pytest.raises(FloatingPointError, match="critic's loss is inf in its update 1"):
        trainer.update_critic([rollout])
    assert all(torch.equal(weights[name], p) for name, p in trainer.critic.state_dict().items())
