"""An evaluation leaves the run as it was: its random numbers, what the critic is told, and all that is counted."""

import genac_runs
import pytest
import sppo_runs
import torch
import vapo_runs
import vine_runs
from datasets import Dataset


RUNS = {"vapo": vapo_runs, "sppo": sppo_runs, "genac": genac_runs, "vineppo": vine_runs}


def make(name, model_dir, folder, **settings):
    """A trainer that notes whether the credit of an evaluation drew random numbers."""

    class Noting(RUNS[name].Watched):
        def assign_credit(self, rollout, rewards, mode):
            before = torch.random.get_rng_state()
            credited = super().assign_credit(rollout, rewards, mode)
            if mode == "eval":
                self.__dict__.setdefault("drew", []).append(not torch.equal(before, torch.random.get_rng_state()))
            return credited

    settings = {"per_device_eval_batch_size": 4, "num_generations_eval": 1, **settings}
    if name == "vineppo":
        settings["vine_continuations"] = 2
    trainer = RUNS[name].make_trainer(model_dir, folder, trainer=Noting, **settings)
    trainer.eval_dataset = Dataset.from_dict({"prompt": vapo_runs.PROMPTS[:4]})
    return trainer


@pytest.fixture(scope="module")
def critics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critics")
    return {
        "sppo": sppo_runs.critic_dir(folder / "sppo"),
        "genac": genac_runs.fit_critic(folder / "genac", unparsed=0.4),
    }


@pytest.mark.parametrize("name", RUNS)
def test_the_credit_of_an_evaluation_draws_none_of_the_runs_random_numbers(name, model_dir, critics, tmp_path):
    settings = {"critic": critics[name]} if name in critics else {}
    trainer = make(name, model_dir, tmp_path, **settings)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert trainer.drew == [False, False]


def test_an_evaluation_moves_neither_what_the_critic_is_told_nor_what_stands_in(model_dir, critics, tmp_path):
    trainer = make("genac", model_dir, tmp_path, critic=critics["genac"])
    trainer.train()
    before = trainer.success_rate, trainer.mean_value
    assert before[0].weight > 0 and before[1].weight > 0
    trainer.evaluate()
    assert (trainer.success_rate, trainer.mean_value) == before


def test_a_critic_is_in_evaluation_mode_but_for_its_updates(model_dir, tmp_path):
    trainer = make("vapo", model_dir, tmp_path)
    modes = []
    loss = trainer.critic_loss
    trainer.critic_loss = lambda network, inputs: modes.append(network.training) or loss(network, inputs)
    trainer.train()
    assert modes and all(modes) and not trainer.critic.training
    assert not any(module.training for module in trainer.critic.modules())


def test_making_a_critic_draws_none_of_the_runs_random_numbers(model_dir, tmp_path):
    states = []
    for name in ("a", "b"):
        torch.manual_seed(1)
        # The second one has adapters, which begin at random.
        lora = {"critic_peft_config": {"r": 4, "target_modules": "all-linear"}} if name == "b" else {}
        vapo_runs.make_trainer(model_dir, tmp_path / name, **lora)
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)


def test_every_evaluation_samples_the_same_continuations(model_dir, tmp_path):
    trainer = make("vineppo", model_dir, tmp_path, rollout=vine_runs.fixed_rollout, learning_rate=0.0)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    first, training, second = trainer.sampled[0], trainer.sampled[1:-1], trainer.sampled[-1]
    assert first == second and len({tuple(tokens) for tokens in first[1]}) > len(first[1]) / 2
    assert training and all(sampled[1] != first[1] for sampled in training)
