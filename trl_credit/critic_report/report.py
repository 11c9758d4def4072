"""The report on a critic: every figure of it, from its values and the probes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ..credit.gae import gae, length_adaptive_lambda
from . import statistics as st
from .critics import Critic
from .probes import Probes, Rollout
from .statistics import Figure


LAMBDAS = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)
ALPHAS = (0.05, 0.5, 1.5, 5.0)
SUFFIXES = (1, 2, 4, 8)
# Of a completion that is wrong: a largest drop below this is no cliff.
MIN_DROP = 0.2


@dataclass
class CriticReport:
    """
    What [`evaluate_critic`] finds.

    Args:
        critic (`str`):
            Its name.
        rows (`dict[str, Figure]`):
            Single figures by name, see the documentation of the report.
        curves (`dict[str, list[tuple[float, Figure]]]`):
            Figures over something: position, prefix length, value, λ, α.
        probes (`dict`):
            What they were of, and how many.
    """

    critic: str
    rows: dict[str, Figure]
    curves: dict[str, list[tuple[float, Figure]]]
    probes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """As JSON takes it: NaN becomes `None`."""

        def clean(x):
            if isinstance(x, Figure):
                return {name: clean(value) for name, value in x._asdict().items()}
            if isinstance(x, dict):
                return {name: clean(value) for name, value in x.items()}
            if isinstance(x, (list, tuple)):
                return [clean(value) for value in x]
            return None if isinstance(x, float) and not np.isfinite(x) else x

        return {name: clean(getattr(self, name)) for name in ("critic", "rows", "curves", "probes")}


def evaluate_critic(critic: Critic, probes: Probes, draws: int = 500) -> CriticReport:
    """
    Measure a critic against Monte-Carlo truth: error and explained variance by position, calibration, cliffs, aliasing,
    ranking, advantages over a grid of λ and α, the signal of single steps, the best baseline.

    Nothing is sampled here, see [`draw_probes`].

    Args:
        critic ([`Critic`]):
            One of those in `trl_credit.critic_report`, or any object with a `name` and `values`.
        probes ([`Probes`]):
            Rollouts and continuations.
        draws (`int`, *optional*, defaults to `500`):
            Resamplings of the prompts for the intervals, at 95 %.

    Returns:
        [`CriticReport`]: The figures.
    """
    everything = [*probes.rollouts, *(candidate for group in probes.candidates for candidate in group)]
    values = critic.values(everything)
    for rollout, row in zip(everything, values, strict=True):
        if row.shape != (len(rollout.completion_ids) + 1,) or not np.isfinite(row[rollout.cuts]).all():
            raise ValueError(
                f"{critic.name} gave {row.shape} values, {row[:8]} ..., for a completion of "
                f"{len(rollout.completion_ids)} tokens: one finite number is needed for each state and one for the end."
            )
    on_path, rest = values[: len(probes.rollouts)], values[len(probes.rollouts) :]
    states, steps = States.of(probes.rollouts, on_path), Steps.of(probes.rollouts, on_path)
    report = CriticReport(critic.name, {}, {}, _describe(probes))
    figure = partial(st.bootstrap, draws=draws)
    for part in (_error, _targets, _early_steps, _calibration, _aliasing, _baseline):
        part(report, states, steps, figure)
    _cliffs(report, probes.rollouts, on_path, figure)
    _ranking(report, probes.candidates, rest, figure)
    _advantages(report, probes.rollouts, on_path, steps, figure)
    return report


@dataclass
class States:
    """Probed states, one a row: value, returns, prompt, decile of the completion, its rollout's reward, ..."""

    values: np.ndarray  # (S,)
    truth: np.ndarray  # (S,) mean return
    noise: np.ndarray  # (S,) variance of the noise in it
    scatter: np.ndarray  # (S,) variance of the returns about it
    groups: np.ndarray  # (S,)
    deciles: np.ndarray  # (S,)
    lengths: np.ndarray  # (S,) tokens of the completion before it
    rewards: np.ndarray  # (S,)
    means: np.ndarray  # (S,) of the rewards of the prompt's other completions
    ids: list[tuple[int, ...]]  # last tokens before it

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], values: Sequence[np.ndarray]) -> "States":
        """Those of rollouts."""
        returns = np.concatenate([rollout.returns for rollout in rollouts]).astype(float)
        where = [(rollout, row, cut) for rollout, row in zip(rollouts, values, strict=True) for cut in rollout.cuts]
        return cls(
            values=np.array([row[cut] for _, row, cut in where], dtype=float),
            truth=returns.mean(1),
            noise=st.noise_of_mean(returns),
            scatter=returns.var(1),
            groups=np.array([rollout.group for rollout, *_ in where]),
            deciles=np.array([10 * cut // len(rollout.completion_ids) for rollout, _, cut in where]),
            lengths=np.array([cut for *_, cut in where]),
            rewards=np.array([rollout.reward for rollout, *_ in where]),
            means=np.array([np.mean(rollout.other_rewards or np.nan) for rollout, *_ in where]),
            ids=[
                tuple((rollout.prompt_ids + rollout.completion_ids[:cut])[-max(SUFFIXES) :])
                for rollout, _, cut in where
            ],
        )


@dataclass
class Steps:
    """From one probed state to the next of a completion, or to its end, one a row."""

    rollout: np.ndarray  # (N,) its number
    start: np.ndarray  # (N,) first token
    end: np.ndarray  # (N,) after its last
    inner: np.ndarray  # (N,) whether there is a state after it, not the end
    deciles: np.ndarray  # (N,)
    groups: np.ndarray  # (N,)
    predicted: np.ndarray  # (N,) change of the critic's value
    true: np.ndarray  # (N,) change of V*
    noise: np.ndarray  # (N,) variance of the noise in it

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], values: Sequence[np.ndarray]) -> "Steps":
        """Those of rollouts. At the end value and V* are the reward."""
        rows = []
        for number, (rollout, row) in enumerate(zip(rollouts, values, strict=True)):
            ends = [*rollout.cuts[1:], len(rollout.completion_ids)]
            truth = [*rollout.true_values, rollout.reward]
            noise = [*st.noise_of_mean(rollout.returns), 0.0]
            told = [*row[rollout.cuts], rollout.reward]
            for k, (start, end) in enumerate(zip(rollout.cuts, ends, strict=True)):
                decile = 10 * start // len(rollout.completion_ids)
                change = told[k + 1] - told[k], truth[k + 1] - truth[k], noise[k + 1] + noise[k]
                rows.append((number, start, end, k + 1 < len(rollout.cuts), decile, rollout.group, *change))
        return cls(*map(np.array, zip(*rows, strict=True)))

    def mean_credit(self, credit: Sequence[np.ndarray]) -> np.ndarray:
        """What a token of each step is told on average, from the credit of the tokens of each rollout."""
        sums = np.concatenate([[0.0], np.cumsum(np.concatenate(credit))])
        first = np.cumsum([0, *map(len, credit)])[self.rollout]
        return (sums[first + self.end] - sums[first + self.start]) / (self.end - self.start)

    def correlation(self, credit: Sequence[np.ndarray], figure=st.bootstrap, statistic=st.correlation) -> Figure:
        """
        Of the credit of tokens with the true advantage, both as means over the tokens of a step.

        Args:
            credit (`Sequence[np.ndarray]`):
                Of the tokens of each rollout, shape `(T,)`.
            figure (`Callable`, *optional*):
                [`~trl_credit.critic_report.statistics.bootstrap`], perhaps with other settings.
            statistic (`Callable`, *optional*):
                Another one than the correlation.
        """
        size = (self.end - self.start).astype(float)
        x, truth, noise = self.mean_credit(credit), self.true / size, self.noise / size**2
        return figure(partial(statistic, x, truth, noise), self.groups)


