"""Losses of a value network, for each value."""

import torch
import torch.nn.functional as F


def squared_error(
    values: torch.Tensor,
    returns: torch.Tensor,
    old_values: torch.Tensor | None = None,
    clip_range: float | None = None,
) -> torch.Tensor:
    r"""
    \\( \tfrac{1}{2} (V - R)^2 \\) per token. With a clip range, as in PPO: the larger of this and the same with V kept
    within `clip_range` of the critic's value at the time of the rollout.

    Args:
        values (`torch.Tensor`):
            Values of the critic, with gradient, any shape.
        returns (`torch.Tensor`):
            Targets, same shape.
        old_values (`torch.Tensor`, *optional*):
            Values at the time of the rollout, same shape. Required with `clip_range`.
        clip_range (`float`, *optional*):
            Positive; `None` for no clipping.

    Returns:
        `torch.Tensor`: The loss of each token, in float32.
    """
    values, returns = values.float(), returns.float()
    loss = (values - returns).square()
    if clip_range is not None:
        if old_values is None:
            raise ValueError("squared_error: `clip_range` needs `old_values`, the values at the time of the rollout.")
        old_values = old_values.detach().float()
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        loss = torch.maximum(loss, (clipped - returns).square())
    return 0.5 * loss


def clip_share(values: torch.Tensor, old_values: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Which values have moved further than `clip_range` from those of the rollout, boolean."""
    return (values.detach().float() - old_values.float()).abs() > clip_range


def binary_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    r"""
    \\( -R \log V - (1 - R) \log(1 - V) \\) with \\( V = \sigma(\text{logit}) \\), from the logit, so that it is exact
    where V rounds to 0 or 1. Equation of the critic's loss in arXiv:2604.08865.

    Args:
        logits (`torch.Tensor`):
            Outputs of the critic, with gradient, any shape.
        targets (`torch.Tensor`):
            R in [0, 1], same shape; not only 0 and 1.

    Returns:
        `torch.Tensor`: The loss of each, in float32.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
