"""A run that cannot learn says so, once, and one that can does not."""

import logging

import genac_runs
import pytest
from datasets import Dataset
from tiny import tiny_model_dir
from vapo_runs import SETTINGS, make_trainer

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return genac_runs.fit_critic(tmp_path_factory.mktemp("critic"), unparsed=0.0)


@pytest.fixture
def warnings(caplog):
    """How often each of ours has come."""
    caplog.set_level(logging.WARNING)
    begins = {
        "fruitless": "After its pretraining the critic explains nothing",
        "same": "The critic's pretraining could teach it nothing",
        "lambda": "λ of the policy is 0",
        "unread": "None of the critic's answers could be read",
        "gradient": "The gradient of the policy is exactly 0",
        "untrained": "The critic is a copy of the policy",
    }

    def count():
        texts = [
            record.getMessage().removeprefix("[RANK 0] ")
            for record in caplog.records
            if record.name.startswith("trl_credit")
        ]
        return {name: number for name, begin in begins.items() if (number := sum(t.startswith(begin) for t in texts))}

    return count


def length(completion_ids, **kwargs):
    """A reward that a critic can see."""
    return [len(ids) / 12 for ids in completion_ids]


LEARNS = {"length_adaptive_alpha": 1.5, "num_generations": 2, "critic_learning_rate": 1e-2, "max_steps": 8}


@pytest.mark.slow
def test_a_run_that_learns_is_not_warned_of(model_dir, tmp_path, warnings):
    make_trainer(model_dir, tmp_path, reward=length, critic_pretraining_steps=60, **LEARNS).train()
    assert warnings() == {}


def test_a_pretraining_that_taught_nothing(model_dir, tmp_path, warnings):
    settings = {**LEARNS, "critic_learning_rate": 1e-9, "critic_head_learning_rate": 1e-9}
    make_trainer(model_dir, tmp_path, reward=length, critic_pretraining_steps=4, **settings).train()
    assert warnings() == {"fruitless": 1}


def test_a_pretraining_on_rewards_that_are_all_the_same(model_dir, tmp_path, warnings):
    def one(completion_ids, **kwargs):
        return [1.0] * len(completion_ids)

    make_trainer(model_dir, tmp_path, reward=one, critic_pretraining_steps=2, length_adaptive_alpha=1.5).train()
    assert warnings() == {"same": 1}


def test_a_length_adaptive_lambda_of_short_completions(model_dir, tmp_path, warnings):
    make_trainer(model_dir, tmp_path, max_steps=3).train()
    assert warnings() == {"lambda": 1}


def test_a_lambda_that_was_set_to_0_is_meant(model_dir, tmp_path, warnings):
    make_trainer(model_dir, tmp_path, max_steps=2, policy_lambda=0.0).train()
    assert warnings() == {}


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.slow
def test_a_gradient_of_exactly_0(learns, model_dir, tmp_path, warnings):
    """Rewards that are all the same, in a method that compares them."""
    settings = {name: value for name, value in SETTINGS.items() if not name.startswith("critic")}
    settings |= {"num_generations": 2, "max_steps": 12, "logging_steps": 6}
    GRPOLambdaTrainer(
        model=str(model_dir),
        reward_funcs=lambda completion_ids, **_: [float(learns and ids[0] % 2) for ids in completion_ids],
        args=GRPOLambdaConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_dict({"prompt": ["a", "bc", "d e", "f"]}),
    ).train()
    assert warnings() == ({} if learns else {"gradient": 1})


def test_a_generative_critic_that_was_never_taught_and_answers_that_cannot_be_read(model_dir, tmp_path, warnings):
    genac_runs.make_trainer(model_dir, tmp_path, max_steps=2).train()
    assert warnings() == {"untrained": 1, "unread": 1}


def test_a_generative_critic_that_answers_is_not_warned_of(model_dir, critic, tmp_path, warnings):
    genac_runs.make_trainer(model_dir, tmp_path, critic=critic, max_steps=2).train()
    assert warnings() == {}
