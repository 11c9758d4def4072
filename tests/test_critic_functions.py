import math

import pytest
import torch

from trl_credit.credit.fit import at_fraction, explained_variance, fit_sums
from trl_credit.credit.value_loss import clip_share, squared_error


def test_squared_error_is_half_the_square():
    assert squared_error(torch.tensor([1.0, -1.0]), torch.tensor([3.0, -1.0])).tolist() == [2.0, 0.0]


def test_value_clip_compares_with_the_value_of_the_rollout():
    values = torch.tensor([1.0, 1.0, 0.1], requires_grad=True)
    returns, old = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.0, 0.0, 0.0])
    loss = squared_error(values, returns, old, clip_range=0.2)
    # Clipped to .2: ½(.2-1)² = .32 against 0;  ½(.2-2)² = 1.62 against .5;  inside the range: ½(.1-1)²
    torch.testing.assert_close(loss, torch.tensor([0.32, 1.62, 0.405]))
    loss.sum().backward()
    # Where the clipped branch is the larger the value gets no gradient.
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 0.0, -0.9]))
    assert clip_share(values, old, 0.2).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="old_values"):
        squared_error(values, returns, clip_range=0.2)


def variance_explained(values, returns, mask):
    r, v = returns[mask.bool()].double(), values[mask.bool()].double()
    return 1 - ((r - v).var(correction=0) / r.var(correction=0)).item()


def test_explained_variance_of_sums_is_that_of_all_tokens_together():
    generator = torch.Generator().manual_seed(0)
    returns = torch.randn(6, 9, generator=generator) + 100
    values = returns + 0.5 * torch.randn(6, 9, generator=generator) + 3
    mask = torch.rand(6, 9, generator=generator) > 0.3
    expected = variance_explained(values, returns, mask)
    sums = torch.cat([fit_sums(values[i : i + 2], returns[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)])
    assert explained_variance(sums) == pytest.approx(expected, abs=1e-9)
    # Not the mean over the parts.
    parts = [explained_variance(sums[i : i + 2]) for i in (0, 2, 4)]
    assert abs(sum(parts) / 3 - expected) > 1e-3


def test_explained_variance_is_nan_when_returns_do_not_vary():
    mask = torch.ones(3, 4)
    for constant in (0.0, 1.0, 0.1):
        sums = fit_sums(torch.randn(3, 4), torch.full((3, 4), constant), mask)
        assert math.isnan(explained_variance(sums))
    assert math.isnan(explained_variance(fit_sums(torch.ones(2, 3), torch.randn(2, 3), torch.zeros(2, 3))))


def test_prompt_difficulty_alone_explains_nothing_within_the_prompt():
    # Two prompts: one solved 3 times out of 4, one 1 time. The critic knows the prompt and nothing else.
    returns = torch.tensor([[1.0], [1.0], [1.0], [0.0], [1.0], [0.0], [0.0], [0.0]])
    values = torch.tensor([[0.75]] * 4 + [[0.25]] * 4)
    sums, groups = fit_sums(values, returns, torch.ones(8, 1)), torch.arange(8) // 4
    assert explained_variance(sums) == pytest.approx(0.25)
    assert explained_variance(sums, groups) == pytest.approx(0.0)
    assert explained_variance(fit_sums(returns, returns, torch.ones(8, 1)), groups) == 1.0


def test_value_at_a_fraction_of_the_trained_tokens():
    values = torch.arange(12.0).view(2, 6)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 0]])
    assert at_fraction(values, mask, 0.0).tolist() == [1, 6]
    assert at_fraction(values, mask, 0.5).tolist() == [2, 8]
    assert at_fraction(values, mask, 1.0).tolist() == [4, 10]
