"""Advantages of a critic that values the states between segments, not every token."""

from collections.abc import Sequence

import torch

from .gae import gae


def segment_of_token(ends: Sequence[Sequence[int]], mask: torch.Tensor) -> torch.Tensor:
    """
    Index of the segment to which each trained token belongs.

    Args:
        ends (`Sequence[Sequence[int]]`):
            For each of B completions the exclusive ends of its segments, see [`~trl_credit.segmenting.Segmenter`].
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`, 0/1 or boolean. Completions start in the first column.

    Returns:
        `torch.Tensor`: int64 of shape `(B, T)`, -1 outside the mask.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    rows = [torch.bucketize(columns, torch.tensor(row, device=mask.device).long(), right=True) for row in ends]
    return torch.where(mask.bool(), torch.stack(rows), -1) if rows else mask.long()


def segment_advantages(
    rewards: torch.Tensor, values: torch.Tensor, segments: torch.Tensor, gae_lambda: float = 1.0
) -> torch.Tensor:
    r"""
    Advantage of every trained token under a critic that values the state before each segment (arXiv:2604.10701, §3).

    GAE in which a time step is a segment: \\( A_k = \sum_{l \ge 0} \lambda^l \delta_{k+l} \\) with \\( \delta_k =
    v_{k+1} - v_k \\), plus the reward at the last segment, after which the value is 0. All tokens of a segment get its
    advantage. At λ = 1 that is \\( r - v_k \\). A segment without trained tokens is not a time step.

    Args:
        rewards (`torch.Tensor`):
            One reward per completion, shape `(B,)`.
        values (`torch.Tensor`):
            Value of the state in which segment k begins, shape `(B, K)`; what follows a row's last segment is ignored.
        segments (`torch.Tensor`):
            Segment of each trained token, shape `(B, T)`, -1 elsewhere, see [`segment_of_token`].
        gae_lambda (`float`, *optional*, defaults to `1.0`):
            λ in [0, 1].

    Returns:
        `torch.Tensor`: Advantages of shape `(B, T)`, float32 (float64 if `values` is), 0 where `segments` is -1,
        without a gradient.

    Raises:
        ValueError: If a token belongs to a segment that has no column in `values`.

    Example:

    ```python
    >>> segment_advantages(torch.tensor([1.0]), torch.tensor([[0.5, 0.25]]), torch.tensor([[0, 0, 1]]))
    tensor([[0.5000, 0.5000, 0.7500]])
    ```
    """
    if segments.numel() and segments.max() >= values.shape[1]:
        raise ValueError(
            f"segment_advantages: a token belongs to segment {segments.max().item()}, `values` has {values.shape[1]}."
        )
    width = values.shape[1]
    present = torch.zeros(len(values), width + 1, dtype=torch.bool, device=values.device)
    present = present.scatter(1, torch.where(segments < 0, width, segments), True)[:, :width]
    advantages, _ = gae(rewards, values, present, lam=gae_lambda)
    # The column of its own is for tokens of no segment.
    padded = torch.cat([advantages, advantages.new_zeros(len(values), 1)], dim=1)
    return padded.gather(1, torch.where(segments < 0, width, segments))
