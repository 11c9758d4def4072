"""Values that cannot leave the range of the reward: what a critic puts out is then their logit."""

import math
from collections.abc import Sequence

import torch


def bounded_values(outputs: torch.Tensor, reward_range: Sequence[float] | None) -> torch.Tensor:
    r"""
    \\( V = \text{low} + (\text{high} - \text{low}) \, \sigma(\text{output}) \\), as in BPCO (arXiv:2608.23566) and,
    for rewards from 0 to 1, in SPPO (arXiv:2604.08865).

    Args:
        outputs (`torch.Tensor`):
            What the critic puts out, any shape.
        reward_range (`Sequence[float]`, *optional*):
            Low and high. `None` for a critic whose outputs are the values themselves.

    Returns:
        `torch.Tensor`: Values, of the shape of `outputs`, with its gradient.
    """
    if reward_range is None:
        return outputs
    low, high = reward_range
    return low + (high - low) * outputs.sigmoid()


def position_in_range(x: torch.Tensor, reward_range: Sequence[float]) -> torch.Tensor:
    """
    Where rewards or returns lie between low and high, as numbers in [0, 1]: the targets of a cross-entropy.

    Args:
        x (`torch.Tensor`):
            Any shape. What lies outside counts as the nearest end.
        reward_range (`Sequence[float]`):
            Low and high.
    """
    low, high = reward_range
    return ((x - low) / (high - low)).clamp(0, 1)


def output_for(value: float, reward_range: Sequence[float] | None) -> float:
    """
    The inverse of [`bounded_values`]: what a critic puts out for a value.

    Args:
        value (`float`):
            Between low and high, both excluded: a value at an end has no finite logit.
        reward_range (`Sequence[float]`, *optional*):
            Low and high, or `None`.
    """
    if reward_range is None:
        return value
    low, high = reward_range
    return math.log((value - low) / (high - value))
