"""A number is added to the head's bias on every engine, where its optimizer keeps it too."""

import json

import pytest
from launch import CONFIGS, TESTS, accelerate, run
from tiny import tiny_model_dir


pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("engine", ["fsdp2"])
def test_the_bias_is_moved_and_steps_go_on_from_there(engine, tmp_path):
    output, model_dir = tmp_path / "found.json", tiny_model_dir(tmp_path)
    script = TESTS / "distributed" / "shift_worker.py"
    run(accelerate(CONFIGS / f"{engine}.yaml", script, output, model_dir), engine=engine)
    start, first, second, stepped = json.loads(output.read_text())
    assert (start, first, second) == pytest.approx((0.5, 1.25, -0.25), abs=1e-6)
    # Of AdamW's first step the size is the rate; the gradient of a square is on the side of the value.
    assert stepped == pytest.approx(-0.25 + 1e-3, abs=1e-5)
