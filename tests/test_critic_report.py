"""Every figure of the critic report against the closed form of a known process; planted faults in the right rows."""

import json
import math

import numpy as np
import pytest
from known_process import CANDIDATES, CLIFF, COMPLETIONS, MOVES, PROMPTS, samples, whole_process

from trl_credit.critic_report import ConstantCritic, Probes, Rollout, evaluate_critic
from trl_credit.critic_report.report import ALPHAS, GROUP_SIZE, LAMBDAS


STATES = MOVES + 1


class Planted:
    """A critic that knows the truth, with a fault."""

    def __init__(self, name, fault):
        self.name, self.fault = name, fault

    def values(self, rollouts):
        return [self.fault(r.truth.copy(), r) for r in rollouts]


def shifted(v, rollout):
    return v + 0.15


def smoothed_cliff(v, rollout):
    """What the step over the cliff has done shows one step later. It is still the mean of what follows: calibrated."""
    if len(v) > CLIFF + 1:
        v[CLIFF + 1] = v[CLIFF]
    return v


def washed_out(v, rollout):
    """The first steps leave no mark until the fourth: calibrated as well."""
    if len(v) > 4:
        v[1:4] = v[0]
    return v


def shuffled(v, rollout):
    """Next steps out of one state are mixed up."""
    if len(v) == 2:  # a next step, see `samples`
        v[:] = CANDIDATES[
            np.random.default_rng([rollout.group, rollout.completion_ids[0], int(1e6 * v[0])]).integers(4)
        ]
    return v


def constant(v, rollout):
    return np.full_like(v, 0.5)


FAULTS = {"perfect": lambda v, rollout: v, "shifted": shifted, "smoothed cliff": smoothed_cliff}
FAULTS |= {"washed out": washed_out, "shuffled": shuffled, "constant": constant}


@pytest.fixture(scope="module")
def reports():
    probes = samples(prompts=150)
    return {name: evaluate_critic(Planted(name, fault), probes, draws=200) for name, fault in FAULTS.items()}


# --- The oracle: sums over all paths, without noise


def expect(x, weights):
    return (x * weights).sum() / weights.sum()


def variance(x, weights):
    return expect((x - expect(x, weights)) ** 2, weights)


def corr(x, y, weights):
    cov = expect((x - expect(x, weights)) * (y - expect(y, weights)), weights)
    power = variance(x, weights) * variance(y, weights)
    return cov / math.sqrt(power) if power > 1e-18 else math.nan


def advantages(values, reward, lam):
    """Sums of TD errors, one path a row."""
    following = np.concatenate([values[:, 1:], np.zeros((len(values), 1))], axis=1)
    delta = following - values
    delta[:, -1] += reward
    out, last = np.zeros_like(delta), 0
    for t in reversed(range(delta.shape[1])):
        last = delta[:, t] + lam * last
        out[:, t] = last
    return out