def gae_credit(rollouts: Sequence[Rollout], values: Sequence[np.ndarray], lam: float | None, alpha=None):
    """
    Advantages by [`~trl_credit.gae`], as a trainer would take them: the reward at the last token, γ = 1.

    Args:
        rollouts (`Sequence[Rollout]`):
            Completions with their rewards.
        values (`Sequence[np.ndarray]`):
            Those of [`Critic.values`].
        lam (`float`, *optional*):
            λ. `None` for the length-adaptive one.
        alpha (`float`, *optional*):
            Its α.

    Returns:
        `list[np.ndarray]`: One advantage per token, shape `(T,)` each.
    """
    lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    dense = torch.zeros(mask.shape, dtype=torch.float64)
    dense[mask] = torch.from_numpy(np.concatenate([row[:-1] for row in values]))
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    schedule = length_adaptive_lambda(lengths, alpha) if lam is None else lam
    advantages, _ = gae(rewards, dense, mask, lam=schedule)
    return [row[:length].numpy() for row, length in zip(advantages, lengths, strict=True)]


# --- The parts of the report

_Figure = partial  # of `bootstrap`


def _over_deciles(deciles: np.ndarray, statistic: Callable[[np.ndarray], Figure]) -> list[tuple[float, Figure]]:
    return [(decile / 10, statistic(deciles == decile)) for decile in range(10) if (deciles == decile).any()]


