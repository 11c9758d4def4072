"""A language model of 0.2 million parameters, fitted in about a minute to imitate a careless teacher of arithmetic."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2Tokenizer

from .task import ALPHABET, ChainTask, Teacher


@dataclass(frozen=True)
class TinyModelSettings:
    """What the tiny model depends on."""

    hidden_size: int = 64
    layers: int = 3
    heads: int = 4
    steps: int = 800
    batch_size: int = 64
    learning_rate: float = 4e-3
    seed: int = 0
    terms: tuple[int, ...] = (4, 5, 6)
    teacher: Teacher = field(default_factory=Teacher)

    def folder(self, parent: Path) -> Path:
        """Where the fitted model is kept: other settings, other folder."""
        fingerprint = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return parent / f"tiny-{fingerprint}"


def make_tokenizer() -> Qwen2Tokenizer:
    """One token per character of the task, and two special ones. Other characters are dropped."""
    # Not the 256 bytes: the model then spends half of its training on never saying the 242 that do not occur.
    # And a Qwen2Tokenizer, not just any fast one: AutoTokenizer makes one of whatever lies beside a Qwen2 model, and
    # silently drops the characters that its byte-level alphabet spells differently.
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    vocab = {character: i for i, character in enumerate(ALPHABET)}
    vocab["<|endoftext|>"] = len(vocab)
    return Qwen2Tokenizer(vocab, merges=[], padding_side="left", **special)


def make_model(tokenizer: Qwen2Tokenizer, settings: TinyModelSettings) -> PreTrainedModel:
    """The model with random weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def fit(
    model: PreTrainedModel,
    tokenizer: Qwen2Tokenizer,
    settings: TinyModelSettings,
    on_step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Supervised fine-tuning on the teacher's solutions to problems that are not held out."""
    task = ChainTask(settings.terms)
    rng = random.Random(f"teacher {settings.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    model.train()
    for _ in range(settings.steps):
        problems = [task.draw(rng) for _ in range(settings.batch_size)]
        prompts = [task.prompt(problem) for problem in problems]
        texts = [
            prompt + settings.teacher.solve(problem, rng) + tokenizer.eos_token
            for prompt, problem in zip(prompts, problems, strict=True)
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(model.device)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        for row, prompt in zip(labels, prompts, strict=True):
            row[: len(prompt)] = -100
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(loss.item())
    model.eval()


def fit_and_save(
    settings: TinyModelSettings, folder: Path, on_step: Callable[[float], None] = lambda loss: None
) -> None:
    """Make the model, the same for the same settings, and save it with its tokenizer."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = make_model(tokenizer, settings)
    fit(model, tokenizer, settings, on_step)
    # Under its name only when it is complete, so that an interrupted run leaves no half a model to be found.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def fitted(settings: TinyModelSettings, parent: Path) -> Path:
    """Where the fitted model is kept; it is made if it is not there yet."""
    folder = settings.folder(parent)
    if not folder.exists():
        fit_and_save(settings, folder)
    return folder


def load(path: str | Path) -> tuple:
    """Model, in float32, and tokenizer of a folder or Hub id."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tokenizer