def closed_form(fault) -> dict:
    """Name of a figure, and of a point of a curve: its true value."""
    paths = whole_process()
    truth = np.array([path.truth[:-1] for path in paths])  # (N, K)
    reward = np.array([path.reward for path in paths])
    weights = np.array([path.probability for path in paths])
    prompt = np.array([path.group for path in paths])
    value = np.array([fault(path.truth[:-1].copy(), path) for path in paths])
    flat = np.repeat(weights, STATES)
    known = {
        "error/mse": expect((value - truth).ravel() ** 2, flat),
        "error/bias": expect((value - truth).ravel(), flat),
        "error/explained_variance": 1 - variance((truth - value).ravel(), flat) / variance(truth.ravel(), flat),
        "targets/variance_left": _variance_left(truth.ravel(), value.ravel(), flat),
        "calibration/brier": expect((truth * (1 - truth) + (value - truth) ** 2).ravel(), flat),
    }

    def within(x):  # of single states about the mean of a prompt's completions
        total = 0.0
        for p in range(len(PROMPTS)):
            rows = prompt == p
            total += variance(x[rows].ravel(), np.repeat(weights[rows], STATES)) / len(PROMPTS)
            total -= variance(x[rows].mean(1), weights[rows]) / COMPLETIONS / len(PROMPTS)
        return total

    known["error/explained_variance_within_prompt"] = 1 - within(truth - value) / within(truth)
    known["error/difference_seen_within_prompt"] = (within(truth + value) - within(truth - value)) / 4 / within(truth)
    known["error/difference_seen"] = (
        variance((truth + value).ravel(), flat) - variance((truth - value).ravel(), flat)
    ) / (4 * variance(truth.ravel(), flat))
    for k in range(STATES):
        x = k / 10
        known["error/mse_by_position", x] = expect((value - truth)[:, k] ** 2, weights)
        known["error/explained_variance_by_position", x] = 1 - variance((truth - value)[:, k], weights) / variance(
            truth[:, k], weights
        )
        known["targets/variance_left_by_position", x] = _variance_left(truth[:, k], value[:, k], weights)
    edges = np.unique(np.quantile(np.arange(STATES), np.linspace(0, 1, 7)[:-1]).astype(int))
    for part in np.split(np.arange(STATES), edges[1:]):
        known["error/mse_by_prefix_length", round(part.mean(), 1)] = expect(
            ((value - truth)[:, part] ** 2).ravel(), np.repeat(weights, len(part))
        )

    edges = np.linspace(0, 1, 11)
    bins = np.clip(np.searchsorted(edges, value.ravel(), side="right") - 1, 0, 9)
    known["calibration/ece"] = 0.0
    for b in np.unique(bins):
        w = flat * (bins == b)
        outcome = expect(truth.ravel(), w)
        known["calibration/ece"] += w.sum() / flat.sum() * abs(expect(value.ravel(), w) - outcome)
        known["calibration/outcome_by_value", b] = outcome

    change, told = np.diff(truth), np.diff(value)
    for name, steps in (("early", slice(0, 3)), ("late", slice(3, None))):
        known[f"steps/change_seen_{name}"] = expect(told[:, steps] * change[:, steps], weights[:, None]) / expect(
            change[:, steps] ** 2, weights[:, None]
        )
    for k in range(MOVES):
        x = k / 10
        known["steps/change_seen_by_position", x] = expect(told[:, k] * change[:, k], weights) / expect(
            change[:, k] ** 2, weights
        )
        known["steps/td_error_by_position", x] = expect(abs(told[:, k]), weights)
        known["steps/true_change_by_position", x] = math.sqrt(expect(change[:, k] ** 2, weights))

    largest = change.argmin(1)
    rows = np.arange(len(paths))
    wrong = weights * (reward == 0) * (-change[rows, largest] >= 0.2)
    known["cliffs/true_drop"] = expect(-change[rows, largest], wrong)
    known["cliffs/drop_seen"] = expect(-told[rows, largest], wrong) / known["cliffs/true_drop"]
    if np.ptp(told) > 0:
        known["cliffs/offset"] = expect(abs(told.argmin(1) - largest), wrong)

    truths = np.column_stack([truth, reward])
    true_advantage = np.diff(truths)
    last = [("advantage/correlation_by_lambda", lam, lam) for lam in LAMBDAS]
    last += [("advantage/correlation_by_alpha", alpha, min(max(1 - 1 / (alpha * STATES), 0), 1)) for alpha in ALPHAS]
    for name, x, lam in last:
        credit = advantages(value, reward, lam)
        known[name, x] = corr(credit.ravel(), true_advantage.ravel(), flat)
        if name.endswith("lambda") and lam in (0, 1):
            for k in range(STATES):
                mean = expect(credit[:, k], weights)
                power = expect((credit[:, k] - mean) ** 2, weights)
                share = expect((credit[:, k] - mean) * true_advantage[:, k], weights) / power if power > 1e-12 else 0.0
                known[f"steps/signal_share_by_position_lambda_{lam:g}", k / 10] = share

    # The mean of 7 other completions has the prompt's value for its mean, and is independent of the rest.
    start = np.array(PROMPTS)[prompt]
    spread = start * (1 - start) / (GROUP_SIZE - 1)

    def rho(columns):
        v, t = value[:, columns], truth[:, columns]
        above = expect((v - start[:, None]) * (t - start[:, None]) + spread[:, None], weights[:, None])
        return above / expect((v - start[:, None]) ** 2 + spread[:, None], weights[:, None])

    known["baseline/rho"], known["baseline/rho_at_prompt"] = rho(slice(None)), rho(slice(0, 1))
    for k in range(STATES):
        known["baseline/rho_by_position", k / 10] = rho(slice(k, k + 1))
    return known


def _variance_left(truth, value, weights):
    mean = expect(truth, weights)
    return (expect(truth * (1 - truth), weights) + variance(truth - value, weights)) / (mean * (1 - mean))


def figures(report):
    for name, figure in report.rows.items():
        yield name, figure
    for name, curve in report.curves.items():
        for x, figure in curve:
            yield (name, int(10 * x) if name == "calibration/outcome_by_value" else x), figure


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.slow
def test_every_figure_has_its_closed_form_in_its_interval(reports, name):
    """As far as intervals of 95 % do: of about 120 figures nine tenths, and the others not far from it."""
    known, covered, seen = closed_form(FAULTS[name]), [], set()
    for where, figure in figures(reports[name]):
        if isinstance(where, tuple):
            where = next((w for w in known if w[0] == where[0] and w[1] == pytest.approx(where[1])), where)
        if where not in known:
            continue
        seen.add(where)
        truth, reach = known[where], 0.6 * (figure.high - figure.low) + 1e-3
        assert figure.low - reach <= truth <= figure.high + reach, (where, truth, figure)
        covered.append(figure.low - 1e-9 <= truth <= figure.high + 1e-9)
    assert len(covered) > 110 and seen >= {w for w in known if not isinstance(w, tuple)}
    print(f"{name}: {np.mean(covered):.1%} of {len(covered)} figures")
    assert np.mean(covered) > 0.9


