"""How many held-out problems a model solves, and how sure that number is."""

import math
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..credit.fit import fit_sums
from ..critics.critic import Critic
from ..sampling import sample_continuations
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

    @classmethod
    def of_share(cls, parts: torch.Tensor, wholes: torch.Tensor) -> "Estimate":
        """Of Σ parts / Σ wholes, by leaving out one of them after another."""
        without = (parts.sum() - parts) / (wholes.sum() - wholes)
        variance = (len(parts) - 1) * without.var(correction=0)
        return cls((parts.sum() / wholes.sum()).item(), 1.96 * variance.sqrt().item())

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
            texts_in = _prompts(tokenizer, task, problems[start : start + batch_size])
            batch = tokenizer(
                texts_in, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
            )
            ids = model.generate(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.attention_mask.to(model.device),
                max_new_tokens=task.max_completion_length,
                pad_token_id=tokenizer.pad_token_id,
                **decoding,
            )
            texts += tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


class _Attempt(NamedTuple):
    """A completion as a critic takes it."""

    prompt: str
    prompt_ids: list[int]
    completion_ids: list[int]
    row: dict[str, str] = {}
    cuts: tuple[int, ...] = ()


def explained_within_problems(
    critic: Critic, model, tokenizer, task: Task, problems: list[str], batch_size: int, attempts: int = 8
) -> Estimate:
    """
    What a critic knows beyond how hard a problem is: of the variance of the reward between the attempts at a problem,
    the share that its values at their tokens explain. 0 for one that sees no step, and below for noise.

    Args:
        critic ([`~trl_credit.critics.critic.Critic`]):
            Of the model's tokens.
        attempts (`int`, *optional*, defaults to `8`):
            Completions that the model samples for each problem.
    """
    asked = [problem for problem in problems for _ in range(attempts)]
    prompts = _prompts(tokenizer, task, asked)
    prompt_ids = tokenizer(prompts, add_special_tokens=False).input_ids
    rows = list(range(len(asked)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        completion_ids = sample_continuations(
            model.eval(),
            prompt_ids,
            room=[task.max_completion_length] * len(asked),
            ends=[tokenizer.eos_token_id],
            pad=tokenizer.pad_token_id,
            chunks=[rows[start : start + batch_size] for start in range(0, len(rows), batch_size)],
        )
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    values = critic.values([_Attempt(*of) for of in zip(prompts, prompt_ids, completion_ids, strict=True)])
    sums = []
    for problem, text, states in zip(asked, texts, values, strict=True):
        of_tokens = torch.from_numpy(states[:-1]).unsqueeze(0)
        returns = torch.full_like(of_tokens, float(task.is_correct(problem, text)))
        sums.append(fit_sums(of_tokens, returns, torch.ones_like(of_tokens)))
    count, earned, squares, errors, squared_errors = torch.cat(sums).view(-1, attempts, 5).sum(1).unbind(-1)
    spread, left = squares - earned.square() / count, squared_errors - errors.square() / count
    return Estimate.of_share(spread - left, spread)


def _prompts(tokenizer, task: Task, problems: list[str]) -> list[str]:
    """The problems as the model is asked them, as texts."""
    prompts: Any = [task.prompt(problem) for problem in problems]
    if isinstance(prompts[0], str):
        return prompts
    return tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
