"""The critic's optimizer: its schedule, its rates, its precision, and what it does with a gradient that is none."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model_dir
from vapo_runs import PROMPTS, make_trainer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


def rates(trainer, since: int = 0) -> list[float]:
    log = trainer.state.log_history[since:]
    return [entry["critic/learning_rate"] for entry in log if "critic/learning_rate" in entry]


# --- The schedule

LINEAR = {"critic_lr_scheduler_type": "linear", "critic_learning_rate": 1e-3, "max_steps": 4}
FALLING = pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_an_evaluation_before_the_training_does_not_fix_the_schedule(model_dir, tmp_path):
    from datasets import Dataset

    trainer = make_trainer(model_dir, tmp_path, per_device_eval_batch_size=4, **LINEAR)
    trainer.evaluate(eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}))
    trainer.train()
    assert rates(trainer) == FALLING


def test_a_second_training_has_a_schedule_of_its_own_as_the_policys(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic_pretraining_steps=0, lr_scheduler_type="linear", **LINEAR)
    trainer.train()
    trainer.train()
    assert rates(trainer) == FALLING  # the second training begins a history of its own
    policy = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert policy == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_a_pretraining_of_an_earlier_call_is_not_in_the_schedule(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic_pretraining_steps=4, **LINEAR)
    trainer.pretrain_critic()
    trainer.train()
    assert rates(trainer) == FALLING


# --- A gradient that is not finite


def test_a_gradient_of_the_critic_that_is_not_finite_stops_the_run_and_blames_the_critic(model_dir, tmp_path):
    """A loss can be finite and its gradient not, as that of a square root at 0."""
    trainer = make_trainer(model_dir, tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    loss = trainer.critic_loss

    def broken(network, inputs):
        values = loss(network, inputs)
        return values if trainer.engine.steps < 2 else values + 0 * (values - values).sqrt()

    trainer.critic_loss = broken
    with pytest.raises(FloatingPointError, match=r"gradient norm of the critic is nan in its update 3, of a loss of"):
        trainer.train()
    assert trainer.engine.steps == trainer.state.global_step == 2
    saved = load_file(tmp_path / "checkpoint-2" / "critic" / "model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in trainer.critic.state_dict().items())
    assert all(p.isfinite().all() for p in trainer.critic.parameters())