def _error(report: CriticReport, states: States, steps: Steps, figure: _Figure) -> None:
    def measure(statistic, rows):
        x = states.values[rows], states.truth[rows], states.noise[rows]
        return figure(partial(statistic, *x), states.groups[rows])

    error, explained = partial(measure, st.squared_error), partial(measure, st.explained_variance)

    everywhere = np.full(len(states.values), True)
    gap = states.values - states.truth
    within = partial(st.explained_variance, states.values, states.truth, states.noise, groups=_numbered(states.groups))
    report.rows |= {
        "error/mse": error(everywhere),
        "error/bias": figure(partial(st.mean, gap), states.groups),
        "error/explained_variance": explained(everywhere),
        "error/explained_variance_within_prompt": figure(within, states.groups),
    }
    report.curves["error/mse_by_position"] = _over_deciles(states.deciles, error)
    report.curves["error/explained_variance_by_position"] = _over_deciles(states.deciles, explained)
    edges = np.unique(np.quantile(states.lengths, np.linspace(0, 1, 7)[:-1]).astype(int))
    index = np.searchsorted(edges, states.lengths, side="right") - 1
    report.curves["error/mse_by_prefix_length"] = [
        (round(float(states.lengths[index == i].mean()), 1), error(index == i))
        for i in range(len(edges))
        if (index == i).any()
    ]


def _targets(report: CriticReport, states: States, steps: Steps, figure: _Figure) -> None:
    def left(rows):
        x = states.values[rows], states.truth[rows], states.scatter[rows]
        return figure(partial(st.variance_left, *x), states.groups[rows])

    report.rows["targets/variance_left"] = left(np.full(len(states.values), True))
    report.curves["targets/variance_left_by_position"] = _over_deciles(states.deciles, left)


def _early_steps(report: CriticReport, states: States, steps: Steps, figure: _Figure) -> None:
    def seen(rows):
        statistic = partial(st.slope, steps.predicted[rows], steps.true[rows], steps.noise[rows], centred=False)
        return figure(statistic, steps.groups[rows])

    def size(rows):
        return figure(partial(st.mean, np.abs(steps.predicted[rows])), steps.groups[rows])

    def true_size(rows):
        square = steps.true[rows] ** 2 - steps.noise[rows]
        return figure(lambda weights: np.sqrt(max(st.mean(square, weights), 0)), steps.groups[rows])

    def inner(statistic):
        return [(x, y) for x, y in _over_deciles(steps.deciles, lambda rows: statistic(rows & steps.inner)) if y.n]

    for name, early in (("early", steps.deciles < 3), ("late", steps.deciles >= 3)):
        report.rows[f"steps/change_seen_{name}"] = seen(early & steps.inner)
    report.curves["steps/change_seen_by_position"] = inner(seen)
    report.curves["steps/td_error_by_position"] = inner(size)
    report.curves["steps/true_change_by_position"] = inner(true_size)


def _calibration(report: CriticReport, states: States, steps: Steps, figure: _Figure) -> None:
    edges = np.linspace(min(states.truth.min(), 0.0), max(states.truth.max(), 1.0), 11)
    report.rows["calibration/brier"] = figure(
        partial(st.brier, states.values, states.truth, states.scatter), states.groups
    )
    report.rows["calibration/ece"] = st.calibration_error(
        states.values, states.truth, states.groups, edges, **figure.keywords
    )
    index = np.clip(np.searchsorted(edges, states.values, side="right") - 1, 0, len(edges) - 2)
    report.curves["calibration/outcome_by_value"] = [
        (float(states.values[rows].mean()), figure(partial(st.mean, states.truth[rows]), states.groups[rows]))
        for rows in (index == i for i in range(len(edges) - 1))
        if rows.any()
    ]


