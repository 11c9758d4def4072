"""A critic's pretraining on stored rollouts: written once, read without the policy, several passes, the best kept."""

import pytest
import sppo_runs
import torch
import vapo_runs
from tiny import tiny_model_dir

from trl_credit import SPPOTrainer, VAPOTrainer


# 4 rollouts of 4 completions, 2 of each prompt, of which there are 8: all of them once.
SETTINGS = {
    "critic_pretraining_steps": 4,
    "critic_pretraining_epochs": 3,
    "critic_pretraining_held_out": 0.25,
    "num_generations": 2,
    "critic_learning_rate": 1e-2,
    "critic_head_learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


def vapo(model_dir, folder, rollouts, **settings):
    settings = {"trainer": VAPOTrainer, **SETTINGS, "critic_pretraining_rollouts": str(rollouts), **settings}
    return vapo_runs.make_trainer(model_dir, folder, **settings)


def sppo(model_dir, folder, rollouts, **settings):
    settings = {"trainer": SPPOTrainer, **SETTINGS, "critic_pretraining_rollouts": str(rollouts), **settings}
    return sppo_runs.make_trainer(model_dir, folder, **settings)


def never(*args, **kwargs):
    raise AssertionError("something was generated")


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.critic.parameters()])


def held_out(trainer, name="error"):
    name = f"critic_pretraining/held_out_{name}"
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("make_trainer", [vapo, sppo])
def test_rollouts_are_written_once_and_whoever_reads_them_generates_nothing(make_trainer, model_dir, tmp_path):
    writer = make_trainer(model_dir, tmp_path / "a", tmp_path / "rollouts", disable_tqdm=False)
    done = writer.pretrain_critic()
    assert len(list((tmp_path / "rollouts").glob("*.arrow"))) == 4
    # 6 of 8 prompts, 12 of 16 completions, are 3 rollouts.
    assert done["pretraining_rollouts"] == done["pretraining_steps"] <= 3 * 3
    reader = make_trainer(model_dir, tmp_path / "b", tmp_path / "rollouts")
    reader.rollout_func = reader._generate_and_score_completions = never
    assert reader.pretrain_critic() == done
    assert torch.equal(weights(writer), weights(reader))
    assert held_out(writer) == held_out(reader) and len(held_out(reader)) == done["pretraining_steps"] // 3
