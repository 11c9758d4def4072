"""
What each process of a distributed test runs: `python worker.py MODEL_DIR OUTPUT_DIR SCENARIO...`.

Rank 0 leaves in `OUTPUT_DIR/<scenario>` the final weights as `save_model` writes them, and in `history.json` what was
logged and on which engine it ran.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

from datasets import Dataset
from process import engine, run_scenarios
from trl import GRPOConfig, GRPOTrainer

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer


PROMPTS = ["ab", "cd ef", "a", "b c d", "fgh", "x y", "zzz", "q"]
COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.1,
    "bf16": False,
    "report_to": [],
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
GRPO = (GRPOTrainer, GRPOConfig, {})
UNTRACED = (GRPOLambdaTrainer, GRPOLambdaConfig, {"trace_lambda": 0.0, "min_advantage": None})


def even_tokens(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def fixed_rollout(prompts, trainer):
    """The same completions for a prompt whatever the process that asks, so that a comparison is one of training."""
    tokenizer, seen = trainer.processing_class, Counter()
    completions = []
    for prompt in prompts:
        rng = random.Random(f"{prompt} {seen[prompt]}")
        seen[prompt] += 1
        ids = [rng.randrange(64, 96) for _ in range(rng.randint(2, 8))]
        completions.append(ids if len(ids) == 8 else [*ids, tokenizer.eos_token_id])  # those of 8 are cut off
    return {
        "prompt_ids": tokenizer(list(prompts))["input_ids"],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(ids) for ids in completions],  # read with vLLM only
    }


TRACES = {"trace_lambda": 0.9, "trace_style": "both", "beta": 0.04, "num_iterations": 2}
SCENARIOS = {
    # Two iterations, so that the second has ratios that differ from 1.
    "traces": (GRPOLambdaTrainer, GRPOLambdaConfig, TRACES, fixed_rollout),
    "grpo": (*GRPO, None),
    "grpo_kl": (GRPOTrainer, GRPOConfig, {"beta": 0.04}, None),
    "untraced": (*UNTRACED, None),
    "untraced_kl": (GRPOLambdaTrainer, GRPOLambdaConfig, {**UNTRACED[2], "beta": 0.04}, None),
}


def train(model_dir: str, output_dir: str, scenario: str, **settings) -> dict:
    trainer_class, config_class, own, rollout = SCENARIOS[scenario]
    trainer = trainer_class(
        model=model_dir,
        reward_funcs=even_tokens,
        args=config_class(output_dir, **{**COMMON, **own, **settings}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        rollout_func=rollout,
    )
    trainer.train()
    trainer.save_model()
    result = {
        "engine": engine(trainer.model_wrapped, trainer.accelerator),
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    if trainer.is_world_process_zero():
        (Path(output_dir) / "history.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    return result


if __name__ == "__main__":
    model_dir, output_dir, *scenarios = sys.argv[1:]
    run_scenarios(
        lambda scenario, **on_cpu: train(model_dir, f"{output_dir}/{scenario}", scenario, **on_cpu), scenarios
    )
