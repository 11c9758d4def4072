"""What the benchmark of critics compares them with."""

import random
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import critic_rates


def test_the_ceiling_of_values_is_found_from_one_outcome_of_each_state():
    rows = critic_rates.write_letters(400, seed=0, held_out=True)
    exact = critic_rates.ceiling(rows)
    assert exact == (pytest.approx(0.36, abs=0.03), pytest.approx(0.33, abs=0.03))
    rng = random.Random(0)
    for row in rows:
        row["values"] = [float(rng.random() < value) for value in row["values"]]
    assert critic_rates.ceiling(rows) == pytest.approx(exact, abs=0.03)
