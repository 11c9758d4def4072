"""Start models: fitted to a task's teacher, and kept under a hash of everything that determines them."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from .walks import WalkTask


@dataclass(frozen=True)
class Fit:
    """How a start model is fitted."""

    seed: int = 0
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 6e-3
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 128

    def fingerprint(self, task: WalkTask) -> str:
        """Another task, other settings or another version of torch, another model."""
        # Raise the number with a change of the teacher or of the fit itself.
        versions = {"fit": 1, "torch": torch.__version__, "transformers": transformers.__version__}
        content = json.dumps([asdict(task), asdict(self), versions], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def make_tokenizer(task: WalkTask) -> PreTrainedTokenizerFast:
    """One token per word of the task."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(task.words)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Not AutoTokenizer's: of whatever lies beside a Qwen2 model that makes a Qwen2Tokenizer.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    ids = list(range(len(task.words)))
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids
    return tokenizer


def make_model(task: WalkTask, fit: Fit):
    """The model with random weights, the same for the same seed."""
    words = task.words
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=fit.hidden_size,
        intermediate_size=fit.intermediate_size,
        num_hidden_layers=fit.layers,
        num_attention_heads=fit.heads,
        num_key_value_heads=fit.heads,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=words.index("<eos>"),
        pad_token_id=words.index("<pad>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        return AutoModelForCausalLM.from_config(config)


def train_to_imitate(model, task: WalkTask, fit: Fit, on_step=lambda step, loss: None) -> None:
    """Supervised fine-tuning on the teacher's walks, a fresh batch each step."""
    generator = torch.Generator().manual_seed(10_000 + fit.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, fit.learning_rate, total_steps=fit.steps, pct_start=0.1)
    model.train()
    for step in range(fit.steps):
        prompts = task.prompts(fit.batch_size, generator)
        ids = torch.cat([prompts, task.teach(prompts, generator)], dim=1)
        logits = model(ids[:, :-1]).logits[:, prompts.shape[1] - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompts.shape[1] :].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step, loss.item())
    model.eval()


def start_model(task: WalkTask, fit: Fit, cache: Path) -> Path:
    """The folder of the start model, made if it is not there yet."""
    folder = cache / f"fit-{fit.fingerprint(task)}"
    if not folder.exists():
        torch.set_num_threads(1)  # sums in another order make another model
        model = make_model(task, fit)
        train_to_imitate(model, task, fit)
        # Under its name only when it is complete. Of two processes that made it, one is first.
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        model.save_pretrained(partial)
        (partial / "fit.json").write_text(json.dumps({"task": asdict(task), "fit": asdict(fit)}, indent=1))
        try:
            partial.rename(folder)
        except OSError:
            shutil.rmtree(partial)
    return folder
