"""The range of the reward, where a critic's values are bounded to it."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from ...critics.facts import RUNNING
from ...options import is_number, such_that


# Where a running range begins: at that of verifiable rewards.
_START = (0.0, 1.0)
# Of the range, how far a fresh head stays away from its ends: its logit is then a few updates away from the others.
_LEAST_SHARE = 0.05
# And by how much a reward may lie outside: sums of weighted rewards are rounded.
_SLACK = 1e-5


class RewardRange(Sequence[float]):
    """
    The lowest and the highest reward. Whatever maps values from it or to it holds this object, for it may grow.

    Args:
        ends (`Sequence[float]`):
            Low and high.
        grows (`bool`, *optional*, defaults to `False`):
            Whether it grows to hold what is seen.
    """

    def __init__(self, ends: Sequence[float], grows: bool = False):
        self.ends, self.grows = [float(end) for end in ends], grows

    @classmethod
    def of(cls, asked: Any, own: Sequence[float] | None) -> "RewardRange | None":
        """
        The range that a run begins with.

        Args:
            asked (`list[float]` or `str`, *optional*):
                The config's `reward_range`.
            own (`Sequence[float]`, *optional*):
                What the critic that it starts from was trained with, from which a running range goes on.
        """
        if asked == RUNNING:
            return cls(own or _START, grows=True)
        return None if asked is None else cls(asked)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        return self.ends[index]

    def holds(self, x: torch.Tensor) -> torch.Tensor:
        """Which numbers lie within it, but for rounding, of the shape of `x`; NaN does."""
        low, high = self.ends
        slack = _SLACK * (high - low)
        return ~((x < low - slack) | (x > high + slack))

    def grow_to(self, low: float, high: float) -> bool:
        """Grow to hold two more numbers, if it does that; says whether it has."""
        if not self.grows or self.holds(torch.tensor([low, high])).all():
            return False
        self.ends = [min(self.ends[0], low), max(self.ends[1], high)]
        return True


def as_range(value: Any) -> Any:
    """A `reward_range` as it is meant: on the command line its parts are texts."""
    if isinstance(value, (list, tuple)):
        if list(value) == [RUNNING]:
            return RUNNING
        with suppress(TypeError, ValueError):
            numbers = [float(end) for end in value]
            return numbers if is_range(numbers) else value
    return value


def is_range(value: Any) -> bool:
    """Whether this is a lower and a higher number."""
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))
    return is_pair and value[0] < value[1]


def is_range_or_running(value: Any) -> bool:
    """Whether this is a range that is given, or one that is to be learnt."""
    return value == RUNNING or is_range(value)


# What the option may be, in a field's metadata: where it is needed, and where it is not.
A_RANGE = such_that(is_range_or_running, "two finite numbers, the lower one first, or 'running'")
A_RANGE_OR_NONE = such_that(
    lambda value: value is None or is_range_or_running(value),
    "two finite numbers, the lower one first, 'running', or None",
)


def refuse_start_outside(config: Any) -> None:
    """Raise if a bounded critic's `critic_initial_value` is not between the ends of its `reward_range`."""
    start, asked = config.critic_initial_value, config.reward_range
    low, high = _START if asked == RUNNING else asked
    if start is not None and not low < start < high:
        where = f", where `reward_range={asked!r}` begins" if asked == RUNNING else ""
        raise ValueError(
            f"{type(config).__name__}: `critic_initial_value={start}` must lie between the ends of "
            f"`reward_range={[low, high]}`{where}: a value at its end has no finite logit."
        )


def away_from_the_ends(value: float, reward_range: Sequence[float], share: float = _LEAST_SHARE) -> float:
    """The nearest value that is at least a share of the range, by default a twentieth, away from its ends."""
    low, high = reward_range
    margin = share * (high - low)
    return min(max(value, low + margin), high - margin)


def refuse_rewards_outside(trainer: Any, rewards: torch.Tensor, reward_range: RewardRange, way_out: str) -> None:
    """
    Raise on all processes if a reward of any of them is out of range, and say which function gave it.

    Args:
        trainer ([`~trl_credit.trainers.critic.CriticTrainer`]):
            The trainer, at its latest rollout.
        rewards (`torch.Tensor`):
            Those of this process, shape `(B,)`, NaN for none.
        reward_range ([`RewardRange`]):
            The range.
        way_out (`str`):
            What to do, other than to set `reward_range` to them.
    """
    everywhere = trainer.accelerator.gather(rewards)
    outside = (~reward_range.holds(everywhere)).nonzero()
    if not len(outside):
        return
    row = outside[0].item()
    parts = ", ".join(
        f"{name!r} gave {score:g} with weight {weight:g}"
        for name, score, weight in zip(
            trainer.reward_func_names, trainer._scores[row].tolist(), trainer.reward_weights.tolist(), strict=True
        )
    )
    raise ValueError(
        f"The reward {everywhere[row].item():g} of completion {row} at step {trainer.state.global_step} lies outside "
        f"`reward_range={list(reward_range)}` ({parts}): a critic of bounded values needs to know the lowest and the "
        f"highest reward. Set `reward_range` to them, {way_out}."
    )
