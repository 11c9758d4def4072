"""Sampling from a policy, with transformers' `generate` or vLLM, and what tells one policy from another."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..critics.engine.engine import seeded
from ..sampling import sample_continuations


_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True)
class Decoding:
    """
    How tokens are drawn.

    Args:
        temperature (`float`, *optional*, defaults to `1.0`):
            Positive.
        top_p (`float`, *optional*, defaults to `1.0`):
            Share of the probability that is kept.
        top_k (`int`, *optional*, defaults to `0`):
            Number of tokens that are kept; 0 for all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}: a value is a mean over samples.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be at least 0, got {self.top_k}.")


class Policy(Protocol):
    """What probes are drawn from. `eos_ids` are the tokens that end a completion."""

    identity: str
    tokenizer: Any
    eos_ids: set[int]
    sequences_per_call: int

    def sample(
        self, starts: Sequence[list[int]], room: Sequence[int], decoding: Decoding, seed: int
    ) -> list[list[int]]:
        """One continuation of each of `starts`, of at most `room` tokens, its end-of-sequence token included."""
        ...


class TransformersPolicy:
    """
    A policy that samples with `generate`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal LM, on its device.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        identity (`str`, *optional*):
            What tells it from other policies. Default: a hash of its weights.
        batch_size (`int`, *optional*, defaults to `64`):
            Sequences that are generated at a time.
    """

    def __init__(self, model, tokenizer, identity: str | None = None, batch_size: int = 64):
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.identity = identity or f"weights:{_hash_of_weights(model)}"
        self.sequences_per_call = batch_size
        self.eos_ids = _eos_ids(getattr(model, "generation_config", None), tokenizer)

    def sample(
        self, starts: Sequence[list[int]], room: Sequence[int], decoding: Decoding, seed: int
    ) -> list[list[int]]:
        """As [`Policy.sample`]; the same numbers for the same seed and starts."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.eos_ids)
        rows = list(range(len(starts)))
        with seeded(seed):
            return sample_continuations(
                self.model,
                starts,
                room,
                self.eos_ids,
                pad,
                decoding.temperature,
                decoding.top_p,
                decoding.top_k,
                chunks=[rows[at : at + self.sequences_per_call] for at in range(0, len(rows), self.sequences_per_call)],
            )


class VLLMPolicy:
    """
    A policy that samples with vLLM.

    Args:
        model (`str`):
            A folder or Hub id.
        sequences_per_call (`int`, *optional*, defaults to `2048`):
            Sequences handed over at a time; what they gave is on disk before the next are.
        engine_kwargs:
            Of `vllm.LLM`.
    """

    def __init__(self, model: str, sequences_per_call: int = 2048, **engine_kwargs):
        from vllm import LLM

        self.identity = checkpoint_identity(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.sequences_per_call = sequences_per_call
        self.llm: Any = LLM(model=model, enable_prefix_caching=True, **engine_kwargs)
        self.eos_ids = _eos_ids(_generation_config(model), self.tokenizer)

    def sample(
        self, starts: Sequence[list[int]], room: Sequence[int], decoding: Decoding, seed: int
    ) -> list[list[int]]:
        """As [`Policy.sample`]."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=most,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                top_k=decoding.top_k,
                stop_token_ids=sorted(self.eos_ids),
                seed=(seed * 1_000_003 + row) % 2**63,
                detokenize=False,
            )
            for row, most in enumerate(room)
        ]
        prompts = [{"prompt_token_ids": list(start)} for start in starts]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def load_policy(model: str | PreTrainedModel, tokenizer=None, batch_size: int = 64, **model_init_kwargs):
    """
    A [`TransformersPolicy`] of a checkpoint or of a model in memory.

    Args:
        model (`str` or `PreTrainedModel`):
            A folder, Hub id or model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Default: the one that was saved with it.
        batch_size (`int`, *optional*, defaults to `64`):
            Sequences that are generated at a time.
        model_init_kwargs:
            Of `from_pretrained`.
    """
    if not isinstance(model, str):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model.config.name_or_path)  # type: ignore[union-attr]
        return TransformersPolicy(model, tokenizer, batch_size=batch_size)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model, **model_init_kwargs)
    network = network.to("cuda" if torch.cuda.is_available() else "cpu")
    return TransformersPolicy(network, tokenizer, checkpoint_identity(model), batch_size)


def checkpoint_identity(model: str) -> str:
    """The weights of a folder, or name and commit of a model on the Hub."""
    if not Path(model).is_dir():
        return f"hub:{model}@{getattr(AutoConfig.from_pretrained(model), '_commit_hash', None)}"
    digest = hashlib.sha256()
    files = sorted(path for path in Path(model).iterdir() if path.suffix in _WEIGHTS)
    if not files:
        raise FileNotFoundError(f"{model} holds no weights ({', '.join(_WEIGHTS)}).")
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return f"checkpoint:{digest.hexdigest()[:16]}"


def _hash_of_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        raw = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + raw.numpy().tobytes())
    return digest.hexdigest()[:16]


def _generation_config(model: str):
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # not every checkpoint has one
        return None


def _eos_ids(generation_config, tokenizer) -> set[int]:
    ids = getattr(generation_config, "eos_token_id", None)
    ids = {ids} if isinstance(ids, int) else set(ids or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ValueError("The policy has no end-of-sequence token, neither in its generation config nor its tokenizer.")
    return ids
