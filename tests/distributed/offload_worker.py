"""
What each process of the test runs: `python offload_worker.py OUTPUT MODEL_DIR`. Rank 0 leaves in `OUTPUT` the weights
of a critic after three updates with and without `offload`, and after two that follow a state that was loaded; what its
optimizer is, and where its state.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed
from transformers import AutoModelForCausalLM

from trl_credit.critics.engine.engine import CriticEngine, CriticOptimization


def main(output: str, model_dir: str) -> None:
    accelerator = Accelerator()
    folder = Path(output).parent

    def update(engine, number: int) -> None:
        ids = torch.arange(number, number + 6).unsqueeze(0) + accelerator.process_index
        loss = lambda module, ids: module(input_ids=ids).logits.square().sum()  # noqa: E731
        engine.update([ids], loss, lambda ids: torch.tensor(ids.numel()))

    found = {}
    for offload in (True, False):
        network = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        settings = CriticOptimization(learning_rate=1e-2, weight_decay=0.1, offload=offload)
        engine = CriticEngine(network, accelerator, settings)
        engine.begin(5)
        for number in (1, 40, 90):
            update(engine, number)
        inner = engine.module.optimizer.optimizer
        found[offload] = {"class": type(inner).__name__, "weights": engine.backend.weights()}
        saved = folder / str(offload)
        engine.save(saved / "critic")
        engine.save_state(saved)
        resumed = []
        for _ in range(2):
            update(engine, 7)
            resumed.append({name: weight.clone() for name, weight in engine.backend.weights().items()})
            engine.go_back(saved, saved / "critic")
        found[offload]["resumed"] = resumed
    if accelerator.is_main_process:
        torch.save(found, output)
    accelerator.wait_for_everyone()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
