import io

import numpy as np
import pytest
import torch

from trl_credit.credit.boundaries import (
    held,
    position_features,
    segment_starts,
    segments_of_starts,
    turn_starts,
    uncertain_starts,
)
from trl_credit.credit.segment_gae import segment_advantages, segment_of_token
from trl_credit.credit.trust import mixed_advantages, trust_sums, trust_weight
from trl_credit.critics.probe.learner import ProbeLearner
from trl_credit.critics.probe.network import ProbeNetwork
from trl_credit.critics.probe.replay import ReplayBuffer


# --- Trust


def test_trust_is_the_slope_of_returns_on_values():
    random = np.random.default_rng(0)
    values = random.uniform(size=200)
    returns = 0.4 * values + 0.3 * random.normal(size=200) + 5
    slope = np.polyfit(values, returns, 1)[0]
    assert 0 < slope < 1
    assert trust_weight(trust_sums(torch.tensor(values), torch.tensor(returns))) == pytest.approx(slope, rel=1e-9)


def test_sums_of_parts_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    values, returns = torch.rand(60, generator=generator), torch.rand(60, generator=generator)
    parts = torch.stack([trust_sums(v, r) for v, r in zip(values.split(17), returns.split(17), strict=True)])
    assert torch.allclose(parts.sum(0), trust_sums(values, returns))
    assert trust_weight(parts) == trust_weight(parts.sum(0))


@pytest.mark.parametrize(
    "values, returns, weight",
    [
        ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0], 1.0),  # a slope of 10: too timid, not to be doubled
        ([0.1, 0.2, 0.3], [3.0, 2.0, 1.0], 0.0),  # wrong way round
        ([0.1 + 0.2, 0.3, 0.3], [0.0, 1.0, 0.5], 0.0),  # no values, only rounding
        ([0.0, 0.5, 1.0], [0.25, 0.5, 0.75], 0.5),
        ([], [], 0.0),
    ],
)
def test_trust_is_between_nothing_and_all(values, returns, weight):
    sums = trust_sums(torch.tensor(values, dtype=torch.float64), torch.tensor(returns, dtype=torch.float64))
    assert trust_weight(sums) == pytest.approx(weight)


def test_conditional_means_are_trusted_in_full_and_too_sure_ones_in_part():
    generator = torch.Generator().manual_seed(0)
    chance = 0.3 + 0.4 * torch.rand(200_000, generator=generator)
    returns = (torch.rand(200_000, generator=generator) < chance).float()
    assert trust_weight(trust_sums(chance, returns)) == pytest.approx(1.0, abs=0.02)
    too_sure = 0.5 + 2 * (chance - 0.5)
    assert trust_weight(trust_sums(too_sure, returns)) == pytest.approx(0.5, abs=0.01)
    guessed = torch.rand(200_000, generator=generator)
    assert trust_weight(trust_sums(guessed, returns)) < 0.01


def test_mixture_goes_from_the_fallback_to_the_critic():
    advantages = torch.tensor([[0.5, -1.0, 0.0], [0.25, 0.0, 0.0]])
    fallback = torch.tensor([0.5, -0.5])
    assert mixed_advantages(advantages, fallback, 0.0).tolist() == [[0.5] * 3, [-0.5] * 3]
    assert torch.equal(mixed_advantages(advantages, fallback, 1.0), advantages)
    oracle = 0.7 * fallback.double().unsqueeze(1) + 0.3 * advantages.double()
    assert torch.allclose(mixed_advantages(advantages, fallback, 0.3).double(), oracle)
    broken = torch.full_like(advantages, torch.nan)
    assert mixed_advantages(broken, fallback, 0.0).isfinite().all()
    with pytest.raises(ValueError, match="in \\[0, 1\\], got 1.5"):
        mixed_advantages(advantages, fallback, 1.5)


# --- Boundaries


def test_starts_and_segments_are_two_ways_to_say_the_same():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    segments = segment_of_token([[1, 3, 6], [2, 5, 6], [3], []], mask)
    starts = segment_starts(segments)
    assert starts.int().tolist() == [[1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0], [0] * 6]
    assert torch.equal(segments_of_starts(starts, mask), segments)


