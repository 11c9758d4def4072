"""
What each process of a distributed test of a critic runs: `python vapo_worker.py MODEL_DIR OUTPUT_DIR SCENARIO...`.

Rank 0 leaves in `OUTPUT_DIR/<scenario>` both networks as they are saved, and in `history.json` what was logged and on
which engines they ran.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import sppo_runs
import vapo_runs
from accelerate.utils import gather_object
from peft import LoraConfig
from process import engine, run_scenarios
from transformers import training_args
from vapo_runs import BEST_AT_END, SETTINGS, BestFirst

from trl_credit import VAPOTrainer


COMMON = {
    **SETTINGS,
    "use_cpu": False,
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "critic_pretraining_steps": 2,
    "critic_learning_rate": 1e-2,
    "critic_max_grad_norm": 0.5,
    "critic_weight_decay": 0.1,
}
VAPO = {"num_generations": 4, "length_adaptive_alpha": 1.5, "whiten_advantages": True}
# A rollout lasts two steps: the run that is resumed was stopped between them.
SAVED = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
SCENARIOS = {
    "full": {},
    "lora": {"critic_peft_config": {"r": 4, "target_modules": "all-linear"}},
    "frozen": {"critic_freeze": ["attention", "embeddings"], "gradient_checkpointing": True},
    "checkpointing": {"gradient_checkpointing": True},
    "shared": {"critic_share_base": True},  # and the policy has adapters
    "saved": SAVED,
    "resumed": SAVED,
    "broken": {},  # a gradient of the critic that is none
    "best": BEST_AT_END,
}
_LORA_ON_BF16 = {**SCENARIOS["lora"], "critic_model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True}
BF16_SCENARIOS = {
    "lora on bf16": _LORA_ON_BF16,
    "lora on bf16, loaded": {**_LORA_ON_BF16, "critic_peft_config": None},  # the critic that the other one has saved
}
IN_THREES = {"per_device_train_batch_size": 3, "reward": sppo_runs.unscored_now_and_then}
SPPO_SCENARIOS = {  # the critic is of another family
    "sppo, 1 a prompt": {},
    "sppo, 3 a prompt": {"num_generations": 3, **IN_THREES},
    "sppo, 4 a prompt": {"num_generations": 4, **IN_THREES},  # of three groups the second is on both processes
    "sppo, saved": SAVED,
    "sppo, resumed": SAVED,
}


def broken_after(trainer, updates: int):
    """The trainer's loss with, after some updates, a finite value and a gradient of NaN."""
    loss = trainer.critic_loss

    def broken(network, inputs):
        value = loss(network, inputs)
        return value if trainer.engine.steps < updates else value + 0 * (value - value).sqrt()

    return broken


def train(model_dir: str, output_dir: str, scenario: str, resume: str | None = None, **settings) -> dict:
    if scenario in SPPO_SCENARIOS:
        settings = {**COMMON, **SPPO_SCENARIOS[scenario], **settings, "critic": f"{model_dir}/critic"}
        trainer = sppo_runs.make_trainer(model_dir, output_dir, **settings)
    else:
        if scenario == "shared":
            settings["peft_config"] = LoraConfig(r=4, target_modules="all-linear")
        if scenario.endswith("loaded"):
            settings["critic"] = output_dir.replace(", loaded", "/critic")
        settings = {**COMMON, **VAPO, **{**SCENARIOS, **BF16_SCENARIOS}[scenario], **settings}
        kind = BestFirst if scenario == "best" else VAPOTrainer
        trainer = vapo_runs.make_trainer(model_dir, output_dir, trainer=kind, **settings)
    error = None
    if scenario == "broken":
        trainer.critic_loss = broken_after(trainer, updates=3)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except FloatingPointError as stop:
        error = str(stop)
    trainer.save_model()
    result = {
        "policy": engine(trainer.model_wrapped, trainer.accelerator),
        "critic": engine(trainer.engine.module, trainer.accelerator),
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "pretraining": [entry for entry in trainer.state.log_history if "critic_pretraining/loss" in entry],
        "critic_steps": trainer.engine.steps,
        "error": error,
        "prompts_read": gather_object([getattr(trainer, "prompts_read", [])]),
    }
    if trainer.is_world_process_zero():
        (Path(output_dir) / "history.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    return result


if __name__ == "__main__":
    model_dir, output_dir, *scenarios = sys.argv[1:]
    # For bf16 without a GPU transformers asks for `use_cpu`, with which accelerate takes no DeepSpeed.
    training_args.is_torch_bf16_gpu_available = lambda: True

    def train_or_resume(scenario: str, **on_cpu) -> None:
        whole = scenario.replace("resumed", "saved")
        resume = f"{output_dir}/{whole}/checkpoint-1" if scenario != whole else None
        train(model_dir, f"{output_dir}/{scenario}", scenario, resume, gradient_accumulation_steps=2, **on_cpu)

    run_scenarios(train_or_resume, scenarios)
