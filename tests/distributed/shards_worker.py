"""
What each process of the test runs: `python shards_worker.py OUTPUT MODEL_DIR`. Rank 0 leaves in `OUTPUT` how many
numbers the critic has, and how many of its gradient this process holds before each of three micro-batches.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from trl_credit.critics.engine.engine import CriticEngine, CriticOptimization


def main(output: str, model_dir: str) -> None:
    accelerator = Accelerator()
    network = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    numbers = sum(p.numel() for p in network.parameters())
    engine = CriticEngine(network, accelerator, CriticOptimization(learning_rate=1e-2))
    engine.begin(1)
    held = []

    def loss(module, ids):
        gradients = [p.grad for p in engine.network.parameters() if p.grad is not None]
        held.append(sum(g.to_local().numel() if isinstance(g, DTensor) else g.numel() for g in gradients))
        return module(input_ids=ids).logits.square().sum()

    step, kept = engine.backend.step, {}

    def look_and_step():
        kept["norm"] = sum(p.grad.full_tensor().double().square().sum().item() for p in engine.network.parameters())
        return step()

    engine.backend.step = look_and_step
    micro_batches = [torch.arange(i, i + 6).unsqueeze(0) + accelerator.process_index for i in (1, 40, 90)]
    result = engine.update(micro_batches, loss, lambda ids: torch.tensor(ids.numel()))
    if accelerator.is_main_process:
        found = {"numbers": numbers, "held": held, "squares": kept["norm"], "loss": result["loss"]}
        Path(output).write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