def test_ranking_and_aliasing(reports):
    gains = CANDIDATES.max() - CANDIDATES.mean()
    expected = {"perfect": (1, 1, gains), "shifted": (1, 1, gains), "shuffled": (0.25, 0, 0), "constant": (0.25, 0, 0)}
    for name, known in expected.items():
        for row, truth in zip(("hit", "correlation", "gain"), known, strict=True):
            figure = reports[name].rows[f"ranking/{row}"]
            assert figure.low - 0.01 <= truth <= figure.high + 0.01, (name, row, figure)
        assert reports[name].rows["ranking/chance"].estimate == pytest.approx(0.25, abs=1e-3)
    for name, truth in (("perfect", 1), ("shifted", 1), ("constant", 0)):
        curve = reports[name].curves["aliasing/difference_seen_by_suffix"]
        assert [length for length, _ in curve] == [1, 2, 4, 8]
        assert all(figure.low - 0.01 <= truth <= figure.high + 0.01 for _, figure in curve), (name, curve)


def test_a_critic_that_reads_only_the_last_two_tokens_is_told_by_their_number():
    probes = samples(prompts=60, seed=1)
    sums: dict = {}
    for rollout in probes.rollouts:
        ids = rollout.prompt_ids + rollout.completion_ids
        for t, value in enumerate(rollout.truth):
            sums.setdefault(tuple(ids[max(t - 1, 0) : t + 1]), []).append(value)

    class ShortSighted:
        name = "short-sighted"

        def values(self, rollouts):
            rows = [(r, r.prompt_ids + r.completion_ids) for r in rollouts]
            return [
                np.array([np.mean(sums.get(tuple(ids[max(t - 1, 0) : t + 1]), 0.5)) for t in range(len(r.truth))])
                for r, ids in rows
            ]

    curve = dict(evaluate_critic(ShortSighted(), probes, draws=50).curves["aliasing/difference_seen_by_suffix"])
    assert curve[1].low > 0.005, "of states with one token in common it sees something"
    for length in (2, 4, 8):
        assert curve[length].estimate == pytest.approx(0, abs=1e-9)


@pytest.mark.filterwarnings("error")
def test_what_cannot_be_told_is_nan_and_no_error():
    nothing_to_rank = samples(prompts=3)
    nothing_to_rank.candidates = []
    for rollout in nothing_to_rank.rollouts:  # and nothing that varies
        rollout.returns, rollout.reward, rollout.other_rewards = np.ones_like(rollout.returns), 1.0, [1.0] * 3
    rows = evaluate_critic(ConstantCritic(), nothing_to_rank, draws=20).rows
    assert rows["error/mse"].estimate == rows["calibration/ece"].estimate == 0
    for name in ("error/explained_variance", "steps/change_seen_late", "baseline/rho", "cliffs/offset", "ranking/hit"):
        assert math.isnan(rows[name].estimate), name

    single = Rollout("a", [1], [2], [0], np.array([[0.0, 1.0]]), 0, 1.0)
    report = evaluate_critic(ConstantCritic(0.2), Probes([single], [], {}, 0), draws=20)
    assert report.rows["error/bias"].estimate == pytest.approx(-0.3) and math.isnan(report.rows["error/bias"].low)
    assert "baseline/rho" not in report.rows
    json.dumps(report.to_dict(), allow_nan=False)


def test_values_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="one finite number is needed for each state"):
        evaluate_critic(Planted("broken", lambda v, rollout: v + np.inf), samples(prompts=2))
    with pytest.raises(ValueError, match="for a completion of 10 tokens"):
        evaluate_critic(Planted("short", lambda v, rollout: v[:-1]), samples(prompts=2))


NAMED = {
    "shifted": ("calibration/ece", 0.15),
    "smoothed cliff": ("cliffs/drop_seen", 0.0),
    "washed out": ("steps/change_seen_early", 0.0),
    "shuffled": ("ranking/correlation", 0.0),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_fault_shows_in_the_row_that_names_it_and_in_no_other(reports, name):
    perfect = {
        "calibration/ece": 0.0,
        "cliffs/drop_seen": 1.0,
        "steps/change_seen_early": 1.0,
        "ranking/correlation": 1,
    }
    for row, right in perfect.items():
        figure = reports[name].rows[row]
        if row == NAMED[name][0]:
            assert not figure.low <= right <= figure.high and figure.low <= NAMED[name][1] <= figure.high, (row, figure)
        else:
            assert figure.low - 0.01 <= right <= figure.high + 0.01, (row, figure)
