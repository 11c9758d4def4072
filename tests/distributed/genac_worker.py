"""
Each process of a distributed GenAC test: `python genac_worker.py MODEL_DIR CRITIC_DIR OUTPUT_DIR SCENARIO...`.

Rank 0 leaves in `OUTPUT_DIR/<scenario>` both networks as they are saved, and in `history.json` what was logged and on
which engines they ran.
"""

import json
import sys
import zlib
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import Dataset
from genac_runs import GENAC, share_of_even
from process import engine, run_scenarios
from vapo_runs import PROMPTS, SETTINGS, fixed_rollout

from trl_credit import GenACConfig, GenACTrainer
from trl_credit.critics.engine.engine import seeded


COMMON = {
    **SETTINGS,
    **GENAC,
    "use_cpu": False,
    "per_device_train_batch_size": 2,
    "num_generations": 4,
    "max_steps": 3,
    "critic_pretraining_steps": 2,
    "critic_learning_rate": 1e-2,
    "critic_max_grad_norm": 0.5,
    "critic_weight_decay": 0.1,
    "critic_update_batch_tokens": 300,  # so that processes have packs of unlike number
    "critic_baseline": "leave_one_out",
    "segment_lambda": 0.9,
}
SAVED = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
SCENARIOS = {
    "full": {},
    "lora": {"critic_peft_config": {"r": 4, "target_modules": "all-linear"}},
    "checkpointing": {"gradient_checkpointing": True},
    "saved": SAVED,
    "resumed": SAVED,
}


class SameAnswers(GenACTrainer):
    """Samples each answer with random numbers of its question, so that it does not depend on who asks."""

    def _write(self, prompts):
        answers = []
        for prompt in prompts + [None] * (self.most(len(prompts)) - len(prompts)):
            with seeded(zlib.crc32(str(prompt and prompt.ids).encode())):
                answers += super()._write([] if prompt is None else [prompt])
        return answers


def train(model_dir, critic_dir, output_dir, scenario: str, resume: str | None = None, **settings) -> dict:
    trainer = SameAnswers(
        model=str(model_dir),
        reward_funcs=share_of_even,
        args=GenACConfig(str(output_dir), **{**COMMON, **SCENARIOS[scenario], **settings}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        rollout_func=fixed_rollout,
        critic=str(critic_dir),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    result = {
        "policy": engine(trainer.model_wrapped, trainer.accelerator),
        "critic": engine(trainer.engine.module, trainer.accelerator),
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "pretraining": [entry for entry in trainer.state.log_history if "critic_pretraining/loss" in entry],
        "critic_steps": trainer.engine.steps,
    }
    if trainer.is_world_process_zero():
        (Path(output_dir) / "history.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    return result


if __name__ == "__main__":
    model_dir, critic_dir, output_dir, *scenarios = sys.argv[1:]

    def train_or_resume(scenario: str, **on_cpu) -> None:
        resume = f"{output_dir}/saved/checkpoint-2" if scenario == "resumed" else None
        folder = f"{output_dir}/{scenario}"
        train(model_dir, critic_dir, folder, scenario, resume, gradient_accumulation_steps=2, **on_cpu)

    run_scenarios(train_or_resume, scenarios)
