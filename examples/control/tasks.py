"""
CartPole and MountainCar from gymnasium as tasks with one verdict at the end of an episode: 1 for success, else 0.

Many episodes are stepped at once. gymnasium has CartPole in that form; MountainCar's two equations are written in it
here.
"""

from dataclasses import dataclass

import gymnasium
import numpy as np
from gymnasium.envs.classic_control import MountainCarEnv
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space


class MountainCarVectorEnv(VectorEnv):
    """gymnasium's MountainCar-v0, `num_envs` cars at once. An episode that has ended goes on; do not look at it."""

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.car = MountainCarEnv()  # for its constants and spaces
        self.single_observation_space, self.single_action_space = self.car.observation_space, self.car.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        positions = self.np_random.uniform(-0.6, -0.4, self.num_envs)
        self.state = np.stack([positions, np.zeros(self.num_envs)])
        return self.state.T.astype(np.float32), {}

    def step(self, action):
        car = self.car
        position, velocity = self.state
        velocity = velocity + (action - 1) * car.force - np.cos(3 * position) * car.gravity
        velocity = np.clip(velocity, -car.max_speed, car.max_speed)
        position = np.clip(position + velocity, car.min_position, car.max_position)
        velocity = np.where((position == car.min_position) & (velocity < 0), 0, velocity)
        self.state = np.stack([position, velocity])
        ended = (position >= car.goal_position) & (velocity >= car.goal_velocity)
        return self.state.T.astype(np.float32), np.full(self.num_envs, -1.0), ended, np.zeros_like(ended), {}


@dataclass(frozen=True)
class PrecisionCartPole:
    """Keep the pole up for 200 steps, and have it within half a degree of upright after the last."""

    title = "Precision CartPole"
    horizon = 200
    episodes = 64  # in an update
    updates = 20
    scale = (0.5, 0.5, 0.1, 0.5)  # makes observations of about 1
    actions = 2
    noise = 0.35  # share of the expert's actions that are random

    def make(self, number: int) -> VectorEnv:
        return gymnasium.make_vec("CartPole-v1", number, "vector_entry_point", max_episode_steps=self.horizon)

    def expert(self, observations: np.ndarray) -> np.ndarray:
        return (observations @ np.array([0.1, 0.2, 1.0, 0.2]) > 0).astype(int)

    def succeeded(self, observations: np.ndarray, terminated: np.ndarray) -> np.ndarray:
        return ~terminated & (np.abs(observations[..., 2]) <= np.radians(0.5))


@dataclass(frozen=True)
class MountainCar:
    """Reach the flag within 1000 steps."""

    title = "MountainCar"
    horizon = 1000
    episodes = 8
    updates = 40
    scale = (0.5, 0.03)
    actions = 3
    noise = 0.92

    def make(self, number: int) -> VectorEnv:
        return MountainCarVectorEnv(number)

    def expert(self, observations: np.ndarray) -> np.ndarray:
        return np.where(observations[..., 1] > 0, 2, 0)  # push the way it rolls

    def succeeded(self, observations: np.ndarray, terminated: np.ndarray) -> np.ndarray:
        return terminated


TASKS = {"cartpole": PrecisionCartPole(), "mountaincar": MountainCar()}
