"""The verdict of the critic report: what comes before the tables, on critics whose knowledge is known."""

import json
import math

import numpy as np
import pytest
from known_process import PROMPTS, samples

from trl_credit.critic_report import ConstantCritic, evaluate_critic
from trl_credit.critic_report.report_page import write_json, write_page


class Planted:
    """A critic that makes something of the true values."""

    def __init__(self, name, read):
        self.name, self.read = name, read

    def values(self, rollouts):
        return [self.read(rollout.truth.astype(float).copy(), rollout) for rollout in rollouts]


def of_the_prompt(v, rollout):
    return np.full_like(v, PROMPTS[rollout.prompt_ids[0] - 10])


def noise(v, rollout):
    return np.random.default_rng([rollout.group, *rollout.completion_ids]).uniform(0, 1, v.shape)


def unread(v, rollout):
    return v * np.nan


def half_read(v, rollout):
    """Every second state, from the second on."""
    v[::2] = np.nan
    return v


@pytest.fixture(scope="module")
def probes():
    return samples(prompts=64)


def judged(probes, read):
    return evaluate_critic(Planted("planted", read), probes, draws=20)


def test_a_critic_that_knows_the_truth_is_safe_at_every_lambda_and_best_at_0(probes):
    verdict = judged(probes, lambda v, rollout: v).verdict
    assert verdict.knows == "steps" and verdict.safe_lambdas == [0.0, 0.5, 0.9, 0.95, 0.99, 1.0]
    assert verdict.best_lambda == 0.0 and verdict.harmful_lambdas == []
    assert verdict.sentences[0].startswith("This critic knows more than the prompt: ")
    assert "it sees 1.00 [" in verdict.sentences[0]
    assert verdict.sentences[1].startswith("Safe at every λ: ") and "train with λ = 0," in verdict.sentences[-1]


def test_a_critic_of_prompts_knows_nothing_beyond_them(probes):
    verdict = judged(probes, of_the_prompt).verdict
    assert verdict.knows == "prompts"
    assert verdict.sentences[0].startswith("This critic knows nothing beyond the prompt: ")
    assert "between states of one prompt it sees 0.00 [" in verdict.sentences[0]
    assert verdict.harmful_lambdas == [0.0, 0.5] and verdict.safe_lambdas == [1.0]
    assert verdict.sentences[1].startswith("Safe at λ = 1 alone: ")
    assert verdict.sentences[-1].startswith("To do: use it at λ = 1 alone")


@pytest.mark.parametrize("read", [noise, lambda v, rollout: np.full_like(v, 0.5)])
def test_a_critic_that_knows_nothing_is_told(probes, read):
    verdict = judged(probes, read).verdict
    assert verdict.knows == "nothing" and 0.0 in verdict.harmful_lambdas
    assert verdict.sentences[0].startswith("This critic knows nothing, not even which prompts are hard")
    assert "train without it, or train the critic longer" in verdict.sentences[-1]


def test_a_critic_with_noise_of_its_own_is_safe_from_the_lambda_that_averages_it_out(probes):
    verdict = judged(probes, lambda v, rollout: 0.5 + 0.15 * (v - 0.5) + 0.3 * (noise(v, rollout) - 0.5)).verdict
    assert verdict.knows == "steps" and verdict.harmful_lambdas == [0.0]
    assert verdict.safe_lambdas == [0.9, 0.95, 0.99, 1.0] and verdict.best_lambda == 0.9
    assert verdict.sentences[1].startswith("Safe from λ = 0.9 on: ")
    assert verdict.sentences[1].endswith("Harmful at λ = 0.") and "train with λ = 0.9," in verdict.sentences[-1]


def test_values_worse_than_the_prompts_mean_can_still_know_steps(probes):
    report = judged(probes, lambda v, rollout: v + 1.2 * (noise(v, rollout) - 0.5))
    assert report.rows["error/explained_variance_within_prompt"].high < 0 and report.verdict.knows == "steps"
    assert "so noisy or so far off that the prompt's mean would be nearer" in report.verdict.sentences[0]


def test_what_rounding_leaves_is_no_knowledge(probes):
    assert judged(probes, lambda v, rollout: 0.5 + 1e-12 * v).verdict.knows == "nothing"


def test_none_of_its_answers_was_read(probes, tmp_path):
    reports = [judged(probes, unread), evaluate_critic(ConstantCritic(), probes, draws=20)]
    report = reports[0]
    assert (
        report.verdict.knows == "nothing read"
        and "None of this critic's answers could be read" in (report.verdict.sentences[0])
    )
    assert report.rows["answers/unread"].estimate == 1 and set(report.rows) == {"answers/unread"} and not report.curves
    write_page(tmp_path / "report.html", reports)
    write_json(tmp_path / "report.json", reports)
    page, (told, _) = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert page.index("None of this critic") < page.index("<dl>") < page.index("<table>"), "before all tables"
    assert list(told)[:2] == ["critic", "verdict"] and told["verdict"]["knows"] == "nothing read"


def test_unread_states_are_counted_and_left_out_of_the_figures(probes):
    report = judged(probes, half_read)
    assert report.rows["answers/unread"].estimate == 0.5
    assert "50 % of its answers could not be read" in report.verdict.sentences[2]
    assert "first make its answers readable" in report.verdict.sentences[-1]
    states = sum(len(rollout.cuts) for rollout in probes.rollouts)
    assert report.rows["error/mse"].n == states / 2
    assert report.rows["error/explained_variance_within_prompt"].low < 1 < 1.05
    # The truth at the states that were read: as good as a critic that was asked of those alone.
    assert report.rows["error/mse"].estimate == pytest.approx(0, abs=2e-4)
    assert report.rows["steps/change_seen_late"].estimate == pytest.approx(1, abs=0.1)
    assert [name for name, figure in report.rows.items() if math.isnan(figure.estimate)] == ["baseline/rho_at_prompt"]
