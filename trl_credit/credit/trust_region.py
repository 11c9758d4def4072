"""Trust regions by mask: instead of clipping a ratio, tokens at which the policy has gone too far are left out."""

import torch


DIVERGENCES = ("tv", "kl")


def within_ratios(log_ratio: torch.Tensor, low: float, high: float) -> torch.Tensor:
    r"""
    DIS, direct double-sided importance sampling, of SAO (arXiv:2607.07508): a token counts if
    \\( 1 - \epsilon_l \le r \le 1 + \epsilon_h \\), whatever the sign of its advantage.

    Args:
        log_ratio (`torch.Tensor`):
            log r = log π − log μ, with μ the policy that sampled the token, any shape.
        low, high (`float`):
            \\( \epsilon_l \\) and \\( \epsilon_h \\).

    Returns:
        `torch.Tensor`: Tokens that count, of the same shape, boolean.
    """
    ratio = log_ratio.detach().double().exp()
    return (ratio >= 1 - low) & (ratio <= 1 + high)


def binary_divergence(logps: torch.Tensor, sampler_logps: torch.Tensor, kind: str = "tv") -> torch.Tensor:
    r"""
    Divergence of "this token or any other" between sampler μ and policy π, of DPPO (arXiv:2602.04879): total variation
    \\( |\pi - \mu| \\), or \\( \mathrm{KL}(\mu \| \pi) = \mu \log\frac{\mu}{\pi} + (1 - \mu)
    \log\frac{1 - \mu}{1 - \pi} \\).

    Args:
        logps (`torch.Tensor`):
            log π of the sampled tokens, any shape.
        sampler_logps (`torch.Tensor`):
            log μ of them, same shape.
        kind (`str`, *optional*, defaults to `"tv"`):
            `"tv"` or `"kl"`.

    Returns:
        `torch.Tensor`: Of the same shape, float64, without gradient, at least 0; the KL may be infinite.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"binary_divergence: `kind` must be one of {DIVERGENCES}, got {kind!r}.")
    log_pi, log_mu = logps.detach().double().clamp(max=0), sampler_logps.detach().double().clamp(max=0)
    pi, mu = log_pi.exp(), log_mu.exp()
    if kind == "tv":
        return (pi - mu).abs()
    # 1 - p is -expm1(log p): exact where p is close to 1, as most tokens of a language model are.
    others_of_pi, others_of_mu = -torch.expm1(log_pi), -torch.expm1(log_mu)
    others = torch.xlogy(others_of_mu, others_of_mu) - torch.xlogy(others_of_mu, others_of_pi)
    return (mu * (log_mu - log_pi) + others).clamp(min=0)


def within_divergence(
    logps: torch.Tensor,
    sampler_logps: torch.Tensor,
    advantages: torch.Tensor,
    threshold: float,
    kind: str = "tv",
) -> torch.Tensor:
    r"""
    The mask of DPPO (arXiv:2602.04879): a token counts unless the policy has gone further than δ from its sampler and
    the update would push it further away: A > 0 and r > 1, or A < 0 and r < 1.

    Args:
        logps, sampler_logps, kind:
            As in [`binary_divergence`].
        advantages (`torch.Tensor`):
            Of the tokens, shape `(B, T)` or `(B, 1)`.
        threshold (`float`):
            δ.

    Returns:
        `torch.Tensor`: Tokens that count, of the shape of `logps`, boolean.
    """
    step = (logps.detach() - sampler_logps.detach()).sign() * advantages.detach().sign()
    return ~((step > 0) & (binary_divergence(logps, sampler_logps, kind) > threshold))
