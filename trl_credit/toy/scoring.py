"""How many held-out problems a model solves, and how sure that number is."""

import math
import random
from dataclasses import dataclass

import torch

from .task import Task


_SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
_GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}


@dataclass(frozen=True)
class Estimate:
    """A mean and the half-width of its 95 % confidence interval."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        n = len(values)
        mean = sum(values) / n
        variance = sum((value - mean) ** 2 for value in values) / max(n - 1, 1)
        return cls(mean, 1.96 * math.sqrt(variance / n))

    def __format__(self, sign: str) -> str:
        return f"{100 * self.mean:{sign}.1f} ± {100 * self.half_width:.1f} %"


@dataclass(frozen=True)
class Evaluation:
    """One sampled and one greedy completion for each problem, and which of them are right."""

    problems: list[str]
    sampled: list[str]
    greedy: list[str]
    sampled_right: list[bool]
    greedy_right: list[bool]


def held_out_problems(task: Task, number: int, seed: int = 0) -> list[str]:
    """Problems that [`Task.draw`] never gives to training, the same for the same `seed`."""
    rng = random.Random(f"held out {seed}")
    return [task.draw(rng, held_out=True) for _ in range(number)]


def evaluate(model, tokenizer, task: Task, problems: list[str], batch_size: int = 256) -> Evaluation:
    """Solve the problems once sampled and once greedily."""
    sampled = complete(model, tokenizer, task, problems, _SAMPLED, batch_size)
    greedy = complete(model, tokenizer, task, problems, _GREEDY, batch_size)
    right = [
        [task.is_correct(problem, text) for problem, text in zip(problems, texts, strict=True)]
        for texts in (sampled, greedy)
    ]
    return Evaluation(problems, sampled, greedy, *right)


@torch.no_grad()
def complete(model, tokenizer, task: Task, problems: list[str], decoding: dict, batch_size: int) -> list[str]:
    """One completion for each problem; the same ones every time that the same model is asked."""
    model.eval()
    texts = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for start in range(0, len(problems), batch_size):
            prompts = [task.prompt(problem) for problem in problems[start : start + batch_size]]
            if not isinstance(prompts[0], str):
                prompts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
            batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
            ids = model.generate(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.attention_mask.to(model.device),
                max_new_tokens=task.max_completion_length,
                pad_token_id=tokenizer.pad_token_id,
                **decoding,
            )
            texts += tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return texts
