"""What is logged of values: of right completions under "right", at the place that the name says."""

import torch

from trl_credit.trainers.value_report import value_means


def test_values_of_right_and_wrong_completions_go_under_their_names():
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [0.6, 0.7, 0.8, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    means = value_means(values, mask, torch.tensor([False, True, True]))
    found = {name: (round(float(total), 4), int(count)) for name, (total, count) in means.items()}
    assert found["mean"] == (3.6, 8)
    assert [found[f"wrong_at_{at}"] for at in (0, 25, 50, 75, 100)] == [
        (0.1, 1),
        (0.2, 1),
        (0.3, 1),
        (0.4, 1),
        (0.5, 1),
    ]
    assert [found[f"right_at_{at}"] for at in (0, 50, 100)] == [(0.6, 1), (0.7, 1), (0.8, 1)]
