"""The tasks by name, their start models, and how their rewards reach a trainer."""

from pathlib import Path

import torch
from datasets import Dataset

from .chain import Chains
from .fits import Fit, make_tokenizer, start_model
from .walks import MARKS, SCOREBOARD, VOTE, WalkTask


TASKS: dict[str, WalkTask | Chains] = {
    "vote": VOTE,
    "scoreboard": SCOREBOARD,
    "marks": MARKS,
    "chain": Chains(),
    "tiny": WalkTask(symbols=16, steps=6, marks=(3, 5), counts=True),  # to try a grid in seconds
}
FIT_STEPS = {"vote": 600, "scoreboard": 1500, "marks": 600, "tiny": 200}


def prepare(name: str, seed: int, cache: Path):
    """The task, the folder of its start model by the seed of the fit, and its tokenizer."""
    task = TASKS[name]
    if isinstance(task, Chains):
        return task, task.start_model(seed, cache), task.make_tokenizer()
    return task, start_model(task, Fit(seed=seed, steps=FIT_STEPS[name]), cache), make_tokenizer(task)


def training_data(task, tokenizer, count: int, seed: int) -> Dataset:
    """Prompts to train on, with their tokens."""
    prompts = task.prompts(count, torch.Generator().manual_seed(20_000 + seed))
    return Dataset.from_dict(
        {"prompt": tokenizer.batch_decode(prompts, skip_special_tokens=True), "prompt_tokens": prompts.tolist()}
    )


class RewardFunction:
    """The task's rewards as TRL asks for them; it counts what was generated to earn them."""

    __name__ = "reward"

    def __init__(self, task, pad: int):
        self.task = task
        self.pad = pad
        self.tokens = 0

    def __call__(self, completion_ids, prompt_tokens, **kwargs) -> list[float]:
        self.tokens += sum(len(ids) for ids in completion_ids)
        longest = max(len(ids) for ids in completion_ids)
        completions = torch.tensor([[*ids, *[self.pad] * (longest - len(ids))] for ids in completion_ids])
        return self.task.rewards(torch.tensor(prompt_tokens), completions).tolist()
