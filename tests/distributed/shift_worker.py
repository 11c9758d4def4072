"""
What each process of the test runs: `python shift_worker.py OUTPUT MODEL_DIR`. Rank 0 leaves in `OUTPUT` the bias of a
critic's head as it starts, after it was moved twice, and after an update behind that.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import Accelerator
from torch import distributed

from trl_credit.critics.engine.engine import CriticEngine, CriticOptimization
from trl_credit.critics.token import make_token_critic


def main(output: str, model_dir: str) -> None:
    accelerator = Accelerator()
    engine = CriticEngine(make_token_critic(model_dir, 0.5), accelerator, CriticOptimization(learning_rate=1e-3))
    engine.begin(1)
    found = []

    def look():
        weights = engine.backend.weights()
        if accelerator.is_main_process:
            (bias,) = [weight for name, weight in weights.items() if name.endswith("score.bias")]
            found.append(bias.item())

    look()
    for by in (0.75, -1.5):
        engine.shift("score.bias", by)
        look()
    ids = torch.arange(6).unsqueeze(0) + accelerator.process_index
    engine.update([ids], lambda module, ids: module(input_ids=ids).logits.square().sum(), lambda ids: ids.new_tensor(6))
    look()
    if accelerator.is_main_process:
        Path(output).write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
