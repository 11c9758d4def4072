"""What is logged of values: of right completions under "right", at the place that the name says."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from vapo_runs import make_trainer

from trl_credit.trainers.value_report import fit_report, value_means


def test_values_of_right_and_wrong_completions_go_under_their_names():
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [0.6, 0.7, 0.8, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    means = value_means(values, mask, torch.tensor([False, True, True]))
    found = {name: (round(float(total), 4), int(count)) for name, (total, count) in means.items()}
    assert found["mean"] == (3.6, 8)
    assert [found[f"wrong_at_{at}"] for at in (0, 25, 50, 75, 100)] == [
        (0.1, 1),
        (0.2, 1),
        (0.3, 1),
        (0.4, 1),
        (0.5, 1),
    ]
    assert [found[f"right_at_{at}"] for at in (0, 50, 100)] == [(0.6, 1), (0.7, 1), (0.8, 1)]


def test_a_critic_that_knows_the_prompt_alone_explains_nothing_within_prompts():
    # Two prompts of two completions each, next to each other.
    returns = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    values = torch.tensor([[0.5], [0.5], [10.5], [10.5]])
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True))
    report = fit_report(trainer, values, returns, torch.ones(4, 1).bool(), num_generations=2)
    assert report["explained_variance"] == pytest.approx(1 - 0.25 / 25.25)
    assert report["explained_variance_within_prompt"] == pytest.approx(0)


def test_the_value_clip_begins_with_the_policys_training(model_dir, tmp_path):
    critics = []
    for clip in (None, 1e-6):
        settings = {"critic_pretraining_steps": 4, "critic_updates_per_step": 4, "critic_learning_rate": 1e-2}
        trainer = make_trainer(model_dir, tmp_path / str(clip), critic_clip_range=clip, **settings)
        trainer.pretrain_critic()
        critics.append(list(trainer.critic.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*critics, strict=True))
