"""Generalised advantage estimation over the trained tokens of a completion, and schedules for its λ."""

import torch
import torch.nn.functional as F

from .recurrence import linear_recurrence


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float | torch.Tensor = 1.0,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Generalised advantage estimation (Schulman et al., 2016) over the trained tokens of each row.

    \\( R_t = r_t + \gamma \left[ (1 - \lambda_t) V_{t+1} + \lambda_t R_{t+1} \right] \\) and \\( A_t = R_t - V_t \\),
    which for one λ is \\( A_t = \sum_k (\gamma\lambda)^k \delta_{t+k} \\) with
    \\( \delta_t = r_t + \gamma V_{t+1} - V_t \\). After the last trained token both V and R are `bootstrap`.

    Only tokens with `mask = 1` are time steps: padding and tool output are neither states nor steps, and no value at or
    after the end of a completion is ever read. A reward on such a token goes to the last trained token before it (or,
    if there is none, to the first one of the row), so that no reward is lost.

    Args:
        rewards (`torch.Tensor`):
            One reward per completion, shape `(B,)`, given at its last trained token; or one per token, shape `(B, T)`.
        values (`torch.Tensor`):
            Value of the state in which each token is chosen, shape `(B, T)`. Those outside the mask are ignored, NaN
            included.
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`, 0/1 or boolean. A row may be empty.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount γ.
        lam (`float` or `torch.Tensor`, *optional*, defaults to `1.0`):
            λ, one for all; one per row, shape `(B,)` or `(B, 1)`; or one per token, shape `(B, T)`: the weight, in the
            token's own return, of the return after it rather than of the value of the state it leads to.
        bootstrap (`torch.Tensor`, *optional*):
            Value of the state after the last trained token, shape `(B,)`: 0 where the completion has ended, the
            critic's value where it was cut off. `None` is 0 for all.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Advantages and λ-returns, each of shape `(B, T)`, float32 (float64 if
        `values` is), 0 outside the mask, without a gradient.

    Raises:
        ValueError: If shapes do not match.

    Example:

    ```python
    >>> gae(torch.tensor([1.0]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2), lam=0.5)
    (tensor([[0.1250, 0.7500]]), tensor([[0.6250, 1.0000]]))
    ```
    """
    rewards, values, mask, end, step = _time_steps(rewards, values.detach(), mask, bootstrap)
    if isinstance(lam, torch.Tensor) and lam.shape == mask.shape:
        lam = _at_steps(lam.to(values), mask, step)
    else:
        lam = _per_row(lam, values.double())  # its powers go as far as T
    last = mask.sum(-1, keepdim=True) - 1  # column of the last time step
    columns = torch.arange(values.shape[1], device=values.device)
    next_values = torch.where(columns == last, end, values.roll(-1, dims=-1))
    # Of V_{t+1}. What comes after the end is `bootstrap`, as value and as return.
    weight = torch.where(columns == last, 1.0, (1 - lam).to(values.dtype))
    inputs = torch.where(columns <= last, rewards + gamma * weight * next_values, 0)
    returns = linear_recurrence(inputs, gamma * lam, reverse=True)
    returns = _at_tokens(returns, mask, step)
    values = _at_tokens(values, mask, step)
    return torch.where(mask, returns - values, 0), returns


def monte_carlo_returns(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    bootstrap: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Discounted sum of the rewards from each trained token on: the λ-return at λ = 1, which uses no values.

    With γ = 1 and one reward at the end it is that reward, exactly, at every token.

    Args:
        rewards, mask, gamma, bootstrap:
            As in [`gae`].

    Returns:
        `torch.Tensor`: Returns of shape `(B, T)`, float32 (float64 if `rewards` is), 0 outside the mask.
    """
    values = torch.zeros(mask.shape, dtype=rewards.dtype, device=rewards.device)
    return gae(rewards, values, mask, gamma, 1.0, bootstrap)[1]


def length_adaptive_lambda(lengths: torch.Tensor, alpha: float = 0.05) -> torch.Tensor:
    r"""
    λ of VAPO (arXiv:2504.05118, §4.2): \\( 1 - 1 / (\alpha l) \\), clamped to [0, 1], for completions of `l` trained
    tokens.

    The terminal reward reaches the first token with weight about \\( e^{-1/\alpha} \\) at any length.

    Args:
        lengths (`torch.Tensor`):
            Number of trained tokens of each completion, EOS included, any shape.
        alpha (`float`, *optional*, defaults to `0.05`):
            Positive. λ is 0 up to a length of 1/α.

    Returns:
        `torch.Tensor`: λ, of the shape of `lengths`, float64.
    """
    if alpha <= 0:
        raise ValueError(f"length_adaptive_lambda: `alpha` must be positive, got {alpha}.")
    return (1 - 1 / (alpha * lengths.clamp(min=1).double())).clamp(0, 1)


def relative_position_lambda(lengths: torch.Tensor, first_weight: float) -> torch.Tensor:
    r"""
    λ by which the terminal reward reaches the first token with weight `first_weight` at every length `l`:
    \\( q^{1/(l-1)} \\).

    Args:
        lengths (`torch.Tensor`):
            Number of trained tokens of each completion, any shape.
        first_weight (`float`):
            The fraction q, in [0, 1].

    Returns:
        `torch.Tensor`: λ, of the shape of `lengths`, float64.
    """
    if not 0 <= first_weight <= 1:
        raise ValueError(f"relative_position_lambda: `first_weight` must be in [0, 1], got {first_weight}.")
    return torch.pow(first_weight, 1 / (lengths - 1).clamp(min=1).double())


def whiten(values: torch.Tensor, mask: torch.Tensor, totals=None, eps: float = 1e-8) -> torch.Tensor:
    """
    Shift and scale to mean 0 and standard deviation 1 over the trained tokens.

    Args:
        values (`torch.Tensor`):
            Shape `(B, T)`.
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`.
        totals (`Callable`, *optional*):
            Sums a tensor over all processes, e.g. `accelerator.reduce`. Default: only this process.
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the variance.

    Returns:
        `torch.Tensor`: Whitened values, 0 outside the mask.
    """
    totals = totals or (lambda x: x)
    mask = mask.bool()
    kept = torch.where(mask, values, 0)
    count, total = totals(torch.stack([mask.sum().to(kept.dtype), kept.sum()]))
    mean = total / count.clamp(min=1)
    centred = torch.where(mask, kept - mean, 0)
    variance = totals(centred.square().sum()) / count.clamp(min=1)
    return centred * torch.rsqrt(variance + eps)


def _per_row(x: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`x` as a tensor of shape `(B, 1)`."""
    x = torch.as_tensor(x, dtype=like.dtype, device=like.device)
    if x.dim() == 0 or x.shape in ((like.shape[0],), (like.shape[0], 1)):
        return x.reshape(-1, 1).expand(like.shape[0], 1)
    raise ValueError(
        f"gae: expected a scalar, one value for each of {like.shape[0]} rows or, as λ, one for each token "
        f"{tuple(like.shape)}, got {tuple(x.shape)}."
    )


