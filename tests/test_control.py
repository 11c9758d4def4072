"""The control example: its tasks are gymnasium's, its credit is the package's, and it learns."""

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from launch import BIN, run
from tasks import TASKS, MountainCarVectorEnv
from training import Networks, PromptCritic, TokenCritic, log_probabilities, per_run_mean, roll_out, sample


STUDY = Path(__file__).parent.parent / "examples" / "control" / "study.py"


def rollout_of(task: str, episodes: int = 16, group: int = 1):
    torch.manual_seed(0)
    policies = Networks(2, len(TASKS[task].scale) + 1, TASKS[task].actions)
    return policies, roll_out(TASKS[task], sample(policies), 2, episodes, seed=3, group=group)


def test_mountain_car_is_gymnasiums():
    many = MountainCarVectorEnv(4)
    observations, _ = many.reset(seed=0)
    cars = [gymnasium.make("MountainCar-v0").unwrapped for _ in observations]
    for car, position in zip(cars, many.state[0], strict=True):
        car.reset()
        car.state = (position, 0.0)
    rng, arrived = np.random.default_rng(0), np.zeros(4, bool)
    for _ in range(300):
        actions = np.where(rng.random(4) < 0.3, rng.integers(3, size=4), TASKS["mountaincar"].expert(observations))
        observations, _, ended, _, _ = many.step(actions)
        for index, car in enumerate(cars):
            observation, _, terminated, _, _ = car.step(int(actions[index]))
            np.testing.assert_allclose(observation, observations[index], atol=1e-6)
            assert terminated == ended[index]
        arrived |= ended
    assert arrived.all()


def test_every_action_gets_the_verdict_minus_the_value_of_the_first_state():
    _, rollout = rollout_of("cartpole")
    rollout.rewards[:, ::3] = 1.0
    critic = PromptCritic(2, 5, learning_rate=1e-2)
    critic.fit(rollout)
    advantages = critic.advantages(rollout)
    values = critic.networks.double()(rollout.states[:, :, 0].double()).sigmoid()
    expected = (rollout.rewards.unsqueeze(2) - values) * rollout.mask
    assert 0 < rollout.mask.float().mean() < 1 and expected.abs().max() > 0.5
    torch.testing.assert_close(advantages.double(), expected, atol=1e-6, rtol=0)


def test_critic_of_every_state_gives_whitened_verdict_minus_value_at_lambda_1():
    _, rollout = rollout_of("cartpole")
    rollout.rewards[:, ::3] = 1.0
    critic = TokenCritic(2, 5, learning_rate=1e-2, lam=1.0)
    advantages = critic.advantages(rollout)
    values = critic.networks(rollout.states.flatten(1, 2)).view_as(rollout.mask)
    for ours, reward, value, mask in zip(advantages, rollout.rewards, values, rollout.mask, strict=True):
        raw = (reward.unsqueeze(1) - value)[mask].double()
        torch.testing.assert_close(ours[mask].double(), (raw - raw.mean()) / raw.std(correction=0), atol=1e-4, rtol=0)


def test_episodes_of_a_group_start_alike_and_groups_do_not():
    _, rollout = rollout_of("mountaincar", group=8)
    starts = rollout.states[:, :, 0].reshape(4, 8, -1)
    assert (starts == starts[:, :1]).all()
    assert len(starts[:, 0, 0].unique()) == 4


def test_nothing_passes_between_runs():
    policies, rollout = rollout_of("cartpole")
    states, actions, mask = rollout.trained(rollout.states, rollout.actions, rollout.mask)
    assert mask.sum() == rollout.mask.sum() < rollout.mask.numel()
    weight = torch.tensor([[1.0], [0.0]])
    per_run_mean(weight * log_probabilities(policies, states, actions), mask).backward()
    for parameter in policies.parameters():
        assert parameter.grad[0].abs().sum() > 0 and not parameter.grad[1].any()


@pytest.mark.slow
def test_study_learns_and_writes_what_the_page_shows(tmp_path):
    settings = ["--tasks", "cartpole", "--runs", 2, "--updates", 8, "--output_dir", tmp_path]
    run([BIN / "python", STUDY, *settings], cwd=tmp_path)
    results = json.loads((tmp_path / "control.json").read_text(encoding="utf-8"))
    assert [result["method"] for result in results] == ["SPPO", "PPO, λ = 1", "PPO, λ = 0.95", "GRPO", "batch mean"]
    for result in results:
        success, steps = np.array(result["success"]), np.array(result["steps"])
        assert success.shape == steps.shape == (8, 2)
        assert success[-2:].mean() > success[0].mean() + 0.15, result["method"]
        assert (steps <= 64 * 200).all()
    assert "| SPPO |" in (tmp_path / "control.md").read_text(encoding="utf-8")
    assert all((tmp_path / f"control-{theme}.svg").stat().st_size > 10_000 for theme in ("light", "dark"))
