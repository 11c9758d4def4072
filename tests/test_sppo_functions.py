"""The functions that SPPO adds, against loops in float64."""

import math

import pytest
import torch

from trl_credit import binary_cross_entropy, brier_score, calibration_sums, expected_calibration_error


def test_binary_cross_entropy_is_the_equation_and_its_gradient_v_less_r():
    logits = torch.tensor([-2.0, 0.0, 0.5, 3.0], requires_grad=True)
    targets = torch.tensor([0.0, 1.0, 0.25, 0.9])
    loss = binary_cross_entropy(logits, targets)
    for z, r, found in zip(logits.tolist(), targets.tolist(), loss.tolist(), strict=True):
        v = 1 / (1 + math.exp(-z))
        assert found == pytest.approx(-(r * math.log(v) + (1 - r) * math.log(1 - v)), rel=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().sigmoid() - targets)


def test_binary_cross_entropy_is_exact_where_the_value_rounds_to_0_or_1():
    assert binary_cross_entropy(torch.tensor([200.0, -200.0]), torch.tensor([0.0, 1.0])).tolist() == [200, 200]
    # bf16 has 8 bits: from 6 to 6.03 it does not see a step.
    logits = torch.tensor([6.03], dtype=torch.bfloat16)
    loss = binary_cross_entropy(logits, torch.tensor([1.0]))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log1p(math.exp(-logits.item())))


def calibration_by_hand(values, outcomes):
    bins = {}
    for v, r in zip(values, outcomes, strict=True):
        bins.setdefault(min(int(v * 10), 9), []).append((v, r))
    n = len(values)
    brier = sum((v - r) ** 2 for v, r in zip(values, outcomes, strict=True)) / n
    ece = sum(
        len(rows) / n * abs(sum(v for v, _ in rows) / len(rows) - sum(r for _, r in rows) / len(rows))
        for rows in bins.values()
    )
    return brier, ece, {decile: len(rows) for decile, rows in bins.items()}


def test_calibration_of_added_sums_is_that_of_all_predictions_together():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(300, generator=generator)
    values[:2] = torch.tensor([0.0, 1.0])  # the ends belong to the first and the last decile
    outcomes = (torch.rand(300, generator=generator) < values.square()).float()
    outcomes[100:200] = torch.rand(100, generator=generator)  # soft ones too
    mask = torch.rand(300, generator=generator) < 0.8
    parts = [slice(0, 7), slice(7, 150), slice(150, 300)]
    sums = sum(calibration_sums(values[part], outcomes[part], mask[part]) for part in parts)

    brier, ece, counts = calibration_by_hand(values[mask].tolist(), outcomes[mask].tolist())
    assert brier_score(sums) == pytest.approx(brier, rel=1e-9)
    assert expected_calibration_error(sums) == pytest.approx(ece, rel=1e-9)
    assert {decile: count for decile, count in enumerate(sums[:, 0].tolist()) if count} == counts
    # A mean over parts is another number.
    assert ece != pytest.approx(
        sum(expected_calibration_error(calibration_sums(values[p], outcomes[p], mask[p])) for p in parts) / 3, rel=0.05
    )


def test_a_coin_that_is_called_a_half_is_calibrated_and_has_a_brier_score_of_a_quarter():
    sums = calibration_sums(torch.full((4,), 0.5), torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.ones(4))
    assert (brier_score(sums), expected_calibration_error(sums)) == (0.25, 0)


def test_of_no_predictions_there_is_no_calibration():
    # A masked reward is NaN where there was none.
    sums = calibration_sums(torch.rand(3), torch.full((3,), torch.nan), torch.zeros(3))
    assert not sums.any()
    assert math.isnan(brier_score(sums)) and math.isnan(expected_calibration_error(sums))
