"""The training run: TRL's trainer or ours on a task, with a progress bar instead of logs."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer, VAPOConfig, VAPOTrainer

from .task import Task


class Method(NamedTuple):
    """A trainer to compare, with its config and the name it is shown by."""

    name: str
    config: type[GRPOConfig]
    trainer: type[GRPOTrainer]


METHODS = {
    "grpo-lambda": Method("GRPO-λ", GRPOLambdaConfig, GRPOLambdaTrainer),
    "grpo": Method("GRPO", GRPOConfig, GRPOTrainer),
    "vapo": Method("VAPO", VAPOConfig, VAPOTrainer),
}


class _Progress(TrainerCallback):
    """Hands the metrics of each step on, and ends the run when its time is up."""

    def __init__(self, on_step: Callable[[dict], None], on_pretraining: Callable[[dict], None], minutes: float):
        self.on_step = on_step
        self.on_pretraining = on_pretraining
        self.minutes = minutes

    def on_train_begin(self, args, state, control, **kwargs):
        self.end = time.monotonic() + 60 * self.minutes

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "critic_pretraining/step" in logs:
            self.on_pretraining(logs)
        if "reward" in logs:
            self.on_step({"step": state.global_step, **logs})

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.end:
            control.should_training_stop = True


def train(
    model,
    tokenizer,
    task: Task,
    method: str | Method,
    *,
    steps: int,
    prompts_per_step: int,
    seed: int,
    output_dir: Path,
    minutes: float = float("inf"),
    on_step: Callable[[dict], None] = lambda metrics: None,
    on_pretraining: Callable[[dict], None] = lambda metrics: None,
    **settings,
):
    """
    Train `model` in place.

    Args:
        method (`str` or `Method`):
            `"grpo-lambda"`, `"grpo"`, `"vapo"`, or a trainer of your own.
        minutes (`float`, *optional*):
            Stop after these, whether or not all steps are done.
        on_step (`Callable[[dict], None]`, *optional*):
            Called with the metrics of each step.
        on_pretraining (`Callable[[dict], None]`, *optional*):
            Called with those of each update of a critic before the policy moves.
        settings:
            Further fields of the method's config.

    Returns:
        The trainer.
    """
    method = METHODS[method] if isinstance(method, str) else method
    rng = random.Random(f"train {seed}")
    problems = [task.draw(rng) for _ in range(steps * prompts_per_step)]
    dataset = Dataset.from_dict({"prompt": [task.prompt(problem) for problem in problems], "problem": problems})

    def correct(completions, problem, **kwargs):
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [float(task.is_correct(p, text)) for p, text in zip(problem, texts, strict=True)]

    settings = {"num_generations": 8, "lr_scheduler_type": "constant", "bf16": torch.cuda.is_available(), **settings}
    # Of several updates per rollout, each is a step of TRL's.
    settings["max_steps"] = steps * settings.get("num_iterations", 1)
    settings.setdefault("per_device_train_batch_size", prompts_per_step * settings["num_generations"])
    config = method.config(
        str(output_dir),
        max_completion_length=task.max_completion_length,
        seed=seed,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = method.trainer(
        model=model,
        reward_funcs=correct,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[_Progress(on_step, on_pretraining, minutes)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer
