"""What a probe critic learns from: the states of the latest rollouts, on the host."""

from collections import deque

import torch


class ReplayBuffer:
    """
    Features, in bfloat16, and targets of the states of the latest rollouts.

    Args:
        rollouts (`int`):
            How many rollouts are kept.
        states (`int`):
            Most states that are kept, over all rollouts. Each rollout may take its share; of one with more, a random
            part is kept.
    """

    def __init__(self, rollouts: int, states: int):
        self.share = states // rollouts
        self._rollouts: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=rollouts)
        if self.share < 1:
            raise ValueError(f"A replay buffer of {rollouts} rollouts must have room for as many states, got {states}.")

    @staticmethod
    def bytes_of_state(feature_size: int) -> int:
        """What a state of so many features takes, with its target."""
        return 2 * feature_size + 4

    def __len__(self) -> int:
        return sum(len(targets) for _, targets in self._rollouts)

    def add(self, features: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> None:
        """
        Take in the states of a rollout; the oldest one goes.

        Args:
            features (`torch.Tensor`):
                Shape `(M, F)`.
            targets (`torch.Tensor`):
                Shape `(M,)`.
            generator (`torch.Generator`):
                Draws the part that is kept of too many.
        """
        if len(targets) > self.share:
            kept = torch.randperm(len(targets), generator=generator)[: self.share].sort().values
            features, targets = features.cpu()[kept], targets.cpu()[kept]
        # Copies, for a part of a rollout's tensor would keep all of it alive.
        self._rollouts.append(
            (features.detach().cpu().to(torch.bfloat16, copy=True), targets.detach().cpu().float().clone())
        )

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` states with their targets, each drawn from all that there are."""
        drawn = torch.randint(len(self), (count,), generator=generator)
        features, targets = [], []
        start = 0
        for of_rollout, earned in self._rollouts:
            own = drawn[(drawn >= start) & (drawn < start + len(earned))] - start
            features.append(of_rollout[own])
            targets.append(earned[own])
            start += len(earned)
        return torch.cat(features), torch.cat(targets)

    def state_dict(self) -> dict:
        """What is in it."""
        return {"rollouts": list(self._rollouts)}

    def load_state_dict(self, state: dict) -> None:
        """Go on with what was in it."""
        self._rollouts.clear()
        self._rollouts.extend(state["rollouts"])
