"""Small runs of VinePPO for the tests."""

import random
from collections import Counter

from datasets import Dataset
from vapo_runs import LENGTH, PROMPTS, share_of_even

from trl_credit import VinePPOConfig, VinePPOTrainer


SETTINGS = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": LENGTH,
    "max_steps": 1,
    "vine_continuations": 3,
    "segment_min_length": 2,
    "segment_target_length": 3,
    "segment_max_length": 4,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "optim": "sgd",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
}


def fixed_rollout(prompts, trainer):
    """The same completions for a prompt whatever the process that asks: some end, some are cut off."""
    tokenizer, seen = trainer.processing_class, Counter()
    completions = []
    for prompt in prompts:
        rng = random.Random(f"{prompt} {seen[prompt]}")
        seen[prompt] += 1
        ids = [rng.randrange(64, 96) for _ in range(rng.randint(1, LENGTH))]
        completions.append(ids if len(ids) == LENGTH else [*ids, tokenizer.eos_token_id])
    return {
        "prompt_ids": tokenizer(list(prompts))["input_ids"],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(ids) for ids in completions],
    }


class Watched(VinePPOTrainer):
    """Keeps what was sampled and scored, and its rollouts."""

    def sample(self, prefixes, *args, **kwargs):
        continuations = super().sample(prefixes, *args, **kwargs)
        self.__dict__.setdefault("sampled", []).append((prefixes, continuations))
        return continuations

    def score(self, rows, completion_ids):
        rewards = super().score(rows, completion_ids)
        self.__dict__.setdefault("scored", []).append((rows, completion_ids, rewards))
        return rewards

    def assign_credit(self, rollout, rewards, mode):
        credited = super().assign_credit(rollout, rewards, mode)
        self.__dict__.setdefault("rollouts_seen", []).append((credited, rewards, self.rollout_rows))
        return credited


def make_trainer(model_dir, folder, reward=share_of_even, rollout=None, trainer=Watched, prompts=PROMPTS, **settings):
    arguments = {name: settings.pop(name) for name in ("segmenter", "tools", "eval_dataset") if name in settings}
    return trainer(
        model=str(model_dir),
        reward_funcs=reward,
        args=VinePPOConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        rollout_func=rollout,
        **arguments,
    )
