"""The reward of a completion, from those of several reward functions."""

import torch


def weighted_reward(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Weighted sum of what the reward functions gave.

    Args:
        scores (`torch.Tensor`):
            Rewards of F functions, shape `(B, F)`; NaN where a function gave none.
        weights (`torch.Tensor`):
            Weight of each function, shape `(F,)`.

    Returns:
        `torch.Tensor`: Shape `(B,)`; NaN where no function gave a reward.
    """
    total = (scores * weights.to(scores.device)).nansum(dim=1)
    total[scores.isnan().all(dim=1)] = torch.nan
    return total
