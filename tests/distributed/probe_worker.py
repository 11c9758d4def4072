"""
What each process of the test of `CriticProbeCallback` runs: `python probe_worker.py MODEL_DIR PROBES OUTPUT_DIR`.

Rank 0 leaves in `OUTPUT_DIR/<trainer>.json` what was logged and on which engine the critic ran.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import sppo_runs
import torch
import vapo_runs
from datasets import Dataset
from torch import distributed

from trl_credit import CriticProbeCallback, SPPOConfig, SPPOTrainer, VAPOConfig, VAPOTrainer
from trl_credit.critic_report import ProbeSettings, draw_probes, load_policy


# Of an odd number of rollouts, so that two processes have unequal shares of them.
ROWS = [{"prompt": prompt} for prompt in vapo_runs.PROMPTS[:3]]
PROBES = ProbeSettings(completions=1, continuations=4, candidates=0, max_completion_length=vapo_runs.LENGTH)
TRAINERS = {"vapo": (VAPOTrainer, VAPOConfig), "sppo": (SPPOTrainer, SPPOConfig)}


def probes_of(model_dir: str, folder: str):
    return draw_probes(folder, load_policy(model_dir), ROWS, sppo_runs.share_of_even, PROBES)


def train(name: str, model_dir: str, probes, output_dir: str, callback: bool = True, **settings):
    trainer_class, config_class = TRAINERS[name]
    common = {key: value for key, value in vapo_runs.SETTINGS.items() if key in config_class.__dataclass_fields__}
    trainer = trainer_class(
        model=model_dir,
        reward_funcs=sppo_runs.share_of_even,
        args=config_class(output_dir, **{**common, "max_steps": 3, "critic_learning_rate": 1e-2, **settings}),
        train_dataset=Dataset.from_dict({"prompt": vapo_runs.PROMPTS}),
        rollout_func=vapo_runs.fixed_rollout,
    )
    if callback:
        trainer.add_callback(CriticProbeCallback(trainer, probes, every_n_steps=2))
    trainer.train()
    return trainer


def measured(trainer) -> list[dict]:
    keys = ("step", "critic_probe/mse", "critic_probe/explained_variance", "critic_probe/bias")
    return [{key: line[key] for key in keys} for line in trainer.state.log_history if "critic_probe/mse" in line]


if __name__ == "__main__":
    model_dir, folder, output_dir = sys.argv[1:]
    torch.set_num_threads(1)
    probes = probes_of(model_dir, folder)
    for name in TRAINERS:
        trainer = train(name, model_dir, probes, f"{output_dir}/{name}", per_device_train_batch_size=2)
        result = {
            "engine": type(trainer.engine.module).__name__,
            "processes": trainer.accelerator.num_processes,
            "log": measured(trainer),
        }
        if trainer.is_world_process_zero():
            Path(output_dir, f"{name}.json").write_text(json.dumps(result))
        trainer.accelerator.wait_for_everyone()
    if distributed.is_initialized():
        distributed.destroy_process_group()
