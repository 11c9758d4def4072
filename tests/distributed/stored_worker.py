"""
What each process of a distributed test of stored rollouts runs: `python stored_worker.py MODEL_DIR OUTPUT_DIR OTHERS`.

First the processes write rollouts of their own and pretrain a critic on them, then one on the rollouts that OTHERS have
written, for which nothing may be generated. Each critic is in `OUTPUT_DIR/<own or others>/critic`.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import vapo_runs
from torch import distributed

from trl_credit import VAPOTrainer


SETTINGS = {
    "critic_pretraining_steps": 4,
    "critic_pretraining_epochs": 3,
    "critic_pretraining_held_out": 0.25,
    "critic_pretraining_patience": None,
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "critic_learning_rate": 1e-2,
    "critic_head_learning_rate": 1e-2,
    "critic_max_grad_norm": 0.5,
}


def never(*args, **kwargs):
    raise AssertionError("something was generated")


def pretrain(model_dir: str, folder: Path, rollouts: Path, generates: bool = True, **settings) -> VAPOTrainer:
    settings = {"trainer": VAPOTrainer, **SETTINGS, "critic_pretraining_rollouts": str(rollouts), **settings}
    trainer = vapo_runs.make_trainer(model_dir, folder, **settings)
    if not generates:
        trainer._generate_and_score = never
    trainer.pretrain_critic()
    if trainer.is_world_process_zero():
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.wait_for_everyone()
    return trainer


if __name__ == "__main__":
    model_dir, output_dir, others = sys.argv[1:]
    pretrain(model_dir, Path(output_dir, "own"), Path(output_dir, "rollouts"))
    pretrain(model_dir, Path(output_dir, "others"), Path(others), generates=False)
    # Else gloo's threads may outlive what they use, and abort the process at its end.
    if distributed.is_initialized():
        distributed.destroy_process_group()
