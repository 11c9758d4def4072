"""
How runs are summed up: as in "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv:2108.13264).

Scores are arrays of shape `(runs, tasks)`, or `(runs,)` for one task. A score may be infinite: a threshold that a run
never reached takes infinitely many tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A statistic of some runs, and where it lies in 95 of 100 resamplings of them."""

    value: float
    low: float
    high: float


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of the middle half of all scores: a quarter is cut off at each end, rounded down to whole scores."""
    ordered = np.sort(np.asarray(scores, dtype=float), axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Probability that a run of ours scores higher than one of theirs on the same task, ties half; mean over tasks."""
    ours, theirs = (np.asarray(x, dtype=float).reshape(len(x), -1) for x in (ours, theirs))
    higher = (ours[:, None] > theirs[None]).mean(axis=(0, 1))
    level = (ours[:, None] == theirs[None]).mean(axis=(0, 1))
    return float((higher + 0.5 * level).mean())


def stratified_bootstrap(
    statistic: Callable[..., float], *samples: np.ndarray, resamplings: int = 2000, seed: int = 0
) -> Interval:
    """
    Percentile interval of a statistic, by resampling the runs of each task, or of each start model, on their own.

    Args:
        statistic (`Callable`):
            Of as many arrays as there are `samples`.
        samples (`np.ndarray`):
            Each of shape `(runs, tasks)` or `(runs,)`, with as many runs as it has.
        resamplings (`int`, *optional*, defaults to `2000`):
            How many.
        seed (`int`, *optional*, defaults to `0`):
            Of the resampling.
    """
    random = np.random.default_rng(seed)
    samples = tuple(np.asarray(x, dtype=float).reshape(len(x), -1) for x in samples)
    drawn = []
    for _ in range(resamplings):
        resampled = [np.take_along_axis(x, random.integers(len(x), size=x.shape), axis=0) for x in samples]
        drawn.append(statistic(*resampled))
    # An infinite end is one: no number is between it and its neighbour.
    low, high = np.percentile(drawn, [2.5, 97.5], method="nearest")
    return Interval(statistic(*samples), float(low), float(high))


def tokens_to(tokens: np.ndarray, rewards: np.ndarray, threshold: float) -> float:
    """Tokens at which a curve first reaches a threshold, on straight lines between its points; infinite if never."""
    tokens, rewards = np.asarray(tokens, dtype=float), np.asarray(rewards, dtype=float)
    reached = np.flatnonzero(rewards >= threshold)
    if len(reached) == 0:
        return float("inf")
    at = reached[0]
    if at == 0:
        return float(tokens[0])
    share = (threshold - rewards[at - 1]) / (rewards[at] - rewards[at - 1])
    return float(tokens[at - 1] + share * (tokens[at] - tokens[at - 1]))


def times_fewer(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Ratio of the interquartile means of tokens, theirs over ours; NaN if neither reached the threshold."""
    ours, theirs = interquartile_mean(ours), interquartile_mean(theirs)
    if np.isinf(ours) and np.isinf(theirs):
        return float("nan")
    return float(theirs / ours)
