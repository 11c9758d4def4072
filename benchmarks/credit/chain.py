"""The quickstart's problems as a task of the benchmark."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from trl_credit.toy.task import ChainTask
from trl_credit.toy.tiny_model import TinyModelSettings, fit_and_save, make_tokenizer


@dataclass(frozen=True)
class Chains:
    """Arithmetic worked one operation at a time, see `trl_credit.toy.task`; its steps can be redone, not counted."""

    terms: tuple[int, ...] = (4, 5, 6)

    @property
    def task(self) -> ChainTask:
        return ChainTask(self.terms)

    @property
    def completion_length(self) -> int:
        return self.task.max_completion_length

    def prompts(self, count: int, generator: torch.Generator, held_out: bool = False) -> torch.Tensor:
        """Prompts, shape `(count, P)`, padded on the left."""
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        texts = [self.task.prompt(self.task.draw(rng, held_out)) for _ in range(count)]
        return make_tokenizer()(
            texts, padding="max_length", max_length=2 * max(self.terms), return_tensors="pt"
        ).input_ids

    def rewards(self, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
        """1 for each chain that ends in the right digit, else 0; shape `(B,)`."""
        tokenizer = make_tokenizer()
        problems = [text.removesuffix("=") for text in tokenizer.batch_decode(prompts, skip_special_tokens=True)]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        pairs = zip(problems, texts, strict=True)
        return torch.tensor([float(self.task.is_correct(problem, text)) for problem, text in pairs])

    def segment_ends(self, length: int) -> list[int]:
        """Every token is a segment: where an expression ends depends on the text."""
        return list(range(1, length + 1))

    def make_tokenizer(self):
        return make_tokenizer()

    def start_model(self, seed: int, cache: Path) -> Path:
        """The folder of the start model, made if it is not there yet."""
        settings = TinyModelSettings(terms=self.terms, seed=seed)
        folder = settings.folder(cache)
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            fit_and_save(settings, folder)
        return folder
