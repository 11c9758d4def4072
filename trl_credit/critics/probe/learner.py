"""How a probe critic learns: from a replay buffer, in many small updates, and how far it has earned trust."""

import copy
from collections import deque

import torch

from ...credit.trust import trust_weight
from ...credit.value_loss import binary_cross_entropy
from .network import ProbeNetwork
from .replay import ReplayBuffer


# Of the running mean of the weights, in updates.
MOMENTUM = 0.97


class ProbeLearner:
    r"""
    Fits a probe critic to the latest rollouts.

    A rollout is valued first and then goes to [`measure`] and [`learn`]. Values are fitted by cross-entropy on the
    states of the latest rollouts with many small updates; the head of the network is a running mean of what they make
    of it, which is less noisy than the last of them. It starts at the mean reward of the first rollout; features are
    shifted and scaled as they fell out in it. What it is trusted with is measured on the latest rollouts, each
    predicted before it was learnt from, see [`~trl_credit.credit.trust.trust_weight`].

    Args:
        network ([`~trl_credit.critics.probe.network.ProbeNetwork`]):
            The network.
        learning_rate (`float`, *optional*, defaults to `5e-3`):
            Of AdamW.
        weight_decay (`float`, *optional*, defaults to `0.01`):
            Of AdamW.
        updates (`int`, *optional*, defaults to `32`):
            Updates per rollout.
        batch_size (`int`, *optional*, defaults to `256`):
            States per update.
        buffer_rollouts (`int`, *optional*, defaults to `16`):
            Rollouts that are learnt from.
        buffer_states (`int`, *optional*, defaults to `65536`):
            Most states that are kept of them.
        trust_rollouts (`int`, *optional*, defaults to `16`):
            Rollouts whose predictions tell how far the critic is trusted.
        seed (`int`, *optional*, defaults to `0`):
            Of what is drawn from the buffer.

    Example:

    ```python
    >>> learner = ProbeLearner(network)
    >>> values = network.values(features)  # (M, 8) -> (M,), before it learns from them
    >>> learner.measure(trust_sums(values, returns))
    >>> learner.learn(features, returns)
    >>> learner.trust
    0.0
    ```
    """

    def __init__(
        self,
        network: ProbeNetwork,
        *,
        learning_rate: float = 5e-3,
        weight_decay: float = 0.01,
        updates: int = 32,
        batch_size: int = 256,
        buffer_rollouts: int = 16,
        buffer_states: int = 65536,
        trust_rollouts: int = 16,
        seed: int = 0,
    ):
        self.network = network
        self.low, self.high = network.reward_range.tolist()
        self.updates = updates
        self.batch_size = batch_size
        self.steps = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.fitted = copy.deepcopy(network.head)  # of which the network's is the running mean
        self.optimizer = torch.optim.AdamW(self.fitted.parameters(), lr=learning_rate, weight_decay=weight_decay)
        self.buffer = ReplayBuffer(buffer_rollouts, buffer_states)
        self._sums: deque[torch.Tensor] = deque(maxlen=trust_rollouts)  # of the predictions, see `trust_sums`

    @property
    def trust(self) -> float:
        """How far the values can be leant on, in [0, 1], by the latest rollouts that it has been asked to learn."""
        return trust_weight(torch.stack(list(self._sums))) if self._sums else 0.0

    def measure(self, sums: torch.Tensor) -> None:
        """
        Take note of how well a rollout was predicted; call it before [`learn`].

        Args:
            sums (`torch.Tensor`):
                What [`~trl_credit.credit.trust.trust_sums`] gives for the values of its states, before they were
                learnt from, and what was earned, over all processes, shape `(5,)`.
        """
        if self.network.begun:  # a value from before it knew the mean reward would tell against it for long
            self._sums.append(sums.cpu())

    def learn(self, features: torch.Tensor, returns: torch.Tensor) -> float:
        """
        Take in a rollout and make the updates that one is due.

        Args:
            features (`torch.Tensor`):
                Shape `(M, F)`.
            returns (`torch.Tensor`):
                What was earned after each state, within the range of the rewards, shape `(M,)`.

        Returns:
            `float`: Mean cross-entropy over the updates, NaN if there is nothing to learn from.

        Raises:
            ValueError: If a return is outside the range of the rewards.
        """
        slack = 1e-5 * (self.high - self.low)  # for sums of weighted rewards
        if len(returns) and not (self.low - slack <= returns.min() and returns.max() <= self.high + slack):
            raise ValueError(
                f"The returns of a rollout go from {returns.min().item():g} to {returns.max().item():g}, outside "
                f"`reward_range=[{self.low:g}, {self.high:g}]`: the values of a probe critic are bounded. Set "
                "`reward_range` to the lowest and the highest reward."
            )
        if len(returns):
            targets = ((returns.float() - self.low) / (self.high - self.low)).clamp(0, 1)
            if not self.network.begun:
                self.network.begin(features, targets)
                self.fitted.load_state_dict(self.network.head.state_dict())
            self.buffer.add(features, targets, self.generator)
        if not len(self.buffer):
            return float("nan")
        total = 0.0
        for _ in range(self.updates):
            drawn, wanted = self.buffer.draw(self.batch_size, self.generator)
            logits = self.fitted(self.network.scaled(drawn)).squeeze(-1)
            loss = binary_cross_entropy(logits, wanted).mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._average()
            self.steps += 1
            total += loss.item()
        return total / max(self.updates, 1)

    @torch.no_grad()
    def _average(self) -> None:
        for mean, latest in zip(self.network.head.parameters(), self.fitted.parameters(), strict=True):
            mean.lerp_(latest, 1 - MOMENTUM)

    def state_dict(self) -> dict:
        """All that going on bit-equal needs, for `torch.save`."""
        return {
            "network": self.network.state_dict(),
            "fitted": self.fitted.state_dict(),
            "steps": self.steps,
            "optimizer": self.optimizer.state_dict(),
            "buffer": self.buffer.state_dict(),
            "sums": list(self._sums),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where [`state_dict`] was taken."""
        self.network.load_state_dict(state["network"])
        self.fitted.load_state_dict(state["fitted"])
        self.steps = state["steps"]
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = rate  # which may be another for the rest of the run
        self.buffer.load_state_dict(state["buffer"])
        self._sums.clear()
        self._sums.extend(state["sums"])
        self.generator.set_state(state["generator"])
