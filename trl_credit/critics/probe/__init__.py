"""A critic that is a small head on features which are there anyway."""

from .probe import ProbeCritic
from .replay import ReplayBuffer


__all__ = ["ProbeCritic", "ReplayBuffer"]