def test_a_segment_starts_at_its_first_trained_token():
    mask = torch.tensor([[0, 1, 1, 0, 1]])
    segments = segment_of_token([[2, 5]], mask)  # its first token is a tool's
    assert segment_starts(segments).int().tolist() == [[0, 1, 1, 0, 0]]


def test_a_row_must_start_with_a_segment():
    with pytest.raises(ValueError, match="first trained token"):
        segments_of_starts(torch.tensor([[False, True]]), torch.ones(1, 2))


def test_a_turn_starts_where_the_policy_writes_again():
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0]])
    assert turn_starts(mask).int().tolist() == [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]]


def test_what_is_known_at_a_start_holds_up_to_the_next():
    x = torch.tensor([[1.0, 2, 3, 4, 5]])
    starts = torch.tensor([[False, True, False, True, False]])
    assert torch.equal(held(x, starts).nan_to_num(-1), torch.tensor([[-1.0, 2, 2, 4, 4]]))


def test_open_choices_start_segments_and_so_does_the_first_token():
    entropy = torch.tensor([[0.1, 0.9, 0.5, 2.0, 3.0], [0.1, 0.1, 0.1, 0.1, 0.1]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    assert uncertain_starts(entropy, mask, 0.5).int().tolist() == [[1, 1, 0, 1, 0], [0, 1, 0, 0, 0]]


def test_position_features_count_trained_tokens():
    mask = torch.tensor([[1, 1, 0, 1]])
    starts = torch.tensor([[True, False, False, True]])
    features = position_features(starts, mask, 8)[0]
    assert features[:, 0].tolist() == [0, 1 / 8, 2 / 8, 2 / 8]
    assert torch.allclose(
        features[[0, 1, 3], 1].double(), torch.tensor([0, 2, 3.0]).double().clamp(1).log() / np.log(9)
    )
    assert features[[0, 1, 3], 2].tolist() == [0, 0, 1 / 8]


# --- The buffer


def test_buffer_keeps_the_latest_rollouts_and_no_more_states_than_it_may():
    generator = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer(rollouts=3, states=30)
    for rollout in range(5):
        size = 50 if rollout == 4 else 4
        buffer.add(torch.full((size, 2), float(rollout)), torch.full((size,), rollout / 10), generator)
    assert len(buffer) == 4 + 4 + 10
    features, targets = buffer.draw(2000, generator)
    assert sorted(features.unique().tolist()) == [2, 3, 4]
    assert torch.allclose(features[:, 0].float() / 10, targets)
    # Each state is drawn as often as any other.
    assert (features[:, 0] == 4).float().mean().item() == pytest.approx(10 / 18, abs=0.04)


def test_buffer_keeps_no_rollout_alive_and_is_not_changed_from_outside():
    whole = torch.zeros(1000, 4)
    buffer = ReplayBuffer(2, 100)
    buffer.add(whole[:5], torch.zeros(5), torch.Generator())
    whole += 1
    features, _ = buffer.draw(8, torch.Generator())
    assert (features == 0).all()
    assert buffer.state_dict()["rollouts"][0][0].untyped_storage().nbytes() == 5 * 4 * 2


# --- The critic


def make_learner(feature_size, hidden_size=32, reward_range=(0.0, 1.0), seed=0, **settings) -> ProbeLearner:
    return ProbeLearner(ProbeNetwork(feature_size, hidden_size, reward_range, seed=seed), seed=seed, **settings)


def bernoulli(states: int, seed: int):
    """States with one feature that tells the chance of a reward and three that tell nothing."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(states, 4, generator=generator)
    chance = torch.sigmoid(1.5 * features[:, 0] - 0.5)
    return features, (torch.rand(states, generator=generator) < chance).float(), chance


def test_critic_starts_at_the_mean_reward():
    critic = make_learner(4, updates=0, reward_range=(-1, 3))
    features = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    assert critic.network.values(features).tolist() == [1.0] * 40
    returns = torch.tensor([3.0] * 10 + [-1.0] * 30)
    critic.learn(features, returns)
    assert torch.allclose(critic.network.values(features), torch.zeros(40), atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 32])
def test_critic_learns_chances_and_earns_trust(hidden):
    critic = make_learner(4, hidden_size=hidden)
    for rollout in range(20):
        features, returns, chance = bernoulli(400, rollout)
        values = critic.network.values(features)
        critic.measure(trust_sums(values, returns))
        if rollout < 1:
            assert critic.trust == 0
        critic.learn(features, returns)
    assert (values - chance).abs().mean() < 0.06
    assert torch.corrcoef(torch.stack([values, chance]))[0, 1] > 0.97
    assert critic.trust > 0.85


def test_the_values_are_a_running_mean_of_the_fits():
    critic = make_learner(4, updates=3)
    features, returns, _ = bernoulli(400, 0)
    start = critic.network.head[0].weight.detach().clone()
    critic.learn(features, returns)
    mean, latest = critic.network.head[0].weight.detach(), critic.fitted[0].weight.detach()
    moved = (latest - start).norm() / (mean - start).norm()
    assert 1 / 0.06 < moved < 1 / 0.03  # three updates of alike size, each of which counts 0.03


def test_what_it_said_before_it_knew_the_mean_reward_does_not_tell_against_it():
    critic = make_learner(4)
    low = torch.zeros(400)  # valued with the middle of the range
    critic.measure(trust_sums(torch.full((400,), 0.5), low))
    critic.learn(bernoulli(400, 0)[0], low)
    values = torch.linspace(0, 0.2, 400)
    critic.measure(trust_sums(values, values))
    assert critic.trust == pytest.approx(1)


@pytest.mark.slow
def test_critic_that_can_know_nothing_earns_none():
    trusts = []
    for seed in range(5):
        critic = make_learner(3, seed=seed)
        for rollout in range(12):
            features, returns, _ = bernoulli(400, 100 * seed + rollout)
            critic.measure(trust_sums(critic.network.values(features[:, 1:]), returns))
            critic.learn(features[:, 1:], returns)
        trusts.append(critic.trust)
    assert sum(trusts) / 5 < 0.15


def walks(seed: int, count: int = 64, steps: int = 8):
    """Coin flips, won with more heads than tails: exact values of the states between them, and rewards."""
    flips = torch.rand(count, steps, generator=torch.Generator().manual_seed(seed)) < 0.5
    heads = torch.cat([torch.zeros(count, 1), flips.cumsum(1)], dim=1).long()
    go = (torch.arange(steps + 1) > steps // 2).double()
    table = [go]
    for _ in range(steps):
        go = 0.5 * go + 0.5 * torch.cat([go[1:], go[-1:]])
        table.append(go)
    values = torch.stack([table[steps - k][heads[:, k]] for k in range(steps + 1)], dim=1)
    return heads, values[:, :steps].float(), values[:, -1].float()


def test_a_perfect_critic_gives_exact_credit_and_a_random_one_the_baseline():
    heads, exact, rewards = walks(0, 2000)
    segments = torch.arange(8).expand(len(heads), 8)
    returns = rewards.unsqueeze(1).expand_as(exact)
    baseline = rewards - rewards.mean()
    credit = segment_advantages(rewards, exact, segments, gae_lambda=0.0)

    weight = trust_weight(trust_sums(exact, returns))
    assert weight > 0.97
    mixed = mixed_advantages(credit, baseline, weight)
    assert (mixed - credit).abs().mean() < 0.03 * baseline.abs().mean()

    guessed = torch.rand(exact.shape, generator=torch.Generator().manual_seed(1))
    weight = trust_weight(trust_sums(guessed, returns))
    assert weight < 0.05
    noise = segment_advantages(rewards, guessed, segments, gae_lambda=0.0)
    mixed = mixed_advantages(noise, baseline, weight)
    assert (mixed - baseline.unsqueeze(1)).abs().mean() < 0.05 * baseline.abs().mean()


def test_learnt_credit_comes_near_the_exact_one():
    critic = make_learner(12, seed=1)
    for seed in range(30):
        heads, exact, rewards = walks(seed)
        # What is written at a boundary, one-hot, and its place: the trainer's features.
        place = torch.arange(8).float().expand(len(heads), 8)
        features = torch.cat(
            [torch.nn.functional.one_hot(heads[:, :8], 9), torch.stack([place, place**2, place.log1p()], -1)], dim=-1
        ).flatten(0, 1)
        returns = rewards.repeat_interleave(8)
        values = critic.network.values(features)
        critic.measure(trust_sums(values, returns))
        critic.learn(features, returns)
    segments = torch.arange(8).expand(len(heads), 8)
    learnt = segment_advantages(rewards, values.view(-1, 8), segments, gae_lambda=0.5)
    right = segment_advantages(rewards, exact, segments, gae_lambda=0.0)
    none = (rewards - rewards.mean()).unsqueeze(1).expand_as(right)
    with_critic, without = (torch.corrcoef(torch.stack([a.flatten(), right.flatten()]))[0, 1] for a in (learnt, none))
    assert critic.trust > 0.8
    assert with_critic > 0.75
    assert with_critic > without + 0.2


def test_values_stay_within_the_range_of_the_rewards():
    critic = make_learner(4, reward_range=(-2.0, 1.0), learning_rate=0.5)
    features, returns, _ = bernoulli(200, 0)
    for _ in range(3):
        critic.learn(features, 3 * returns - 2)
    values = critic.network.values(100 * features)
    assert values.min() >= -2 and values.max() <= 1
    assert values.max() - values.min() > 2.5


def test_rewards_outside_of_the_range_are_refused():
    critic = make_learner(4)
    with pytest.raises(ValueError, match=r"from -1 to 1, outside `reward_range=\[0, 1\]`"):
        critic.learn(torch.zeros(2, 4), torch.tensor([-1.0, 1.0]))
    with pytest.raises(ValueError, match="the lower one first"):
        make_learner(4, reward_range=(1.0, 0.0))


def test_features_of_very_different_size_are_learnt_alike():
    losses = []
    for scale in (torch.ones(4), torch.tensor([1e-3, 1e4, 1.0, 50.0])):
        critic = make_learner(4)
        for rollout in range(5):
            features, returns, _ = bernoulli(200, rollout)
            loss = critic.learn(features * scale + 3 * scale, returns)
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def run(critic: ProbeLearner, first: int, last: int) -> list[torch.Tensor]:
    seen = []
    for rollout in range(first, last):
        features, returns, _ = bernoulli(100, rollout)
        values = critic.network.values(features)
        critic.measure(trust_sums(values, returns))
        critic.learn(features, returns)
        seen += [values, torch.tensor(critic.trust)]
    return seen


def test_same_seed_same_critic_and_nobody_elses_random_numbers():
    before = torch.random.get_rng_state()
    runs = [run(make_learner(4, seed=seed), 0, 4) for seed in (3, 3, 4)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_resumed_critic_goes_on_to_the_bit():
    # More states than the buffer takes, so that what it drops must be resumed too.
    settings = {"buffer_states": 16 * 60, "seed": 5}
    whole = make_learner(4, **settings)
    run(whole, 0, 7)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = make_learner(4, **{**settings, "seed": 6})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(run(whole, 7, 12), run(resumed, 7, 12), strict=True))


def test_a_rollout_without_rewards_changes_nothing():
    critic = make_learner(4)
    assert np.isnan(critic.learn(torch.zeros(0, 4), torch.zeros(0)))
    assert critic.trust == 0
    run(critic, 0, 2)
    assert np.isfinite(critic.learn(torch.zeros(0, 4), torch.zeros(0)))


def test_half_precision_features_are_learnt_from():
    critic = make_learner(4)
    features, returns, _ = bernoulli(100, 0)
    loss = critic.learn(features.bfloat16(), returns)
    assert np.isfinite(loss)
    assert critic.network.values(features.bfloat16()).dtype == torch.float32