def _time_steps(rewards, values, mask, bootstrap):
    """Move the trained tokens of each row to its front, where column = time step."""
    if values.shape != mask.shape or values.dim() != 2:
        raise ValueError(f"gae: `values` {tuple(values.shape)} and `mask` {tuple(mask.shape)} must both be (B, T).")
    batch, length = values.shape
    if rewards.shape not in ((batch,), (batch, length)):
        raise ValueError(f"gae: `rewards` must be ({batch},) or ({batch}, {length}), got {tuple(rewards.shape)}.")
    mask = mask.bool()
    dtype = torch.promote_types(values.dtype, torch.float32)
    step = torch.where(mask, mask.cumsum(-1) - 1, length)
    dense_values = _at_steps(values.to(dtype), mask, step)
    if rewards.dim() == 1:
        column = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
        rewards, columns = rewards.unsqueeze(1), column
    else:
        columns = (mask.cumsum(-1) - 1).clamp(min=0)
    dense_rewards = torch.zeros_like(dense_values)
    if length:
        dense_rewards = dense_rewards.scatter_add(1, columns, rewards.to(dtype))
    end = _per_row(0.0 if bootstrap is None else bootstrap, dense_values)
    return dense_rewards, dense_values, mask, end, step


def _at_steps(x: torch.Tensor, mask: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """What trained tokens have, where column = time step; 0 after the last."""
    kept = torch.where(mask, x, 0)
    return F.pad(kept.new_zeros(mask.shape), (0, 1)).scatter(1, step, kept)[:, : mask.shape[1]]


def _at_tokens(dense: torch.Tensor, mask: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The inverse of [`_at_steps`]."""
    return torch.where(mask, F.pad(dense, (0, 1)).gather(1, step), 0)
