"""One of the processes that `test_two_processes_each_with_an_engine` starts: trains, and writes down what it saw."""

import hashlib
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from vllm.platforms import current_platform
from vllm_training import logp_gap, make_trainer, steps


def digest(model) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


model_dir, output_dir = map(Path, sys.argv[1:])
with patch.object(type(current_platform), "supported_dtypes", [torch.float32]):
    trainer = make_trainer(model_dir, output_dir / "out", trace_lambda=0.9, max_steps=3)
start = digest(trainer.model)
trainer.train()
before = logp_gap(trainer)
trainer.vllm_generation.sync_weights()
engine = type(trainer.vllm_generation.llm)
report = {
    "world_size": trainer.accelerator.num_processes,
    "model": type(trainer.model_wrapped).__name__,
    "engine": f"{engine.__module__}.{engine.__name__}",
    "logp_gap_before": before,
    "logp_gap_after": logp_gap(trainer),
    "start": start,
    "weights": digest(trainer.model),
    "steps": trainer.state.global_step,
    "losses": [step["loss"] for step in steps(trainer)],
    "completions": trainer.rollouts_seen[0]["completion_ids"].tolist(),
}
(output_dir / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(report))
