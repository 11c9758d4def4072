"""The probe critic: a small head, its replay buffer, and how far it has earned trust."""

from collections import deque
from typing import Any

import torch
from torch import nn

from ...credit.trust import trust_sums, trust_weight
from ...credit.value_loss import binary_cross_entropy
from .replay import ReplayBuffer


class ProbeCritic:
    r"""
    Values of states from a small head on features that are there anyway: no network of its own, no pass of its own.

    A rollout goes first to [`predict`] and then to [`learn`]. The values are bounded, \\( V = \sigma(\cdot) \\) within
    the range of the rewards, and fitted by cross-entropy on the states of the latest rollouts with many small updates.
    The head starts at the mean reward of the first rollout; features are shifted and scaled as they fell out in it.
    What it is trusted with is measured on the latest rollouts, each predicted before it was learnt from, see
    [`~trl_credit.credit.trust.trust_weight`].

    Args:
        feature_size (`int`):
            F, the features of a state.
        hidden_size (`int`, *optional*, defaults to `32`):
            Width of the head's one hidden layer; 0 for a linear head.
        reward_range (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            Lowest and highest reward that there is.
        learning_rate (`float`, *optional*, defaults to `5e-3`):
            Of AdamW.
        weight_decay (`float`, *optional*, defaults to `0.01`):
            Of AdamW.
        updates (`int`, *optional*, defaults to `32`):
            Updates per rollout.
        batch_size (`int`, *optional*, defaults to `64`):
            States per update.
        buffer_rollouts (`int`, *optional*, defaults to `16`):
            Rollouts that are learnt from.
        buffer_states (`int`, *optional*, defaults to `65536`):
            Most states that are kept of them.
        trust_rollouts (`int`, *optional*, defaults to `5`):
            Rollouts whose predictions tell how far the critic is trusted.
        seed (`int`, *optional*, defaults to `0`):
            Of the head and of what is drawn from the buffer.

    Example:

    ```python
    >>> critic = ProbeCritic(feature_size=8)
    >>> values = critic.predict(features)  # (M, 8) -> (M,), before it learns from them
    >>> critic.learn(features, returns)
    >>> critic.trust
    0.0
    ```
    """

    def __init__(
        self,
        feature_size: int,
        *,
        hidden_size: int = 32,
        reward_range: tuple[float, float] = (0.0, 1.0),
        learning_rate: float = 5e-3,
        weight_decay: float = 0.01,
        updates: int = 32,
        batch_size: int = 64,
        buffer_rollouts: int = 16,
        buffer_states: int = 65536,
        trust_rollouts: int = 5,
        seed: int = 0,
    ):
        self.low, self.high = reward_range
        if not self.low < self.high:
            raise ValueError(f"`reward_range` must be two numbers, the lower one first, got {reward_range}.")
        self.updates = updates
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.head = _make_head(feature_size, hidden_size, seed)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=learning_rate, weight_decay=weight_decay)
        self.buffer = ReplayBuffer(buffer_rollouts, buffer_states)
        self._sums: deque[torch.Tensor] = deque(maxlen=trust_rollouts)  # of the predictions, see `trust_sums`
        # Of the features in the first rollout; None before it.
        self._shift: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None

    @torch.no_grad()
    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """
        Values of states.

        Args:
            features (`torch.Tensor`):
                Shape `(M, F)`, any floating type, on any device.

        Returns:
            `torch.Tensor`: Within the range of the rewards, shape `(M,)`, float32, where the features are; the middle
            of the range before the first rollout.
        """
        fraction = torch.sigmoid(self._logits(features.cpu()))
        return (self.low + (self.high - self.low) * fraction).to(features.device)

    @property
    def trust(self) -> float:
        """How far the values can be leant on, in [0, 1], by the latest rollouts that it has been asked to learn."""
        return trust_weight(torch.stack(list(self._sums))) if self._sums else 0.0

    def measure(self, values: torch.Tensor, returns: torch.Tensor) -> None:
        """
        Take note of how well a rollout was predicted; call it before [`learn`].

        Args:
            values (`torch.Tensor`):
                What [`predict`] gave, shape `(M,)`.
            returns (`torch.Tensor`):
                What was earned, shape `(M,)`.
        """
        self._sums.append(trust_sums(values, returns).cpu())

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
        if len(returns) and not (self.low <= returns.min() and returns.max() <= self.high):
            raise ValueError(
                f"A return of {returns.min().item():g} to {returns.max().item():g} is outside of `reward_range`, "
                f"{self.low:g} to {self.high:g}."
            )
        if len(returns):
            targets = (returns.float() - self.low) / (self.high - self.low)
            if self._shift is None:
                self._begin(features, targets)
            self.buffer.add(features, targets, self.generator)
        if not len(self.buffer):
            return float("nan")
        total = 0.0
        for _ in range(self.updates):
            drawn, wanted = self.buffer.draw(self.batch_size, self.generator)
            loss = binary_cross_entropy(self._logits(drawn), wanted).mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.item()
        return total / max(self.updates, 1)

    def _begin(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Start at the mean reward, and with features of one size."""
        features = features.detach().cpu().float()
        self._shift = features.mean(0)
        # A feature that does not vary yet may do so later, on a scale that is not known.
        spread = features.std(0, correction=0)
        self._scale = torch.where(spread > 1e-6, spread, 1.0)
        with torch.no_grad():
            last: Any = self.head[-1]
            last.bias.fill_(torch.logit(targets.mean().cpu().clamp(0.01, 0.99)).item())

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        features = features.float()
        if self._shift is not None and self._scale is not None:
            features = (features - self._shift) / self._scale
        return self.head(features).squeeze(-1)

    def state_dict(self) -> dict:
        """All that going on bit-equal needs, for `torch.save`."""
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "buffer": self.buffer.state_dict(),
            "sums": list(self._sums),
            "shift": self._shift,
            "scale": self._scale,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where [`state_dict`] was taken."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.buffer.load_state_dict(state["buffer"])
        self._sums.clear()
        self._sums.extend(state["sums"])
        self._shift, self._scale = state["shift"], state["scale"]
        self.generator.set_state(state["generator"])


def _make_head(feature_size: int, hidden_size: int, seed: int) -> nn.Sequential:
    """A head that answers 0 for every state until its first update."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        if hidden_size:
            layers += [nn.Linear(feature_size, hidden_size), nn.ReLU()]
        last = nn.Linear(hidden_size or feature_size, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
