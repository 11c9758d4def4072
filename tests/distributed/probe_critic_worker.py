"""
What each process of a distributed test of the probe critic runs: `python probe_critic_worker.py MODEL_DIR OUTPUT_DIR`.

Every rank leaves its head in `OUTPUT_DIR/head_<rank>.pt`; rank 0 the policy as it is saved, and in `history.json` what
was logged and on which engine the policy ran.
"""

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import vapo_runs
from torch import distributed
from vapo_worker import engine

from trl_credit import VAPOTrainer


SETTINGS = {
    **vapo_runs.SETTINGS,
    "critic_model_name_or_path": "probe",
    "critic_learning_rate": None,
    "reward_range": [-0.4, 0.6],
    "beta": 0.03,
    "policy_lambda": 0.5,
    "probe_layers": [0, 1, -1],
    "probe_uncertainty": True,
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "use_cpu": False,
}


def train(model_dir: str, output_dir: str, **settings) -> None:
    folder = Path(output_dir)
    trainer = vapo_runs.make_trainer(model_dir, folder, trainer=VAPOTrainer, **{**SETTINGS, **settings})
    trainer.train()
    trainer.save_model()
    torch.save(trainer.critic.state_dict(), folder / f"head_{trainer.accelerator.process_index}.pt")
    if trainer.is_world_process_zero():
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        found = {"engine": engine(trainer.model_wrapped, trainer.accelerator), "steps": steps}
        (folder / "history.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    accelerated = {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"} & os.environ.keys()
    on_cpu = {"ddp_backend": "gloo"} if accelerated else {"use_cpu": True}
    train(*sys.argv[1:], gradient_accumulation_steps=2, **on_cpu)
    # Else gloo's threads may outlive what they use, and abort the process at its end.
    if distributed.is_initialized():
        distributed.destroy_process_group()
