"""How far to lean on a critic, by how well it has predicted returns that it was not trained on."""

import torch


def trust_sums(values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    """
    What [`trust_weight`] needs to know of predictions, to be added up over processes and rollouts.

    Args:
        values (`torch.Tensor`):
            Predicted values, any shape.
        returns (`torch.Tensor`):
            What was earned, same shape.

    Returns:
        `torch.Tensor`: `(5,)` in float64: their number, Σ V, Σ R, Σ V², Σ VR.
    """
    values, returns = values.detach().double().flatten(), returns.detach().double().flatten()
    count = torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device)
    return torch.stack([count, values.sum(), returns.sum(), values.square().sum(), (values * returns).sum()])


def trust_weight(sums: torch.Tensor) -> float:
    r"""
    The slope of the regression of R on V, clamped to [0, 1]:
    \\( w = \mathrm{Cov}(V, R) / \mathrm{Var}(V) \\).

    It is the factor by which the critic's deviations from its mean are best shrunk: 1 for values that are conditional
    means, the exact ones among them, 0 for values that know nothing of the returns, and in between for those that know
    something and are too sure of it. The predictions must come from before the critic was trained on their returns.

    Args:
        sums (`torch.Tensor`):
            Sums of [`trust_sums`], shape `(5,)`, or several of them, shape `(N, 5)`, which are added.

    Returns:
        `float`: In [0, 1]; 0 where the values do not vary, or there are none.
    """
    count, value, reward, square, product = sums.double().reshape(-1, 5).sum(0).tolist()
    if count == 0:
        return 0.0
    variance = square - value * value / count
    if variance <= 1e-12 * square:  # what is left of equal values after rounding
        return 0.0
    return min(max((product - value * reward / count) / variance, 0.0), 1.0)


def mixed_advantages(advantages: torch.Tensor, fallback: torch.Tensor, weight: float) -> torch.Tensor:
    r"""
    \\( (1 - w) (R - b) + w A \\): a critic's advantages as far as it is trusted, and for the rest those of a baseline.

    Args:
        advantages (`torch.Tensor`):
            A, those of the critic, shape `(B, T)`, 0 outside the trained tokens.
        fallback (`torch.Tensor`):
            R − b, those without a critic, e.g. the group's, shape `(B,)`.
        weight (`float`):
            w in [0, 1], see [`trust_weight`].

    Returns:
        `torch.Tensor`: Shape `(B, T)`. At w = 0 the fallback at every token, whatever `advantages` are.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"mixed_advantages: `weight` must be in [0, 1], got {weight}.")
    spread = fallback.unsqueeze(1).expand_as(advantages)
    return spread.clone() if weight == 0 else torch.lerp(spread.to(advantages.dtype), advantages, weight)
