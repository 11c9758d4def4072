"""Whether predicted probabilities come true, from sums that can be added over batches and processes."""

import math

import torch


DECILES = 10


def calibration_sums(probabilities: torch.Tensor, outcomes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Sums from which Brier score, calibration error and reliability follow, one row per decile of the probability.

    Args:
        probabilities (`torch.Tensor`):
            Predictions in [0, 1], any shape.
        outcomes (`torch.Tensor`):
            What came true, in [0, 1], same shape.
        mask (`torch.Tensor`):
            Predictions that count, same shape.

    Returns:
        `torch.Tensor`: `(10, 4)` in float64: number, Σ V, Σ R, Σ (V − R)² of the predictions in [0, .1), [.1, .2), …,
        [.9, 1].
    """
    mask = mask.bool()
    v, r = probabilities[mask].double(), outcomes[mask].double()
    decile = (v * DECILES).long().clamp(0, DECILES - 1)
    sums = torch.zeros(DECILES, 4, dtype=torch.float64, device=v.device)
    return sums.index_add_(0, decile, torch.stack([torch.ones_like(v), v, r, (v - r).square()], dim=-1))


def brier_score(sums: torch.Tensor) -> float:
    r"""
    \\( \tfrac{1}{n} \sum_i (V_i - R_i)^2 \\), NaN without predictions.

    Args:
        sums (`torch.Tensor`):
            Of [`calibration_sums`], added over all batches and processes, shape `(10, 4)`.

    Returns:
        `float`: In [0, 1]; 0.25 for a critic that always says ½ when outcomes are 0 or 1.
    """
    count, _, _, squares = sums.sum(0).tolist()
    return squares / count if count else math.nan


def expected_calibration_error(sums: torch.Tensor) -> float:
    r"""
    \\( \sum_b \tfrac{n_b}{n} | \bar V_b - \bar R_b | \\) over the deciles b of the prediction, NaN without predictions.

    Args:
        sums (`torch.Tensor`):
            Of [`calibration_sums`], added over all batches and processes, shape `(10, 4)`.

    Returns:
        `float`: In [0, 1]. Over few predictions it is large by chance: with n in a decile it is off by about \\(
        \tfrac{1}{2 \sqrt{n}} \\).
    """
    count = sums[:, 0].sum().item()
    return (sums[:, 1] - sums[:, 2]).abs().sum().item() / count if count else math.nan
