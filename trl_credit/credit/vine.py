"""Values and advantages of VinePPO: a state's value is what the policy goes on to achieve from it."""

import torch


def monte_carlo_values(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Values of states, from the rewards of continuations sampled from them.

    Args:
        rewards (`torch.Tensor`):
            Rewards of K continuations of each of S states, shape `(S, K)`; NaN where one was not scored.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The mean of each state and the standard error of that mean, shape `(S,)`,
        float32 (float64 if `rewards` is). The mean is NaN where nothing was scored, the error where fewer than two
        were.
    """
    scored = rewards.isfinite()
    count = scored.sum(1)
    kept = torch.where(scored, rewards, 0).double()
    mean = kept.sum(1) / count
    squares = torch.where(scored, kept - mean.unsqueeze(1), 0).square().sum(1)
    error = torch.where(count > 1, squares / (count - 1) / count, torch.nan).sqrt()
    return mean.to(rewards.dtype), error.to(rewards.dtype)


def vine_advantages(values: torch.Tensor, rewards: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    r"""
    Advantages of VinePPO (arXiv:2410.01679, §4): every token of segment k has \\( A_k = V_{k+1} - V_k \\), with the
    completion's own reward as the value after its last segment.

    Args:
        values (`torch.Tensor`):
            Value of the state in which segment k begins, shape `(B, K)`; NaN where it is not known. What follows a
            row's last segment is ignored.
        rewards (`torch.Tensor`):
            One reward per completion, shape `(B,)`; NaN where it was not scored.
        segments (`torch.Tensor`):
            Segment of each trained token, shape `(B, T)`, -1 elsewhere, see
            [`~trl_credit.credit.segment_gae.segment_of_token`].

    Returns:
        `torch.Tensor`: Shape `(B, T)`, float32 (float64 if `values` is); 0 where `segments` is -1, and where one of
        the two values is not known.

    Example:

    ```python
    >>> vine_advantages(torch.tensor([[0.5, 0.25]]), torch.tensor([1.0]), torch.tensor([[0, 0, 1]]))
    tensor([[-0.2500, -0.2500,  0.7500]])
    ```
    """
    outcomes = rewards.unsqueeze(1).to(values.dtype)
    # Column k + 1 is the state after segment k: the next state, or the end.
    states = torch.cat([values, outcomes], dim=1)
    last = segments.amax(1, keepdim=True) if segments.shape[1] else segments.new_full((len(segments), 1), -1)
    states = states.scatter(1, last + 1, torch.where(last < 0, states[:, :1], outcomes))
    changes = torch.nan_to_num(states[:, 1:] - states[:, :-1], nan=0.0)
    return torch.where(segments < 0, 0, changes.gather(1, segments.clamp(min=0)))
