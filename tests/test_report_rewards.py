"""Rewards of the report's probes: weighted as in training, left out where a completion is not scored."""

import math
import random
import time

import numpy as np
import pytest
from chain_policy import LENGTH, LETTERS
from tiny import tiny_tokenizer

from trl_credit.critic_report import ConstantCritic, ProbeSettings, draw_probes, evaluate_critic
from trl_credit.critic_report.probes import _assemble, _Drawer
from trl_credit.critic_report.scoring import Scorer


PROMPTS = [{"prompt": letter} for letter in LETTERS]
SETTINGS = ProbeSettings(completions=2, continuations=4, cuts="5", candidates=2, max_completion_length=LENGTH)


class Coin:
    """A policy that writes letters at random, at once."""

    identity, eos_ids, sequences_per_call = "coin", set(), 4096

    def __init__(self):
        self.tokenizer = tiny_tokenizer()
        self.letters = self.tokenizer("abcdef")["input_ids"]

    def sample(self, starts, room, decoding, seed):
        rng = random.Random(seed)
        return [rng.choices(self.letters, k=n) for n in room]


def share_of_a(completions, **kwargs):
    return [text.count("a") / LENGTH for text in completions]


def share_of_b(completions, **kwargs):
    return [text.count("b") / LENGTH for text in completions]


def of_prompt_a_alone(prompts, completions, **kwargs):
    shares = share_of_a(completions)
    return [share if prompt == "a" else None for prompt, share in zip(prompts, shares, strict=True)]


def sometimes(completions, **kwargs):
    return [None if "f" in text[-3:] else float("a" in text) for text in completions]


def test_rewards_are_weighted_as_in_training(tmp_path):
    weights = [2.0, -0.5]
    probes = draw_probes(tmp_path, Coin(), PROMPTS, [share_of_a, share_of_b], SETTINGS, reward_weights=weights)
    for rollout in probes.rollouts:
        text = tiny_tokenizer().decode(rollout.completion_ids)
        assert rollout.reward == pytest.approx((2 * text.count("a") - 0.5 * text.count("b")) / LENGTH)
    with pytest.raises(ValueError, match=r"holds probes with reward_weights=\[2.0, -0.5\], and reward_weights=None"):
        draw_probes(tmp_path, Coin(), PROMPTS, [share_of_a, share_of_b], SETTINGS)


def test_probes_of_earlier_versions_are_those_without_weights(tmp_path):
    first = draw_probes(tmp_path, Coin(), PROMPTS, share_of_a, SETTINGS)
    manifest = (tmp_path / "probes.json").read_text()
    (tmp_path / "probes.json").write_text(manifest.replace(' "reward_weights": null,\n', ""))
    assert "reward_weights" not in (tmp_path / "probes.json").read_text()
    again = draw_probes(tmp_path, Coin(), PROMPTS, share_of_a, SETTINGS, reward_weights=[1.0])
    assert [r.reward for r in again.rollouts] == [r.reward for r in first.rollouts]


def test_what_is_not_scored_is_left_out(tmp_path):
    probes = draw_probes(tmp_path / "prompts", Coin(), PROMPTS, of_prompt_a_alone, SETTINGS)
    assert {rollout.prompt for rollout in probes.rollouts} == {"a"} and len(probes.rollouts) == 2
    probes = draw_probes(tmp_path / "some", Coin(), PROMPTS, sometimes, SETTINGS)
    returns = np.concatenate([rollout.returns for rollout in probes.rollouts])
    assert np.isnan(returns).any() and (np.isfinite(returns).sum(1) > 1).all()
    report = evaluate_critic(ConstantCritic(0.25), probes, draws=20)
    assert report.rows["error/bias"].estimate == pytest.approx(0.25 - np.mean(np.nanmean(returns, axis=1)))
    assert all(math.isfinite(figure.estimate) for name, figure in report.rows.items() if name.startswith("error/"))


@pytest.mark.parametrize(
    ("funcs", "weights", "message"),
    [
        ([share_of_a], [1.0, 2.0], "has 2 weights for 1 functions"),
        ([share_of_a], [math.inf], "must be finite, got"),
        ([lambda completions, **_: [math.inf] * len(completions)], None, r"<lambda> returned inf for a completion of"),
        ([lambda completions, **_: [None] * len(completions)], None, "scored no completion with two continuations"),
        ([lambda **_: [1.0]], None, "returned 1 rewards for 14 completions"),
    ],
)
def test_bad_rewards_are_refused_by_name(tmp_path, funcs, weights, message):
    with pytest.raises(ValueError, match=message):
        draw_probes(tmp_path, Coin(), PROMPTS, funcs, SETTINGS, reward_weights=weights)


def test_a_reward_of_one_function_is_kept_where_another_gives_none(tmp_path):
    score = Scorer([of_prompt_a_alone, share_of_b], [1.0, 1.0])
    ids = tiny_tokenizer()(["aabb", "aabb"])["input_ids"]
    assert score([{"prompt": "a"}, {"prompt": "b"}], ids, tiny_tokenizer()) == pytest.approx([0.4, 0.2])


@pytest.mark.slow
def test_8_000_rollouts_are_put_together_in_a_moment(tmp_path):
    rows = [{"prompt": LETTERS[i % 6]} for i in range(4000)]
    settings = ProbeSettings(completions=2, continuations=2, cuts="5", candidates=2, max_completion_length=LENGTH)
    drawer = _Drawer(tmp_path, Coin(), rows, Scorer(share_of_a), settings, lambda done, total: None)
    drawer.draw()
    start = time.process_time()
    probes = _assemble(drawer)
    assert time.process_time() - start < 2
    assert len(probes.rollouts) == 8000 and len(probes.candidates) > 3000
    for rollout, key in list(zip(probes.rollouts, drawer.cuts, strict=True))[::500]:  # by looking through all of them
        steps = [(state, step) for state, step in drawer.steps.items() if state[:2] == key]
        ids = [rollout.completion_ids[: state[2]] + step for state, step in steps]
        returns = [drawer.continuations[state]["returns"] for state, _ in steps]
        same = [
            group
            for group in probes.candidates
            if group[0].group == rollout.group and [candidate.completion_ids for candidate in group] == ids
        ]
        assert (not ids and not same) or [candidate.returns.tolist() for candidate in same[0]] == [[r] for r in returns]
