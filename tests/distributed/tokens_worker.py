"""
What each process of the test of a critic's batches runs: `python tokens_worker.py MODEL_DIR OUTPUT_DIR SCENARIO...`.

Rank 0 leaves in `OUTPUT_DIR/<scenario>` both networks as they are saved, and in `found.json` rows and columns of the
critic's forward passes on every process, and on which engine they ran.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import sppo_runs
import vapo_runs
from accelerate.utils import gather_object
from process import engine, run_scenarios
from vapo_worker import COMMON

from trl_credit import VAPOTrainer


SCENARIOS = {
    "on arrival": {},
    "after the step": {"num_iterations": 2},
    "in small batches": {"critic_update_batch_tokens": 20},
    "prompts": {},
}


def train(model_dir: str, output_dir: str, scenario: str, **settings) -> dict:
    settings = {**COMMON, "critic_pretraining_steps": 1, "max_steps": 2, **SCENARIOS[scenario], **settings}
    if scenario == "prompts":
        trainer = sppo_runs.make_trainer(model_dir, output_dir, critic=f"{model_dir}/critic", **settings)
    else:
        trainer = vapo_runs.make_trainer(model_dir, output_dir, trainer=VAPOTrainer, **settings)
    passes: list[list[int]] = []
    trainer.critic.get_input_embeddings().register_forward_hook(
        lambda module, args, output: passes.append([*args[0].shape])
    )
    trainer.train()
    trainer.save_model()
    found = {"engine": engine(trainer.engine.module, trainer.accelerator), "passes": gather_object([passes])}
    if trainer.is_world_process_zero():
        (Path(output_dir) / "found.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    return found


if __name__ == "__main__":
    model_dir, output_dir, *scenarios = sys.argv[1:]
    run_scenarios(
        lambda scenario, **on_cpu: train(
            model_dir, f"{output_dir}/{scenario}", scenario, gradient_accumulation_steps=2, **on_cpu
        ),
        scenarios,
    )
