"""Figures of the report on simulated data whose truth is known: no bias, and intervals that hold what they say."""

from functools import partial

import numpy as np
import pytest

from trl_credit.critic_report import Rollout
from trl_credit.critic_report import statistics as st
from trl_credit.critic_report.report import GROUP_SIZE, CriticReport, States, Steps, _baseline


def true_values(rng, prompts: int, completions: int = 4, states: int = 10) -> np.ndarray:
    """They go up or down with every token, from what the prompt is worth; shape `(prompts, completions, states)`."""
    values = [rng.beta(0.5, 0.5, (prompts, 1)).repeat(completions, 1)]
    for _ in range(states - 1):
        change = 0.35 * np.minimum(values[-1], 1 - values[-1])
        values.append(values[-1] + change * rng.choice([-1, 1], change.shape))
    return np.stack(values, -1)


def walks(rng, prompts: int, completions: int = 4, states: int = 10, continuations: int = 16) -> list[Rollout]:
    """Completions with such values."""
    made = []
    for group, values in enumerate(true_values(rng, prompts, completions, states)):
        rewards = (rng.random(completions) < values[:, -1]).astype(float)
        for number, row in enumerate(values):
            returns = (rng.random((states, continuations)) < row[:, None]).astype(float)
            others = np.delete(rewards, number).tolist()
            one = Rollout("", [1], [1] * states, list(range(states)), returns, group, rewards[number], others)
            one.truth = np.append(row, rewards[number])
            made.append(one)
    return made


def covered(truth: float, figures) -> float:
    figures = list(figures)
    return np.mean([figure.low - 1e-9 <= truth <= figure.high + 1e-9 for figure in figures])


# --- Signal in the advantage


@pytest.mark.parametrize("lam", [0, 1])
@pytest.mark.slow
def test_no_signal_is_found_where_there_is_none(lam):
    """At the report's default size; the credit is noise, at λ = 0 of a token alone, at λ = 1 of all of them."""
    figures = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rollouts = walks(rng, prompts=64)
        steps = Steps.of(rollouts, [rollout.truth for rollout in rollouts])
        noise = [rng.normal(size=10) + lam * rng.normal() for _ in rollouts]
        figures += [steps.signal_share(noise, steps.deciles == decile) for decile in range(10)]
    estimates = np.array([figure.estimate for figure in figures])
    assert abs(estimates.mean()) < 3 * estimates.std() / np.sqrt(len(estimates)) and abs(estimates).max() < 0.2
    assert 0.9 <= covered(0, figures) <= 0.99


def test_signal_is_the_truths_share_of_the_variance_where_credit_is_truth_and_noise():
    rng = np.random.default_rng(1)
    rollouts = walks(rng, prompts=400, continuations=400)
    steps = Steps.of(rollouts, [rollout.truth for rollout in rollouts])
    true = [np.diff(rollout.truth) for rollout in rollouts]
    spread = np.std([row[4] for row in true])
    noisy = [row + rng.normal(size=10) * spread * np.sqrt(3) for row in true]
    for credit, expected in ((true, 1.0), (noisy, 0.25)):
        figure = steps.signal_share(credit, steps.deciles == 4)
        assert figure.low <= expected <= figure.high and figure.high - figure.low < 0.15


# --- Intervals


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("critic", ["noisy", "of the prompt"])
@pytest.mark.slow
def test_intervals_of_explained_variance_hold_the_truth_with_32_prompts(critic, within):
    def explained(prompts, seed, continuations):
        rng = np.random.default_rng(seed)
        truth = true_values(rng, prompts)
        values = (
            0.6 * truth + 0.2 + rng.normal(0, 0.15, truth.shape) if critic == "noisy" else truth[..., :1] + 0 * truth
        )
        groups = np.arange(prompts).repeat(truth[0].size)
        returns = rng.binomial(continuations, truth) / continuations if continuations else truth
        noise = returns * (1 - returns) / (continuations - 1) if continuations else 0 * truth
        rows = values.ravel(), returns.ravel(), noise.ravel()
        return partial(st.explained_variance, *rows, groups=groups if within else None), groups

    expected = explained(20_000, 10_000, continuations=0)[0](np.ones(800_000))
    figures = [st.jackknife(*explained(32, seed, continuations=16)) for seed in range(200)]
    assert covered(expected, figures) >= 0.92


def test_quantiles_of_students_t():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 31: 2.040, 63: 1.998, 1000: 1.962}
    for freedom, quantile in table.items():
        assert st.t_quantile(freedom) == pytest.approx(quantile, rel=0.01)


# --- Noise that neighbouring states share


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.slow
def test_the_correlation_of_the_true_advantages_is_1_however_few_the_continuations(within):
    """Left uncorrected for what neighbours share, it is 4 to 9 % low within completions."""
    rollouts = walks(np.random.default_rng(0), prompts=1000, continuations=8)
    steps = Steps.of(rollouts, [rollout.truth for rollout in rollouts])
    statistic = partial(st.correlation, groups=steps.rollout) if within else st.correlation
    figure = steps.correlation([np.diff(rollout.truth) for rollout in rollouts], statistic)
    assert figure.estimate == pytest.approx(1, abs=0.02) and figure.low <= 1 <= figure.high


# --- The weight of the critic as a baseline


@pytest.mark.slow
def test_the_weight_of_the_critic_does_not_depend_on_the_size_of_the_groups():
    """By the group that was drawn, it is 0.90 for 2 and 0.47 for 16."""
    rng = np.random.default_rng(0)
    truth = true_values(rng, 100_000, completions=1, states=3)
    gap = np.clip(truth + rng.normal(0, 0.15, truth.shape), 0, 1) - truth[..., :1]
    luck = np.mean(truth[..., 0] * (1 - truth[..., 0])) / (GROUP_SIZE - 1)
    expected = (np.mean(gap * (truth - truth[..., :1])) + luck) / (np.mean(gap**2) + luck)
    for size in (2, 8, 16):
        rng = np.random.default_rng(size)
        rollouts = walks(rng, prompts=9600 // size, completions=size, states=3, continuations=2)
        values = [np.clip(rollout.truth + rng.normal(0, 0.15, 4), 0, 1) for rollout in rollouts]
        report = CriticReport("", {}, {})
        _baseline(report, States.of(rollouts, values), None)
        figure = report.rows["baseline/rho"]
        assert figure.low <= expected <= figure.high and figure.high - figure.low < 0.15, (size, expected, figure)


def test_the_noise_of_a_mean_is_its_variance_without_bias_over_what_was_scored():
    returns = np.array([[0.0, 1.0, 1.0, 0.0], [1.0, np.nan, 0.0, np.nan]])
    assert st.noise_of_mean(returns) == pytest.approx([1 / 3 / 4, 1 / 2 / 2])
