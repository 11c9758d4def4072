"""Runs of SPPO that must be the same, are; and one completion a prompt works with everything."""

import pytest
import torch
from datasets import Dataset
from sppo_runs import (
    CONVERSATIONS,
    critic_dir,
    make_trainer,
    rollout_of,
    share_of_even,
    unscored_now_and_then,
)
from vapo_runs import PROMPTS, SETTINGS

from trl_credit.seam import CreditConfig, CreditTrainer


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return critic_dir(tmp_path_factory.mktemp("critic"))


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(one, other, tolerance=0.0):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=name)


class ConstantBaseline(CreditTrainer):
    """A = R - 0.3, on TRL's own loss."""

    _name = "constant baseline"

    def assign_credit(self, rollout, rewards, mode):
        return {**rollout, "advantages": torch.nan_to_num(rewards - 0.3)}


class ConstantBaselineConfig(CreditConfig):
    pass


def test_a_critic_that_does_not_move_is_a_constant_baseline(model_dir, tmp_path):
    settings = {"max_steps": 3, "learning_rate": 0.3, "gradient_accumulation_steps": 2, "scale_rewards": "none"}
    frozen = {"critic_learning_rate": 0.0, "critic_initial_value": 0.3, "num_generations": 2}
    sppo = make_trainer(model_dir, tmp_path, **settings, **frozen)
    start = sppo.model.state_dict()["lm_head.weight"].clone()
    sppo.train()
    ConstantBaseline.config_class = ConstantBaselineConfig
    shared = {name: value for name, value in SETTINGS.items() if not name.startswith("critic")}
    plain = ConstantBaseline(
        model=str(model_dir),
        reward_funcs=share_of_even,
        args=ConstantBaselineConfig(str(tmp_path), **{**shared, **settings, "num_generations": 2}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        rollout_func=rollout_of,
    )
    plain.train()
    assert_same_weights(sppo.model, plain.model, 1e-6)
    assert (sppo.model.state_dict()["lm_head.weight"] - start).abs().max() > 1e-2


@pytest.mark.parametrize("reward", [share_of_even, unscored_now_and_then], ids=["all scored", "some not"])
@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_micro_batches(reward, model_dir, critic, tmp_path):
    def run(folder, **settings):
        shared = {"critic": critic, "num_generations": 2, "max_steps": 2, "reward": reward}
        trainer = make_trainer(model_dir, tmp_path / folder, max_grad_norm=0.0, **shared, **settings)
        trainer.train()
        return trainer

    whole = run("a", per_device_train_batch_size=8)
    split = run("b", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    for one, other in zip(steps(whole), steps(split), strict=True):
        for name in ("grad_norm", "critic/grad_norm", "critic/loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    assert_same_weights(whole.model, split.model, 2e-6)
    assert_same_weights(whole.critic, split.critic, 2e-6)


def test_each_of_several_steps_on_a_rollout_is_one_mean_over_its_own_tokens(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic, steps_per_generation=2, max_steps=2)
    seen = []
    begin = trainer.begin_step

    def begin_step(micro_batches, mode):
        begin(micro_batches, mode)
        tokens = sum((part["completion_mask"] * part["tool_mask"]).sum().item() for part in micro_batches)
        seen.append((tokens, [part["num_items_in_batch"].item() / 2 for part in micro_batches]))

    trainer.begin_step = begin_step
    trainer.train()
    assert len(seen) == 2 and seen[0][0] != seen[1][0]
    for tokens, divisors in seen:
        assert divisors == [tokens]
    # The baseline of both is the critic as it was when the rollout was made.
    assert len(trainer.rollouts_seen) == 1 and trainer.engine.steps == 2


def test_unscored_completions_move_neither_network(model_dir, critic, tmp_path):
    def nothing(completion_ids, **kwargs):
        return [None] * len(completion_ids)

    trainer = make_trainer(model_dir, tmp_path, nothing, critic=critic)
    start = [p.clone() for network in (trainer.model, trainer.critic) for p in network.parameters()]
    trainer.train()
    end = [p for network in (trainer.model, trainer.critic) for p in network.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(start, end, strict=True))
    (entry,) = steps(trainer)
    assert entry["rewards/unscored"] == 1 and "critic/loss" not in entry and "critic/brier" not in entry
    assert trainer.rollouts_seen[0]["values"].isfinite().all()


def test_masked_truncated_completions_are_no_targets(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic, mask_truncated_completions=True, max_completion_length=8)
    trainer.args.per_device_train_batch_size = 8
    trainer.train()
    rollout = trainer.rollouts_seen[0]
    masked = ~rollout["completion_mask"].bool().any(1)
    assert 0 < masked.sum() < len(masked)
    assert torch.equal(rollout["critic_targets"].isnan(), masked)
    assert rollout["advantages"][masked].abs().max() == 0


ONE_EACH = {
    "batches of 1": {"per_device_train_batch_size": 1},
    "batches of 1, three to a step": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    "batches of 3, five to a step": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5},
    "several steps on a rollout": {"per_device_train_batch_size": 2, "steps_per_generation": 4, "num_iterations": 2},
    "several completions in evaluation": {"num_generations_eval": 2, "per_device_eval_batch_size": 4},
    "batches of 3 in evaluation": {"per_device_eval_batch_size": 3},
    "pretraining": {"critic_pretraining_steps": 2},
}


@pytest.mark.parametrize(
    ("name", "streamed"),
    [
        *((name, False) for name in ONE_EACH),
        ("batches of 3, five to a step", True),
        ("batches of 3 in evaluation", True),
    ],
)
@pytest.mark.slow
def test_one_completion_a_prompt_works_with(name, streamed, model_dir, critic, tmp_path):
    train = Dataset.from_dict({"prompt": 2 * CONVERSATIONS})
    held_out = train.select(range(4))
    if streamed:
        train, held_out = train.to_iterable_dataset(), held_out.to_iterable_dataset()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 3, **ONE_EACH[name]}
    trainer = make_trainer(
        model_dir, tmp_path, prompts=train, rollout=None, critic=critic, eval_dataset=held_out, **settings
    )
    start = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.args.num_generations == 1
    assert not all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), start, strict=True))
    assert trainer.engine.steps == 3 + settings.get("critic_pretraining_steps", 0)
    evaluation, *_ = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    counts = sum(evaluation[f"eval_critic/decile_{decile}/count"] for decile in range(10))
    assert counts == 4 * settings.get("num_generations_eval", 1)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo", "luspo"])
def test_every_loss_of_trl_takes_the_advantages(loss_type, model_dir, critic, tmp_path):
    settings = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    settings |= {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    trainer = make_trainer(model_dir, tmp_path, critic=critic, loss_type=loss_type, num_iterations=2, **settings)
    trainer.train()
    assert steps(trainer)[0]["grad_norm"] > 0
