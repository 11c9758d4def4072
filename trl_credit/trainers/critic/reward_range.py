"""The range of the reward, where a critic's values are bounded to it."""

from collections.abc import Sequence
from typing import Any

import torch

from ...options import is_number


# Of the range, how far a fresh head stays away from its ends: its logit is then a few updates away from the others.
_LEAST_SHARE = 0.05


def is_range(value: Any) -> bool:
    """Whether this is a lower and a higher number."""
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))
    return is_pair and value[0] < value[1]


def refuse_start_outside(config: Any) -> None:
    """Raise if a bounded critic's `critic_initial_value` is not between the ends of its `reward_range`."""
    (low, high), start = config.reward_range, config.critic_initial_value
    if start is not None and not low < start < high:
        raise ValueError(
            f"{type(config).__name__}: `critic_initial_value={start}` must lie between the ends of "
            f"`reward_range={config.reward_range}`: a value at its end has no finite logit."
        )


def away_from_the_ends(value: float, reward_range: Sequence[float]) -> float:
    """The nearest value that is at least a twentieth of the range away from its ends."""
    low, high = reward_range
    margin = _LEAST_SHARE * (high - low)
    return min(max(value, low + margin), high - margin)


def refuse_rewards_outside(trainer: Any, rewards: torch.Tensor, reward_range: Sequence[float], way_out: str) -> None:
    """
    Raise on all processes if a reward of any of them is out of range, and say which function gave it.

    Args:
        trainer ([`~trl_credit.trainers.critic.CriticTrainer`]):
            The trainer, at its latest rollout.
        rewards (`torch.Tensor`):
            Those of this process, shape `(B,)`, NaN for none.
        reward_range (`Sequence[float]`):
            Low and high.
        way_out (`str`):
            The setting that takes any reward.
    """
    low, high = reward_range
    everywhere = trainer.accelerator.gather(rewards)
    slack = 1e-5 * (high - low)  # for sums of weighted rewards
    outside = ((everywhere < low - slack) | (everywhere > high + slack)).nonzero()
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
        f"highest reward. Set `reward_range` to them, or {way_out}, which takes any. (A probe critic needs a range.)"
    )
