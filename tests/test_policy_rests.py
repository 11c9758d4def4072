"""In the critic's pretraining the policy writes and does nothing else."""

import pytest
from vapo_runs import Watched, make_trainer


def run(model_dir, folder, **settings):
    """A pretraining of 2 updates and 2 steps of the policy; how often each network was called by then, and after."""
    trainer = make_trainer(
        model_dir,
        folder,
        trainer=Watched,
        critic_pretraining_steps=2,
        max_steps=2,
        num_generations=2,
        **settings,
    )
    calls, networks = [], {"policy": trainer.model, "reference": trainer.ref_model}
    for name, network in networks.items():
        if network is not None:
            network.register_forward_hook(lambda *_, name=name: calls.append((name, trainer.engine.steps)))
    trainer.train()
    before = [name for name, updates in calls if updates < 2]
    return trainer, before, [name for name, updates in calls if updates >= 2]


def test_no_old_and_no_reference_policy_is_asked_in_pretraining(model_dir, tmp_path):
    """With a rollout function, so that nothing is generated; TRL asks for both with every rollout here."""
    _, before, after = run(model_dir, tmp_path, beta=0.04, num_iterations=2)
    assert before == []
    assert after.count("reference") == 1 and after.count("policy") == 1 + 2  # a rollout for two steps


def test_the_pretraining_is_the_same_as_if_they_were_asked(model_dir, tmp_path):
    found = []
    for beta in (0.0, 0.04):
        trainer, *_ = run(model_dir, tmp_path / str(beta), beta=beta, num_iterations=2)
        log = [entry for entry in trainer.state.log_history if "critic_pretraining/loss" in entry]
        found.append([{name: value for name, value in entry.items() if "time" not in name} for entry in log])
    assert len(found[0]) == 2 and found[0] == found[1]


def test_what_samplers_say_of_a_rollout_is_still_known_in_pretraining(model_dir, tmp_path):
    asked = []

    class Asks(Watched):
        def assign_credit(self, rollout, rewards, mode):
            asked.append(self.sampler_logps(rollout))
            return super().assign_credit(rollout, rewards, mode)

    trainer = make_trainer(model_dir, tmp_path, trainer=Asks, critic_pretraining_steps=2, num_iterations=2)
    trainer.train()
    assert len(asked) >= 3 and all(logps.shape[0] > 0 and (logps <= 0).all() for logps in asked)


def test_an_error_while_a_rollout_is_made_leaves_no_trace(model_dir, tmp_path):
    def broken(prompts, trainer):
        raise ZeroDivisionError

    trainer = make_trainer(model_dir, tmp_path, critic_pretraining_steps=1, rollout=broken)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer._scores_tokens and trainer.vllm_importance_sampling_correction
