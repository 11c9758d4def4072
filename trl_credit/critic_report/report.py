"""The report on a critic: every figure of it, from its values and the probes."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..credit.gae import gae, length_adaptive_lambda
from . import statistics as st
from .critics import Critic
from .probes import Probes, Rollout
from .statistics import Figure
from .verdict import Verdict, judge


LAMBDAS = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)
ALPHAS = (0.05, 0.5, 1.5, 5.0)
SUFFIXES = (1, 2, 4, 8)
# ρ is for groups of this size, TRL's default, whatever the size of those that were drawn.
GROUP_SIZE = 8
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
        verdict ([`~trl_credit.critic_report.verdict.Verdict`]):
            The overall judgement.
    """

    critic: str
    rows: dict[str, Figure]
    curves: dict[str, list[tuple[float, Figure]]]
    probes: dict[str, Any] = field(default_factory=dict)
    verdict: Verdict | None = None

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

        verdict = {"verdict": None if self.verdict is None else asdict(self.verdict)}
        tables = {name: clean(getattr(self, name)) for name in ("rows", "curves", "probes")}
        return {"critic": self.critic, **verdict, **tables}


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
            Resamplings of the prompts for the interval of the calibration error; the other intervals need none.

    Returns:
        [`CriticReport`]: The verdict and the figures. States for which the critic has no value (NaN), such as those
        where a generative critic's answer could not be read, are counted and left out of all other figures.
    """
    everything = [*probes.rollouts, *(candidate for group in probes.candidates for candidate in group)]
    values = critic.values(everything)
    for rollout, row in zip(everything, values, strict=True):
        if row.shape != (len(rollout.completion_ids) + 1,) or np.isinf(row).any():
            raise ValueError(
                f"{critic.name} gave {row.shape} values, {row[:8]} ..., for a completion of "
                f"{len(rollout.completion_ids)} tokens: one finite number is needed for each state and one for the "
                "end, or NaN where there is none."
            )
    on_path, rest = values[: len(probes.rollouts)], values[len(probes.rollouts) :]
    report = CriticReport(critic.name, {"answers/unread": _unread(probes.rollouts, on_path)}, {}, _describe(probes))
    rollouts, on_path = _read_states(probes.rollouts, on_path)
    if not rollouts:
        report.verdict = judge(report.rows, report.curves, st.UNKNOWN)
        return report
    states, steps = States.of(rollouts, on_path), Steps.of(rollouts, on_path)
    for part in (_error, _targets, _early_steps, _aliasing, _baseline):
        part(report, states, steps)
    _calibration(report, states, draws)
    _cliffs(report, rollouts, on_path)
    _ranking(report, probes.candidates, rest)
    reference = _advantages(report, rollouts, on_path, steps)
    report.verdict = judge(report.rows, report.curves, reference)
    return report


def _unread(rollouts: Sequence[Rollout], values: Sequence[np.ndarray]) -> Figure:
    """Share of the states without a value."""
    unread = [np.isnan(row[rollout.cuts]) for rollout, row in zip(rollouts, values, strict=True)]
    groups = np.concatenate([np.full(len(part), r.group) for r, part in zip(rollouts, unread, strict=True)])
    return st.jackknife(partial(st.mean, np.concatenate(unread).astype(float)), groups)


def _read_states(rollouts: Sequence[Rollout], values: Sequence[np.ndarray]) -> tuple[list[Rollout], list[np.ndarray]]:
    """Without the states that have no value, as if they had not been probed; each value is held up to the next."""
    kept: tuple[list, list] = [], []
    for rollout, row in zip(rollouts, values, strict=True):
        read = ~np.isnan(row[rollout.cuts])
        if read.any():
            known = np.flatnonzero(~np.isnan(row))
            latest = np.searchsorted(known, np.arange(len(row)), side="right") - 1
            cuts = [cut for cut, is_read in zip(rollout.cuts, read, strict=True) if is_read]
            kept[0].append(replace(rollout, cuts=cuts, returns=rollout.returns[read]))
            kept[1].append(row[known[latest.clip(min=0)]])
    return kept


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
    extra_noise: np.ndarray  # (S,) variance of the noise in them, less that of the mean of others in a group of 8
    ids: list[tuple[int, ...]]  # last tokens before it

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], values: Sequence[np.ndarray]) -> "States":
        """Those of rollouts."""
        returns = np.concatenate([rollout.returns for rollout in rollouts]).astype(float)
        where = [(rollout, row, cut) for rollout, row in zip(rollouts, values, strict=True) for cut in rollout.cuts]
        return cls(
            values=np.array([row[cut] for _, row, cut in where], dtype=float),
            truth=np.nanmean(returns, axis=1),
            noise=st.noise_of_mean(returns),
            scatter=np.nanvar(returns, axis=1),
            groups=np.array([rollout.group for rollout, *_ in where]),
            deciles=np.array([10 * cut // len(rollout.completion_ids) for rollout, _, cut in where]),
            lengths=np.array([cut for *_, cut in where]),
            rewards=np.array([rollout.reward for rollout, *_ in where]),
            means=np.array([np.mean(rollout.other_rewards or np.nan) for rollout, *_ in where]),
            extra_noise=np.array([_extra_noise(rollout) for rollout, *_ in where]),
            ids=[
                tuple((rollout.prompt_ids + rollout.completion_ids[:cut])[-max(SUFFIXES) :])
                for rollout, _, cut in where
            ],
        )


def _extra_noise(rollout: Rollout) -> float:
    others = rollout.other_rewards
    if not others:
        return np.nan
    return float(np.var([rollout.reward, *others], ddof=1)) * (1 / len(others) - 1 / (GROUP_SIZE - 1))


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
    shared: np.ndarray  # (N,) covariance with the noise of the next step, by the state between them; 0 for the last

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
                change = told[k + 1] - told[k], truth[k + 1] - truth[k], noise[k + 1] + noise[k], -noise[k + 1]
                rows.append((number, start, end, k + 1 < len(rollout.cuts), decile, rollout.group, *change))
        return cls(*map(np.array, zip(*rows, strict=True)))

    def mean_credit(self, credit: Sequence[np.ndarray]) -> np.ndarray:
        """What a token of each step is told on average, from the credit of the tokens of each rollout."""
        sums = np.concatenate([[0.0], np.cumsum(np.concatenate(credit))])
        first = np.cumsum([0, *map(len, credit)])[self.rollout]
        return (sums[first + self.end] - sums[first + self.start]) / (self.end - self.start)

    def correlation(self, credit: Sequence[np.ndarray], statistic=st.correlation, rows=slice(None)) -> Figure:
        """
        Of the credit of tokens with the true advantage, both as means over the tokens of a step.

        Args:
            credit (`Sequence[np.ndarray]`):
                Of the tokens of each rollout, shape `(T,)`.
            statistic (`Callable`, *optional*):
                [`~trl_credit.critic_report.statistics.correlation`], perhaps with groups.
            rows (`np.ndarray`, *optional*):
                Which steps, shape `(N,)`. Default: all.
        """
        return st.jackknife(self._correlation(credit, statistic, rows), self.groups[rows])

    def gain(self, credit: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> Figure:
        """
        The correlation of one credit less that of another, with the interval of the difference, over all steps but the
        last of each completion: that one has its reward from no critic. A credit that does not vary counts as 0.
        """
        one, other = self._correlation(credit, rows=self.inner), self._correlation(reference, rows=self.inner)
        known = math.nan if math.isnan(other(np.ones(self.inner.sum()))) else 0.0
        difference = lambda weights: known + np.nan_to_num(one(weights)) - np.nan_to_num(other(weights))  # noqa: E731
        return st.jackknife(difference, self.groups[self.inner])

    def signal_share(self, credit: Sequence[np.ndarray], rows: np.ndarray) -> Figure:
        """Of some steps, see [`~trl_credit.critic_report.statistics.signal_share`]."""
        x, truth = self.mean_credit(credit), self.true / (self.end - self.start)
        return st.jackknife(partial(st.signal_share, x[rows], truth[rows]), self.groups[rows])

    def _correlation(self, credit, statistic=st.correlation, rows=slice(None)) -> Callable[[np.ndarray], float]:
        size = (self.end - self.start).astype(float)
        shared = self.shared[rows] / (size * np.append(size[1:], 1.0))[rows]
        together = np.append(self.rollout[rows][1:] == self.rollout[rows][:-1], False)  # next to each other still
        x, truth, noise = self.mean_credit(credit), self.true / size, self.noise / size**2
        return partial(statistic, x[rows], truth[rows], noise[rows], shared * together)


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


def _over_deciles(deciles: np.ndarray, statistic: Callable[[np.ndarray], Figure]) -> list[tuple[float, Figure]]:
    return [(decile / 10, statistic(deciles == decile)) for decile in range(10) if (deciles == decile).any()]


def _error(report: CriticReport, states: States, steps: Steps) -> None:
    def measure(statistic, rows):
        x = states.values[rows], states.truth[rows], states.noise[rows]
        return st.jackknife(partial(statistic, *x), states.groups[rows])

    error, explained = partial(measure, st.squared_error), partial(measure, st.explained_variance)
    prompts = _numbered(states.groups)

    everywhere = np.full(len(states.values), True)
    gap = states.values - states.truth
    values_and_truth = states.values, states.truth, states.noise
    explained_within = partial(st.explained_variance, *values_and_truth, groups=prompts)
    seen_within = partial(st.slope, *values_and_truth, groups=prompts)
    report.rows |= {
        "error/mse": error(everywhere),
        "error/bias": st.jackknife(partial(st.mean, gap), states.groups),
        "error/explained_variance": explained(everywhere),
        "error/explained_variance_within_prompt": st.jackknife(explained_within, states.groups),
        "error/difference_seen": measure(st.slope, everywhere),
        "error/difference_seen_within_prompt": st.jackknife(seen_within, states.groups),
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


def _targets(report: CriticReport, states: States, steps: Steps) -> None:
    def left(rows):
        x = states.values[rows], states.truth[rows], states.scatter[rows]
        return st.jackknife(partial(st.variance_left, *x), states.groups[rows])

    report.rows["targets/variance_left"] = left(np.full(len(states.values), True))
    report.curves["targets/variance_left_by_position"] = _over_deciles(states.deciles, left)


def _early_steps(report: CriticReport, states: States, steps: Steps) -> None:
    def seen(rows):
        statistic = partial(st.slope, steps.predicted[rows], steps.true[rows], steps.noise[rows], centred=False)
        return st.jackknife(statistic, steps.groups[rows])

    def size(rows):
        return st.jackknife(partial(st.mean, np.abs(steps.predicted[rows])), steps.groups[rows])

    def true_size(rows):
        square = steps.true[rows] ** 2 - steps.noise[rows]
        return st.jackknife(lambda weights: np.sqrt(max(st.mean(square, weights), 0)), steps.groups[rows])

    def inner(statistic):
        return [(x, y) for x, y in _over_deciles(steps.deciles, lambda rows: statistic(rows & steps.inner)) if y.n]

    for name, early in (("early", steps.deciles < 3), ("late", steps.deciles >= 3)):
        report.rows[f"steps/change_seen_{name}"] = seen(early & steps.inner)
    report.curves["steps/change_seen_by_position"] = inner(seen)
    report.curves["steps/td_error_by_position"] = inner(size)
    report.curves["steps/true_change_by_position"] = inner(true_size)


def _calibration(report: CriticReport, states: States, draws: int) -> None:
    edges = np.linspace(min(states.truth.min(), 0.0), max(states.truth.max(), 1.0), 11)
    report.rows["calibration/brier"] = st.jackknife(
        partial(st.brier, states.values, states.truth, states.scatter), states.groups
    )
    report.rows["calibration/ece"] = st.calibration_error(states.values, states.truth, states.groups, edges, draws)
    index = np.clip(np.searchsorted(edges, states.values, side="right") - 1, 0, len(edges) - 2)
    report.curves["calibration/outcome_by_value"] = [
        (float(states.values[rows].mean()), st.jackknife(partial(st.mean, states.truth[rows]), states.groups[rows]))
        for rows in (index == i for i in range(len(edges) - 1))
        if rows.any()
    ]


def _cliffs(report: CriticReport, rollouts, values) -> None:
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
        "cliffs/true_drop": st.jackknife(partial(st.mean, true), groups),
        "cliffs/drop_seen": st.jackknife(partial(st.ratio_of_sums, predicted, true), groups),
        "cliffs/offset": st.jackknife(partial(st.mean, offset[known]), groups[known]),
    }


def _aliasing(report: CriticReport, states: States, steps: Steps) -> None:
    begun = states.lengths > 0
    curve = []
    for length in SUFFIXES:
        suffixes = [ids[-length:] if len(ids) >= length else None for ids in states.ids]
        counts = Counter(suffixes)
        rows = begun & np.array([suffix is not None and counts[suffix] > 1 for suffix in suffixes])
        if rows.any():
            alike = _numbered([suffix for suffix, row in zip(suffixes, rows, strict=True) if row])
            statistic = partial(st.slope, states.values[rows], states.truth[rows], states.noise[rows], groups=alike)
            curve.append((float(length), st.jackknife(statistic, states.groups[rows])))
    report.curves["aliasing/difference_seen_by_suffix"] = curve


def _ranking(report: CriticReport, candidates, values) -> None:
    ends = iter(values)
    ranked, groups = [], []
    for group in candidates:
        told = np.array([next(ends)[candidate.cuts[0]] for candidate in group])
        read = ~np.isnan(told)
        if read.sum() > 1:
            ranked.append(st.rank(told[read], np.concatenate([candidate.returns for candidate in group])[read]))
            groups.append(group[0].group)
    for name in st.Ranking._fields:
        x = np.array([getattr(one, name) for one in ranked], dtype=float)
        report.rows[f"ranking/{name}"] = st.jackknife(partial(st.mean, x), np.array(groups, dtype=int))


def _advantages(report: CriticReport, rollouts, values, steps: Steps) -> Figure:
    reference = _without_critic(rollouts)
    for name, grid in (("lambda", LAMBDAS), ("alpha", ALPHAS)):
        credits = [(x, gae_credit(rollouts, values, *((x,) if name == "lambda" else (None, x)))) for x in grid]
        report.curves[f"advantage/correlation_by_{name}"] = [(x, steps.correlation(c)) for x, c in credits]
        if name == "lambda":
            report.curves["advantage/gain_by_lambda"] = [(x, steps.gain(c, reference)) for x, c in credits]
            for x, credit in (credits[0], credits[-1]):
                report.curves[f"steps/signal_share_by_position_lambda_{x:g}"] = _over_deciles(
                    steps.deciles, partial(steps.signal_share, credit)
                )
    return steps.correlation(reference, rows=steps.inner)


def _without_critic(rollouts: Sequence[Rollout]) -> list[np.ndarray]:
    """Advantages that need none: the reward less the mean of the prompt's others, or of all where there are none."""
    mean = np.mean([rollout.reward for rollout in rollouts])
    alone = any(not rollout.other_rewards for rollout in rollouts)
    gaps = [rollout.reward - (mean if alone else np.mean(rollout.other_rewards)) for rollout in rollouts]
    return [np.full(len(rollout.completion_ids), gap) for rollout, gap in zip(rollouts, gaps, strict=True)]


def _baseline(report: CriticReport, states: States, steps: Steps) -> None:
    if np.isnan(states.means).any():  # one completion of each prompt
        return

    def weight(rows):
        x = states.rewards[rows], states.means[rows], states.values[rows], states.extra_noise[rows]
        return st.jackknife(partial(st.baseline_weight, *x), states.groups[rows])

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
