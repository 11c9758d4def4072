import math

import pytest
import torch

from trl_credit import gae, length_adaptive_lambda, monte_carlo_returns, relative_position_lambda, whiten


def textbook(rewards, values, mask, gamma, lam, bootstrap):
    """GAE by δ and a backward loop over each row's trained tokens, in float64 numbers of Python."""
    batch, length = mask.shape
    advantages, returns = torch.zeros(batch, length).double(), torch.zeros(batch, length).double()
    for i in range(batch):
        tokens = [t for t in range(length) if mask[i, t]]
        per_step = [0.0] * len(tokens)
        if tokens and rewards.dim() == 1:
            per_step[-1] = rewards[i].item()
        elif tokens:
            for t in range(length):
                before = [k for k, s in enumerate(tokens) if s <= t]
                per_step[before[-1] if before else 0] += rewards[i, t].item()
        advantage = 0.0
        for k in reversed(range(len(tokens))):
            value = values[i, tokens[k]].item()
            after = values[i, tokens[k + 1]].item() if k + 1 < len(tokens) else bootstrap[i].item()
            delta = per_step[k] + gamma * after - value
            decay = lam[i].item() if lam.dim() == 1 else lam[i, tokens[k]].item()
            advantage = delta + gamma * decay * advantage
            advantages[i, tokens[k]] = advantage
            returns[i, tokens[k]] = advantage + value
    return advantages, returns


