"""What a run logs about the values of its critic, one rollout at a time."""

import torch

from ..credit.fit import at_fraction, explained_variance, fit_sums


FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


def fit_report(trainer, values, returns, mask, num_generations: int) -> dict[str, float]:
    """
    How well values explain Monte-Carlo returns.

    Args:
        trainer ([`~trl_credit.seam.CreditTrainer`]):
            For its processes.
        values, returns, mask (`torch.Tensor`):
            Values, Monte-Carlo returns and the tokens that count, shape `(B, T)`.
        num_generations (`int`):
            Completions per prompt, next to each other over all processes.

    Returns:
        `dict`: `explained_variance`, and with several completions per prompt `explained_variance_within_prompt`.
    """
    sums = trainer.accelerator.gather(fit_sums(values, returns, mask))
    report = {"explained_variance": explained_variance(sums)}
    if num_generations > 1:
        groups = torch.arange(len(sums), device=sums.device) // num_generations
        report["explained_variance_within_prompt"] = explained_variance(sums, groups)
    return report


def value_means(values, mask, right) -> dict[str, tuple]:
    """
    Sums and counts of the values, for [`~trl_credit.seam.CreditTrainer.log_means`].

    Args:
        values, mask (`torch.Tensor`):
            Shape `(B, T)`.
        right (`torch.Tensor`):
            Completions with a positive reward, shape `(B,)`, boolean.
    """
    means = {"mean": (torch.where(mask, values, 0).sum(), mask.sum())}
    some = mask.any(1)
    for fraction in FRACTIONS:
        at = at_fraction(values, mask, fraction)
        for name, rows in (("right", some & right), ("wrong", some & ~right)):
            means[f"{name}_at_{round(100 * fraction)}"] = (torch.where(rows, at, 0).sum(), rows.sum())
    return means


def values_in_short(values: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """
    Values at 0, 25, 50, 75 and 100 % of each completion, for the table of completions.

    Args:
        values, mask (`torch.Tensor`):
            Shape `(B, T)`.
    """
    columns = torch.stack([at_fraction(values, mask, fraction) for fraction in FRACTIONS], dim=1).tolist()
    return [
        " ".join(f"{value:.2f}" for value in row) if any_token else ""
        for row, any_token in zip(columns, mask.any(1).tolist(), strict=True)
    ]


def extremes(trainer, x: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest of the masked values over all processes; NaN if there are none."""
    low = torch.where(mask, x.float(), torch.inf).min() if x.numel() else torch.tensor(torch.inf)
    high = torch.where(mask, x.float(), -torch.inf).max() if x.numel() else torch.tensor(-torch.inf)
    ends = trainer.accelerator.gather(torch.stack([low, -high]).unsqueeze(0)).amin(0)
    low, high = ends[0].item(), -ends[1].item()
    return (low, high) if low <= high else (float("nan"), float("nan"))
