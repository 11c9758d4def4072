"""Small runs of VAPO for the tests."""

import random
from collections import Counter

import torch
from datasets import Dataset
from vapo_oracle import Sample

from trl_credit import VAPOConfig, VAPOTrainer


LENGTH = 12
PROMPTS = ["ab", "cd ef", "a", "b c d", "fgh", "x y", "zzz", "q"]
SETTINGS = {
    "per_device_train_batch_size": 4,
    "num_generations": 1,
    "max_completion_length": LENGTH,
    "max_steps": 1,
    "critic_pretraining_steps": 0,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "optim": "sgd",  # one that does not turn the rounding of a small gradient into a full step
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "critic_learning_rate": 1e-3,
    "adam_epsilon": 1e-2,
    "gradient_checkpointing": False,
}


def fixed_rollout(prompts, trainer):
    """The same completions for a prompt whatever the process that asks: some end, some are cut off, some have tools."""
    tokenizer, seen = trainer.processing_class, Counter()
    completions, masks = [], []
    for prompt in prompts:
        rng = random.Random(f"{prompt} {seen[prompt]}")
        seen[prompt] += 1
        ids = [rng.randrange(64, 96) for _ in range(rng.randint(1, LENGTH))]
        mask = [1] * len(ids)
        if len(ids) > 7:
            mask[3:5] = [0, 0]
        if len(ids) in (6, 11):  # the last token is a tool's
            mask[-1] = 0
        if len(ids) < LENGTH and len(ids) not in (6, 11):
            ids, mask = [*ids, tokenizer.eos_token_id], [*mask, 1]
        completions.append(ids)
        masks.append(mask)
    return {
        "prompt_ids": tokenizer(list(prompts))["input_ids"],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(ids) for ids in completions],
        "env_mask": masks,
    }


def share_of_even(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) - 0.4 for ids in completion_ids]


def even_tokens(completion_ids, **kwargs):
    """A reward per token."""
    return [[0.1 * (i % 2 == 0) - 0.05 for i in ids] for ids in completion_ids]


class Watched(VAPOTrainer):
    """Keeps its rollouts, and both networks as they were at the start."""

    def assign_credit(self, rollout, rewards, mode):
        self.__dict__.setdefault("rewards_seen", []).append(rewards)
        credited = super().assign_credit(rollout, rewards, mode)
        self.__dict__.setdefault("rollouts_seen", []).append(credited)
        return credited


class BestFirst(VAPOTrainer):
    """Takes its first checkpoint for the best, as if the reward had fallen ever since."""

    def _determine_best_metric(self, metrics, trial):
        is_best = self.state.best_metric is None
        if is_best:
            self.state.best_metric, self.state.best_global_step = 1.0, self.state.global_step
        return is_best


BEST_AT_END = {
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 1,
    "eval_steps": 1,
    "max_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_reward",
    "per_device_eval_batch_size": 4,
    "eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:4]}),
}


def make_trainer(model_dir, folder, reward=share_of_even, rollout=fixed_rollout, trainer=Watched, **settings):
    arguments = {name: settings.pop(name, None) for name in ("critic", "peft_config", "eval_dataset")}
    return trainer(
        model=str(model_dir) if not isinstance(model_dir, torch.nn.Module) else model_dir,
        reward_funcs=reward,
        args=VAPOConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        rollout_func=rollout,
        **arguments,
    )


def samples_of(trainer, rollout, rewards, per_token=False):
    """A rollout without its padding, for the oracle."""
    samples = []
    ends = {trainer.processing_class.eos_token_id, trainer.processing_class.pad_token_id}
    for row in range(len(rollout["completion_ids"])):
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()].tolist()
        completion = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()].tolist()
        trained = rollout["tool_mask"][row][: len(completion)].bool().tolist() if "tool_mask" in rollout else None
        trained = trained or [True] * len(completion)
        reward = rewards[row].item()
        is_cut_off = completion[-1] not in ends and len(completion) == LENGTH
        if reward != reward:
            per_step = None
        elif per_token:
            per_step = even_tokens([completion])[0]
        else:
            last = max(t for t, is_trained in enumerate(trained) if is_trained)
            per_step = [reward * (t == last) for t in range(len(completion))]
        samples.append(Sample(prompt, completion, trained, per_step, is_cut_off))
    return samples