def batch(seed=0, rows=6, length=23, gaps=True):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length, 1, 0, 7, length - 1, 12])[:rows]
    mask = torch.arange(length) < lengths.unsqueeze(1)
    if gaps:  # tool output: in the middle, at the end, at the start
        mask[0, 5:9] = False
        mask[3, 6] = False
        mask[4, 0:2] = False
    values = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    rewards = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    lam = torch.rand(rows, generator=generator, dtype=torch.float64)
    bootstrap = torch.randn(rows, generator=generator, dtype=torch.float64)
    return rewards, values, mask, lam, bootstrap


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("ends", ["terminal", "bootstrap"])
def test_gae_is_the_textbook_loop(gamma, per_token, ends):
    rewards, values, mask, lam, bootstrap = batch()
    rewards = rewards if per_token else rewards[:, 0]
    bootstrap = bootstrap * (ends == "bootstrap")
    expected = textbook(rewards, values, mask, gamma, lam, bootstrap)
    for lam_shape in (lam, lam.unsqueeze(1)):
        actual = gae(rewards, values, mask, gamma, lam_shape, bootstrap)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if ends == "terminal":
        torch.testing.assert_close(gae(rewards, values, mask, gamma, lam), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_every_token_may_have_a_lambda_of_its_own(gamma):
    rewards, values, mask, _, bootstrap = batch(2)
    lam = torch.rand(mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = textbook(rewards, values, mask, gamma, lam, bootstrap)
    spoiled = torch.where(mask, lam, torch.nan)  # what is no time step has none
    torch.testing.assert_close(gae(rewards, values, mask, gamma, spoiled, bootstrap), expected, rtol=1e-12, atol=1e-12)


def test_a_lambda_of_1_within_a_segment_and_0_at_its_end_is_gae_over_segments():
    values, ends = torch.tensor([[0.5, 9.0, 0.25, 9.0]]), torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    advantages, _ = gae(torch.tensor([1.0]), values, torch.ones(1, 4), lam=1 - ends)
    # Columns 0 and 2 begin the segments: A = V(next segment) - V = -0.25 and R - V = 0.75.
    assert advantages[0, [0, 2]].tolist() == [-0.25, 0.75]


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_a_scalar_lambda_serves_every_row(lam):
    rewards, values, mask, _, bootstrap = batch(1)
    expected = textbook(rewards, values, mask, 0.95, torch.full((6,), lam, dtype=torch.float64), bootstrap)
    torch.testing.assert_close(gae(rewards, values, mask, 0.95, lam, bootstrap), expected, rtol=1e-12, atol=1e-12)


def test_float32_over_8192_tokens_is_within_1e_5_of_the_float64_loop():
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.rand(2, 8192, generator=generator), torch.ones(2, 8192)
    lam = length_adaptive_lambda(mask.sum(1))  # 0.9976
    expected = textbook(torch.tensor([1.0, 0.0]), values, mask, 1.0, lam, torch.zeros(2))
    advantages, returns = gae(torch.tensor([1.0, 0.0]), values, mask, 1.0, lam)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(returns.double(), expected[1], rtol=0, atol=1e-5)


def test_monte_carlo_return_of_a_terminal_reward_is_the_reward_itself_at_every_token():
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    returns = monte_carlo_returns(torch.tensor([0.1, -0.3]), mask)
    # Equal, not close: no value was added and taken away again.
    assert torch.equal(returns, torch.tensor([[0.1, 0.1, 0.0, 0.1, 0.0], [-0.3] * 5]))


def test_monte_carlo_return_discounts_and_takes_the_bootstrap():
    returns = monte_carlo_returns(torch.tensor([[1.0, 0.0, 2.0]]), torch.ones(1, 3), 0.5, torch.tensor([4.0]))
    # 2 + .5·4 = 4;  0 + .5·4 = 2;  1 + .5·2 = 2
    assert returns.tolist() == [[2.0, 2.0, 4.0]]


def test_a_reward_on_a_tool_token_or_after_the_end_is_not_lost():
    mask = torch.tensor([[0, 1, 0, 1, 0, 0]])
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    # The first two go to the token at 1 with the one at 2; those from 3 on to the token at 3.
    advantages, _ = gae(rewards, torch.zeros(1, 6), mask, lam=0.0)
    assert advantages.tolist() == [[0, 7, 0, 56, 0, 0]]


def test_nothing_outside_the_mask_is_read():
    rewards, values, mask, lam, bootstrap = batch()
    spoiled = torch.where(mask, values, torch.nan)
    for a, b in zip(
        gae(rewards, values, mask, 1.0, lam, bootstrap), gae(rewards, spoiled, mask, 1.0, lam, bootstrap), strict=True
    ):
        assert torch.equal(a, b)


def test_shapes_that_do_not_match_are_refused_by_name():
    with pytest.raises(ValueError, match=r"`rewards` must be \(2,\) or \(2, 3\), got \(3,\)"):
        gae(torch.zeros(3), torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`values` \(2, 4\) and `mask` \(2, 3\)"):
        gae(torch.zeros(2), torch.zeros(2, 4), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"each of 2 rows .* got \(3,\)"):
        gae(torch.zeros(2), torch.zeros(2, 3), torch.ones(2, 3), lam=torch.ones(3))


def test_length_adaptive_lambda_where_it_is_not_clamped():
    # α·l = 1.5, 2, 20, 409.6
    lam = length_adaptive_lambda(torch.tensor([30, 40, 400, 8192]), 0.05)
    torch.testing.assert_close(lam, torch.tensor([1 / 3, 0.5, 0.95, 1 - 1 / 409.6]).double(), rtol=1e-6, atol=0)
    assert length_adaptive_lambda(torch.tensor([0, 1, 20])).tolist() == [0, 0, 0]
    # e^{-1/α} at the first token, whatever the length.
    for length in (1000, 8192):
        first = length_adaptive_lambda(torch.tensor([length]), 1.5) ** (length - 1)
        assert first.item() == pytest.approx(math.exp(-1 / 1.5), rel=1e-2)


def test_relative_position_lambda_keeps_a_fraction_for_the_first_token():
    lengths = torch.tensor([2, 10, 8192])
    lam = relative_position_lambda(lengths, 0.25)
    torch.testing.assert_close(lam ** (lengths - 1), torch.full((3,), 0.25).double())
    assert relative_position_lambda(torch.tensor([0, 1]), 0.25).isfinite().all()


def test_whitening_takes_the_mean_away_and_does_not_add_it_back():
    values, mask = torch.tensor([[3.0, 5.0, 99.0], [7.0, 9.0, 1.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    white = whiten(values, mask)
    kept = white[mask.bool()]
    assert kept.mean().abs() < 1e-6
    assert kept.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert white[0, 2] == 0


def test_whitening_over_two_processes_is_whitening_over_their_batch():
    values, mask = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.ones(4, 5)
    mask[1, 2:] = 0
    parts = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    # The sums that the other process would contribute, in the order in which `whiten` asks for them.
    together = whiten(values, mask)
    sums = torch.stack([torch.stack([m.sum(), (v * m).sum()]) for v, m in parts]).sum(0)
    mean = sums[1] / sums[0]
    squares = sum((((v - mean) * m) ** 2).sum() for v, m in parts)
    answers = iter([sums, squares])
    torch.testing.assert_close(whiten(*parts[0], totals=lambda _: next(answers)), together[:2])
