"""Under FSDP2 no process holds more than its share of the critic's gradient, also between micro-batches."""

import json

import pytest
import torch
from launch import CONFIGS, TESTS, accelerate, run
from tiny import tiny_model, tiny_model_dir


pytestmark = pytest.mark.distributed


def test_gradients_are_shards_between_micro_batches_and_sum_to_that_of_one_process(tmp_path):
    output, model_dir = tmp_path / "found.json", tiny_model_dir(tmp_path)
    script = TESTS / "distributed" / "shards_worker.py"
    run(accelerate(CONFIGS / "fsdp2.yaml", script, output, model_dir), engine="fsdp2")
    found = json.loads(output.read_text())
    assert found["held"][0] == 0
    for held in found["held"][1:]:
        assert 0.4 < held / found["numbers"] < 0.6

    model = tiny_model()
    texts = [torch.arange(i + rank, i + rank + 6) for i in (1, 40, 90) for rank in (0, 1)]
    loss = sum(model(input_ids=ids.unsqueeze(0)).logits.square().sum() for ids in texts) / 36
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    squares = sum(p.grad.double().square().sum().item() for p in model.parameters())
    assert found["squares"] == pytest.approx(squares, rel=1e-5)
