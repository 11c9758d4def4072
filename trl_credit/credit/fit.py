"""How good a critic is, from sums that can be added over rows and processes before anything is divided."""

import math

import torch


def fit_sums(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Sums from which explained variance follows, one row per completion.

    Args:
        values (`torch.Tensor`):
            Values of the critic, shape `(B, T)`.
        returns (`torch.Tensor`):
            Monte-Carlo returns, shape `(B, T)`.
        mask (`torch.Tensor`):
            Tokens that count, shape `(B, T)`.

    Returns:
        `torch.Tensor`: `(B, 5)` in float64: number of tokens, Σ R, Σ R², Σ (R − V), Σ (R − V)².
    """
    mask = mask.bool()
    # float32 sums of squares cancel when the mean is large beside the spread.
    returns = torch.where(mask, returns, 0).double()
    errors = torch.where(mask, returns - values.double(), 0)
    return torch.stack(
        [mask.sum(-1).double(), returns.sum(-1), returns.square().sum(-1), errors.sum(-1), errors.square().sum(-1)],
        dim=-1,
    )


def explained_variance(sums: torch.Tensor, groups: torch.Tensor | None = None) -> float:
    r"""
    \\( 1 - \mathrm{Var}(R - V) / \mathrm{Var}(R) \\) over all tokens, NaN when the returns do not vary.

    Args:
        sums (`torch.Tensor`):
            Rows of [`fit_sums`] from all processes, shape `(B, 5)`.
        groups (`torch.Tensor`, *optional*):
            The group of each row, shape `(B,)`, integers. Variances are then taken within groups and pooled: with one
            group per prompt, this is how much the critic explains beyond the difficulty of the prompt.

    Returns:
        `float`: At most 1; 0 for a constant critic.
    """
    sums = sums.double()
    if groups is None:
        groups = torch.zeros(len(sums), dtype=torch.long, device=sums.device)
    _, index = groups.unique(return_inverse=True)
    pooled = sums.new_zeros(int(index.max()) + 1 if len(index) else 0, sums.shape[1]).index_add_(0, index, sums)
    count = pooled[:, 0].clamp(min=1)
    spread = (pooled[:, 2] - pooled[:, 1].square() / count).sum().item()
    error = (pooled[:, 4] - pooled[:, 3].square() / count).sum().item()
    # What is left of equal returns after rounding is not a variance.
    if spread <= 1e-12 * max(pooled[:, 2].sum().item(), 1e-30):
        return math.nan
    return 1 - max(error, 0.0) / spread


def at_fraction(values: torch.Tensor, mask: torch.Tensor, fraction: float) -> torch.Tensor:
    """
    The value of each row at a fraction of its trained tokens: 0 is the first of them, 1 the last.

    Args:
        values (`torch.Tensor`):
            Shape `(B, T)`.
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`. Rows without any give the value of the first column: leave them out.
        fraction (`float`):
            In [0, 1].

    Returns:
        `torch.Tensor`: Shape `(B,)`.
    """
    mask = mask.bool()
    wanted = ((mask.sum(-1) - 1).clamp(min=0) * fraction).round().long().unsqueeze(1)
    column = (mask & (mask.cumsum(-1) - 1 == wanted)).int().argmax(-1, keepdim=True)
    return values.gather(1, column).squeeze(1)
