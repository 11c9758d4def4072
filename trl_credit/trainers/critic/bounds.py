"""Between what a critic's values lie, and where they start."""

from typing import Any

import torch

from ...credit.bounded_values import output_for
from ...critics.facts import RUNNING, CriticFacts
from ...critics.fresh_head import trained_head
from ..value_report import extremes
from .pretraining import CriticPretraining
from .reward_range import RewardRange, away_from_the_ends, refuse_rewards_outside


class BoundsOfValues(CriticPretraining):
    """The part of [`CriticTrainer`] that knows the range of the reward."""

    _source_facts: CriticFacts | None
    _range: RewardRange | None
    # Whether the critic has a head that has still to be told where to start.
    _head_waits = False

    def critic_head(self) -> dict[str, Any]:
        """Parameters of the critic that are trained at `critic_head_learning_rate`, by name."""
        raise NotImplementedError

    def state_values(self, rollout: dict) -> torch.Tensor:
        """The critic's values of all states of a rollout, shape `(B, T + 1)`."""
        raise NotImplementedError

    @property
    def value_range(self) -> RewardRange | None:
        """Lowest and highest value of the critic; `None`: its values may be any number."""
        return self._range

    def head_output(self, value: float) -> float:
        """What a fresh head puts out where it is to say `value`. A measured mean may lie at an end of the range."""
        if self.value_range is not None and self.args.critic_initial_value is None:
            value = away_from_the_ends(value, self.value_range)
        return output_for(value, self.value_range)

    def start_head(self, rewards: torch.Tensor, mode: str) -> None:
        """
        Let a fresh head start at the mean reward of the first rollout to train on. Call it before values are used.

        Args:
            rewards (`torch.Tensor`):
                Those of [`CreditTrainer.assign_credit`], shape `(B,)`.
            mode (`str`):
                `"train"` or `"eval"`: an evaluation changes nothing.
        """
        if not self._head_waits or mode == "eval":
            return
        scored = rewards.isfinite()
        total, count = self.total(torch.stack([torch.where(scored, rewards, 0).sum(), scored.sum()])).tolist()
        if count == 0:
            return
        bias = [name for name, p in trained_head(self.engine.network).items() if name.endswith("bias")]
        for name in bias:  # none where the architecture's head has none
            self.engine.fill(name, self.head_output(total / count))
        self._head_waits = False

    # --- The range of the reward

    def range_to_begin_with(self) -> RewardRange | None:
        """The range of the first rollout."""
        asked: Any = getattr(self.args, "reward_range", None)  # not every method with a critic bounds it
        return RewardRange.of(asked, self.range_of_source)

    @property
    def range_of_source(self) -> list[float] | None:
        """That of the critic that the run starts from."""
        return None if self._source_facts is None else self._source_facts.settings.get("reward_range")

    def keep_in_range(
        self, rollout: dict, rewards: torch.Tensor, mode: str, way_out: str, seen: torch.Tensor | None = None
    ) -> None:
        """
        Hold a rollout to the range of the reward: if it is given, rewards outside are refused; if it is learnt, it
        grows to hold them. Call it before values are used.

        Args:
            rollout (`dict`):
                That of [`CreditTrainer.assign_credit`].
            rewards (`torch.Tensor`):
                Its rewards, shape `(B,)`, NaN for none.
            mode (`str`):
                `"train"` or `"eval"`: an evaluation changes nothing.
            way_out (`str`):
                For an error, what to do but to set `reward_range` to them.
            seen (`torch.Tensor`, *optional*):
                What the range grows to hold, any shape. Default: the rewards.
        """
        reward_range = self.value_range
        if reward_range is None:
            return
        if not reward_range.grows:
            return refuse_rewards_outside(self, rewards, reward_range, way_out)
        if mode == "train":
            seen = rewards if seen is None else seen
            ends = torch.tensor(extremes(self, seen, seen.isfinite()))
            if not reward_range.holds(ends).all():
                self._grow(reward_range, ends.tolist(), rollout)
        for name, end in zip(("lowest", "highest"), reward_range, strict=True):
            self.log_value(mode, f"critic/{name}_reward", end)

    def _grow(self, reward_range: RewardRange, seen: list[float], rollout: dict) -> None:
        """A wider range, in which a critic with a head still says the same on average."""
        before = list(reward_range)
        bias = [] if self._head_waits else [name for name in self.critic_head() if name.endswith("bias")]
        mean = 0.0
        if bias:
            values = self.state_values(rollout)[:, 0]
            known = values.isfinite()
            total, count = self.total(torch.stack([torch.where(known, values, 0).sum(), known.sum()])).tolist()
            mean = away_from_the_ends(total / max(count, 1), before, 1e-4)
        reward_range.grow_to(*seen)
        for name in bias:
            self.engine.shift(name, output_for(mean, reward_range) - output_for(mean, before))
        self._announce(
            f"`reward_range={RUNNING!r}` has grown from {before} to {list(reward_range)} at step "
            f"{self.state.global_step}."
        )

    def take_range(self, facts: CriticFacts | None) -> None:
        """Go on with the range of a saved critic, if the range is learnt."""
        own = None if facts is None else facts.settings.get("reward_range")
        if own is not None and self._range is not None and self._range.grows:
            self._range.ends = list(own)
