"""A running mean of rewards, which a generative critic is told is the actor's success rate."""

from typing import NamedTuple

import torch


class RunningMean(NamedTuple):
    r"""
    Exponential average that starts at 0, corrected for that start.

    \\( \tau_n = c \, \tau_{n-1} + (1 - c) \, \bar r_n \\) with \\( \tau_0 = 0 \\) (arXiv:2604.10701), divided by
    \\( 1 - c^n \\): after the first step it is the mean reward of that step.

    Args:
        total (`float`, *optional*, defaults to `0.0`):
            τ.
        weight (`float`, *optional*, defaults to `0.0`):
            \\( 1 - c^n \\).
    """

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        """The corrected mean; 0 before the first reward."""
        return self.total / self.weight if self.weight else 0.0

    def updated(self, rewards: torch.Tensor, momentum: float = 0.9) -> "RunningMean":
        """
        The mean after one more step.

        Args:
            rewards (`torch.Tensor`):
                Rewards of the step, over all processes, any shape; NaN for a completion without a reward. A step
                without any reward changes nothing.
            momentum (`float`, *optional*, defaults to `0.9`):
                c, in [0, 1).
        """
        if not 0 <= momentum < 1:
            raise ValueError(f"The momentum of a running mean must be in [0, 1), got {momentum}.")
        scored = rewards[~rewards.isnan()].double()
        if len(scored) == 0:
            return self
        return RunningMean(
            momentum * self.total + (1 - momentum) * scored.mean().item(), momentum * self.weight + 1 - momentum
        )
