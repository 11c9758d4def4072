"""The critic's optimizer is what its settings say, in numbers that were worked out by hand."""

import copy
from importlib.util import find_spec

import pytest
import torch
from test_failures import noisy_critic
from vapo_runs import make_trainer


def rates(trainer):
    """Learning rates of all updates, as they are logged."""
    names = ("critic_pretraining/learning_rate", "critic/learning_rate")
    return [entry[name] for entry in trainer.state.log_history for name in names if name in entry]


SCHEDULE = {
    "critic_learning_rate": 1e-3,
    "critic_lr_scheduler_type": "linear",
    "critic_warmup_steps": 2,
    "critic_pretraining_steps": 3,
    "max_steps": 3,
}


def test_the_learning_rate_warms_up_and_falls_over_pretraining_and_training(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, **SCHEDULE)
    trainer.train()
    # Two updates of warm-up, then down to 0 in the four that are left of six.
    assert rates(trainer) == pytest.approx([0, 0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


@pytest.mark.slow
def test_a_resumed_critic_goes_on_with_its_updates_its_schedule_and_its_optimizer(model_dir, tmp_path):
    def trainer():
        saving = {"save_strategy": "steps", "save_steps": 1}
        return make_trainer(model_dir, tmp_path, critic=noisy_critic(), **saving, **SCHEDULE)

    (whole := trainer()).train()
    (resumed := trainer()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.engine.steps == whole.engine.steps == 6
    assert rates(resumed) == rates(whole) == pytest.approx([0, 0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    for ours, theirs in zip(resumed.critic.parameters(), whole.critic.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def update(trainer, gradient: float):
    """One update in which every weight of the critic has this gradient; returns what moved, before and after."""
    if trainer.engine.steps == 0:
        trainer.engine.begin(total_steps=2)
    before = copy.deepcopy(dict(trainer.critic.named_parameters()))
    total = lambda network, _: gradient * sum(p.sum() for p in network.parameters())  # noqa: E731
    result = trainer.engine.update([None], total, lambda _: torch.tensor(1))
    return result, [(before[name], after) for name, after in trainer.critic.named_parameters()]


def test_weight_decay_shrinks_matrices_and_spares_biases_and_norms(model_dir, tmp_path):
    settings = {"critic_weight_decay": 0.5, "critic_learning_rate": 0.1, "optim": "adamw_torch"}
    trainer = make_trainer(model_dir, tmp_path, critic=noisy_critic(), **settings)
    _, weights = update(trainer, gradient=0.0)
    assert {before.dim() for before, _ in weights} == {1, 2}
    for before, after in weights:
        torch.testing.assert_close(after, before * (0.95 if before.dim() == 2 else 1.0))


@pytest.mark.parametrize(("limit", "left"), [(1e-3, 1e-3), (0.0, 3.0)])
def test_the_gradient_is_clipped_to_the_norm_that_is_set(limit, left, model_dir, tmp_path):
    settings = {"critic_max_grad_norm": limit, "critic_learning_rate": 0.1, "adam_epsilon": 1e-2}
    settings["optim"] = "adamw_torch"
    trainer = make_trainer(model_dir, tmp_path, critic=noisy_critic(), **settings)
    count = sum(p.numel() for p in trainer.critic.parameters())
    gradient = 3.0 / count**0.5  # of norm 3
    result, weights = update(trainer, gradient)
    assert result["grad_norm"] == pytest.approx(3.0, rel=1e-4), "before the clip"
    # The first step of Adam is g / (|g| + ε) of the learning rate.
    clipped = left / count**0.5
    step = 0.1 * clipped / (clipped + 1e-2)
    for before, after in weights:
        torch.testing.assert_close(before - after, torch.full_like(before, step), rtol=1e-2, atol=1e-6)


def test_betas_of_the_run_are_those_of_the_critic_and_gradients_do_not_pile_up(model_dir, tmp_path):
    settings = {"adam_beta1": 0.5, "adam_beta2": 0.5, "critic_max_grad_norm": 0.0, "optim": "adamw_torch"}
    trainer = make_trainer(model_dir, tmp_path, critic=noisy_critic(), **settings)
    update(trainer, gradient=2.0)
    update(trainer, gradient=1.0)
    state = next(iter(trainer.engine.backend.optimizer.state.values()))
    # ½·(½·2) + ½·1 and ½·(½·4) + ½·1
    assert state["exp_avg"].unique().tolist() == pytest.approx([1.0])
    assert state["exp_avg_sq"].unique().tolist() == pytest.approx([1.5])


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("adafactor", "exp_avg_sq_row"),
        ("adamw_torch_fused", "exp_avg"),
        ("adamw_8bit", "state1"),
        ("paged_adamw_8bit", "state1"),
        ("lion_8bit", "state1"),
    ],
)
def test_the_critic_has_the_optimizer_of_that_name_and_the_policy_its_own(name, state, model_dir, tmp_path):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    trainer = make_trainer(model_dir, tmp_path, critic=noisy_critic(), critic_optim=name, critic_learning_rate=1e-3)
    _, weights = update(trainer, gradient=1.0)
    assert all((after - before).abs().max() > 1e-5 for before, after in weights)
    states = trainer.engine.backend.optimizer.state.values()
    assert any(state in of_weight for of_weight in states)
    assert trainer.args.optim != name


MISSING = {"galore_adamw": "galore_torch", "adamw_torch_4bit": "torchao", "stable_adamw": "optimi"}


@pytest.mark.parametrize("name", [*MISSING, "schedule_free_adamw"])
def test_an_optimizer_that_cannot_be_had_is_refused_by_name(name, model_dir, tmp_path):
    if name in MISSING and find_spec(MISSING[name]):
        pytest.skip(f"{MISSING[name]} is installed")
    with pytest.raises(ValueError, match=f"`critic_optim='{name}'`"):
        make_trainer(model_dir, tmp_path, critic=noisy_critic(), critic_optim=name)
