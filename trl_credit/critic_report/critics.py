"""What a report asks a critic, and critics that know nothing but rewards."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .probes import Rollout


class Critic(Protocol):
    """Anything that values states."""

    name: str

    def values(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """
        Values of all states of each rollout, shape `(T + 1,)`: the one in which each token is chosen, and the one after
        the last. A critic that values only a few states values those in `cuts`, and holds each value up to the next.
        """
        ...


class ConstantCritic:
    """
    One value for every state.

    Args:
        value (`float`, *optional*):
            Default: the mean reward of the completions.
    """

    def __init__(self, value: float | None = None):
        self.value = value
        self.name = "constant" if value is None else f"constant {value:g}"

    def values(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """The same for all."""
        value = self.value
        if value is None:
            value = float(np.mean([rollout.reward for rollout in rollouts if not math.isnan(rollout.reward)]))
        return [np.full(len(rollout.completion_ids) + 1, value) for rollout in rollouts]


class LeaveOneOutMean:
    """
    For every state, the mean reward of the prompt's other completions: the baseline of RLOO and, except that it leaves
    out the completion itself, of GRPO.
    """

    name = "leave-one-out mean"

    def values(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """The same along a completion."""
        if any(not rollout.other_rewards for rollout in rollouts):
            raise ValueError("The leave-one-out mean needs probes with at least 2 completions of each prompt.")
        return [np.full(len(rollout.completion_ids) + 1, np.mean(rollout.other_rewards)) for rollout in rollouts]
