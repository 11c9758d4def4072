"""A policy that ZeRO-3 has split when its critic is to be made: there is nothing to copy, and all processes say so."""

import memory_worker
import pytest
from launch import CONFIGS, TESTS, accelerate, run


pytestmark = pytest.mark.distributed


def test_a_policy_in_memory_that_zero_3_has_split_is_refused_by_every_trainer_with_a_critic(model_dir, tmp_path):
    worker = TESTS / "distributed" / "memory_worker.py"
    run(accelerate(CONFIGS / "zero3.yaml", worker, model_dir, tmp_path), engine="zero3")
    for name in memory_worker.TRAINERS:
        for process in range(2):
            error = (tmp_path / f"{name}_{process}.txt").read_text()
            assert "With ZeRO-3 the weights of a Qwen2ForCausalLM in memory are already split" in error, (name, error)
            assert "Pass `critic` as a path or a Hub id" in error
