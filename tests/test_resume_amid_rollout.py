"""A run that goes on from a checkpoint between two steps of a rollout is the run that was never stopped."""

from pathlib import Path

import pytest
import torch
from genac_runs import fit_critic
from genac_runs import make_trainer as make_genac
from vapo_runs import make_trainer as make_vapo

from trl_credit.saved import MANIFEST


# Four micro-batches a rollout, two a step, each trained on twice: a rollout lasts four steps.
SETTINGS = {
    "per_device_train_batch_size": 2,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "num_generations": 2,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "optim": "adamw_torch",
}
MAKE = {"vapo": make_vapo, "genac": make_genac}


def make(kind, model_dir, folder, critic, **settings):
    settings = {**SETTINGS, **({"critic": critic} if kind == "genac" else {}), **settings}
    return MAKE[kind](model_dir, folder, rollout=None, **settings)


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return fit_critic(tmp_path_factory.mktemp("critic"))


def weights(trainer):
    networks = (trainer.model, trainer.critic)
    return [weight.clone() for network in networks for weight in network.state_dict().values()]


@pytest.fixture(scope="module", params=["vapo", "genac"])
def whole(request, model_dir, critic, tmp_path_factory):
    """A run that was never stopped."""
    trainer = make(request.param, model_dir, tmp_path_factory.mktemp(request.param), critic)
    trainer.train()
    return request.param, trainer, weights(trainer)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
@pytest.mark.slow
def test_it_goes_on_to_the_bit_from_any_step_of_a_rollout(step, whole, model_dir, critic, tmp_path):
    kind, unbroken, expected = whole
    checkpoint = f"{unbroken.args.output_dir}/checkpoint-{step}"
    resumed = make(kind, model_dir, tmp_path, critic)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert len(getattr(resumed, "rollouts_seen", [])) == (step <= 4), "the second rollout begins after step 4"
    assert all(torch.equal(one, other) for one, other in zip(weights(resumed), expected, strict=True))


def test_only_a_checkpoint_between_two_steps_of_a_rollout_holds_one(whole):
    _, unbroken, _ = whole
    folder = Path(unbroken.args.output_dir)
    holds = [step for step in range(1, 7) if (folder / f"checkpoint-{step}" / "rollout_0_of_1.pt").exists()]
    assert holds == [1, 2, 3, 5, 6]


@pytest.mark.parametrize("change", ["no rollout", "other parts"])
@pytest.mark.slow
def test_a_rollout_that_cannot_be_gone_on_with_is_generated_anew_and_that_is_said(
    change, model_dir, critic, tmp_path, caplog
):
    make("vapo", model_dir, tmp_path / "whole", critic, max_steps=1).train()
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    settings = {"max_steps": 2}
    if change == "no rollout":
        for name in ("rollout_0_of_1.pt", MANIFEST):
            (checkpoint / name).unlink()
    else:
        settings |= {"steps_per_generation": 8}
    resumed = make("vapo", model_dir, tmp_path / "resumed", critic, **settings)
    with caplog.at_level("WARNING"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert "made between two steps of a rollout" in caplog.text and "it is generated anew" in caplog.text
    assert len(resumed.rollouts_seen) == 1
