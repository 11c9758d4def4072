"""GenAC where a completion ends: with the token that pads, and where a run was resumed."""

import json

import pytest
from genac_runs import fit_critic, make_trainer
from test_failures import completions


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return fit_critic(tmp_path_factory.mktemp("critic"))


def test_2_a_real_eos_has_its_credit_when_pad_is_eos(pad_is_eos_dir, critic, tmp_path):
    trainer = make_trainer(pad_is_eos_dir, tmp_path, critic=critic, rollout=completions(3, 5, 12, 1))
    trainer.train()
    (rollout,) = trainer.rollouts_seen
    (rewards,) = trainer.rewards_seen
    read = 0
    for row, length in enumerate((3, 5, 12, 1)):
        reading = rollout["readings"][row]
        assert reading.ends[-1] == length and not rollout["advantages"][row, length:].any()
        if reading.scores[-1] is not None:  # λ = 1: the reward less the value of the segment that the end is in
            expected = rewards[row].item() - reading.scores[-1]
            assert rollout["advantages"][row, length - 1].item() == pytest.approx(expected, abs=1e-6)
            read += abs(expected) > 0.01
    assert read > 1


def test_a_resumed_run_has_what_the_critic_is_told_and_what_stands_in(model_dir, critic, tmp_path):
    settings = {"critic": critic, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(model_dir, tmp_path, max_steps=2, **settings)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "genac_state.json").read_text())
    assert saved["success_rate"] == list(trainer.success_rate) and saved["mean_value"] == list(trainer.mean_value)
    resumed = make_trainer(model_dir, tmp_path, max_steps=2, **settings)
    resumed.begin_training(str(tmp_path / "checkpoint-2"))
    assert (resumed.success_rate, resumed.mean_value) == (trainer.success_rate, trainer.mean_value)
    assert resumed.mean_value.weight > 0


def test_the_critic_is_asked_within_its_own_limits_and_at_its_own_temperature(model_dir, critic, tmp_path):
    cold = make_trainer(model_dir, tmp_path, critic=critic, critic_temperature=1e-4, num_generations=4)
    cold.train()
    answers = [tuple(a) for r in cold.rollouts_seen[0]["readings"] for a in r.answers[:1]]
    assert len(answers) == 4 == cold.args.num_generations and len(set(answers)) == 1, "one prompt, and no noise"
    warm = make_trainer(model_dir, tmp_path, critic=critic, critic_max_completion_length=5)
    warm.train()
    lengths = [len(a) for r in warm.rollouts_seen[0]["readings"] if r for a in r.answers]
    assert max(lengths) == 5


def test_the_context_of_the_critics_engine_bounds_what_it_is_asked(model_dir, critic, tmp_path):
    settings = {"critic_vllm_mode": "colocate", "critic_vllm_max_model_length": 70, "critic_max_completion_length": 8}
    trainer = make_trainer(model_dir, tmp_path, critic=critic, **settings)
    assert trainer.critic_context == 70 and trainer.critic_reader.context == 70