def _cliffs(report: CriticReport, rollouts, values, figure: _Figure) -> None:
    wrong = [
        (rollout, st.find_cliff(row[rollout.cuts], rollout.returns))
        for rollout, row in zip(rollouts, values, strict=True)
        if rollout.reward <= 0
    ]
    found = [(rollout.group, cliff) for rollout, cliff in wrong if cliff is not None and cliff.search_drop >= MIN_DROP]
    groups = np.array([group for group, _ in found], dtype=int)
    true, predicted, offset = (
        np.array([getattr(cliff, name) for _, cliff in found], dtype=float)
        for name in ("true_drop", "predicted_drop", "offset")
    )
    known = ~np.isnan(offset)
    report.rows |= {
        "cliffs/true_drop": figure(partial(st.mean, true), groups),
        "cliffs/drop_seen": figure(partial(st.ratio_of_sums, predicted, true), groups),
        "cliffs/offset": figure(partial(st.mean, offset[known]), groups[known]),
    }


def _aliasing(report: CriticReport, states: States, steps: Steps, figure: _Figure) -> None:
    begun = states.lengths > 0
    curve = []
    for length in SUFFIXES:
        suffixes = [ids[-length:] if len(ids) >= length else None for ids in states.ids]
        counts = Counter(suffixes)
        rows = begun & np.array([suffix is not None and counts[suffix] > 1 for suffix in suffixes])
        if rows.any():
            alike = _numbered([suffix for suffix, row in zip(suffixes, rows, strict=True) if row])
            statistic = partial(st.slope, states.values[rows], states.truth[rows], states.noise[rows], groups=alike)
            curve.append((float(length), figure(statistic, states.groups[rows])))
    report.curves["aliasing/difference_seen_by_suffix"] = curve


def _ranking(report: CriticReport, candidates, values, figure: _Figure) -> None:
    ends = iter(values)
    ranked = []
    for group in candidates:
        told = np.array([next(ends)[candidate.cuts[0]] for candidate in group])
        ranked.append(st.rank(told, np.concatenate([candidate.returns for candidate in group])))
    groups = np.array([group[0].group for group in candidates], dtype=int)
    for name in st.Ranking._fields:
        x = np.array([getattr(one, name) for one in ranked], dtype=float)
        report.rows[f"ranking/{name}"] = figure(partial(st.mean, x), groups)


def _advantages(report: CriticReport, rollouts, values, steps: Steps, figure: _Figure) -> None:
    for name, grid in (("lambda", LAMBDAS), ("alpha", ALPHAS)):
        credits = [(x, gae_credit(rollouts, values, *((x,) if name == "lambda" else (None, x)))) for x in grid]
        report.curves[f"advantage/correlation_by_{name}"] = [(x, steps.correlation(c, figure)) for x, c in credits]
        if name == "lambda":
            for x, credit in (credits[0], credits[-1]):
                report.curves[f"steps/signal_share_by_position_lambda_{x:g}"] = _over_deciles(
                    steps.deciles, partial(_signal_share, steps, credit, figure)
                )


def _signal_share(steps: Steps, credit, figure: _Figure, rows: np.ndarray) -> Figure:
    part = Steps(**{name: x[rows] for name, x in vars(steps).items()})
    return part.correlation(credit, figure, st.signal_share)


def _baseline(report: CriticReport, states: States, steps: Steps, figure: _Figure) -> None:
    if np.isnan(states.means).any():  # one completion of each prompt
        return

    def weight(rows):
        x = states.rewards[rows], states.means[rows], states.values[rows]
        return figure(partial(st.baseline_weight, *x), states.groups[rows])

    report.rows["baseline/rho_at_prompt"] = weight(states.lengths == 0)
    report.rows["baseline/rho"] = weight(np.full(len(states.values), True))
    report.curves["baseline/rho_by_position"] = _over_deciles(states.deciles, weight)


def _describe(probes: Probes) -> dict:
    return {
        **probes.manifest,
        "completions": len(probes.rollouts),
        "states": sum(len(rollout.cuts) for rollout in probes.rollouts),
        "ranked_states": len(probes.candidates),
        "mean_reward": float(np.mean([rollout.reward for rollout in probes.rollouts])),
        "sampled_tokens": probes.sampled_tokens,
    }


def _numbered(keys) -> np.ndarray:
    """A number for each, 0, 1, ..., the same for equal ones."""
    numbers: dict = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])
