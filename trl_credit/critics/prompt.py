"""A value for a whole prompt, from a critic that may have a tokenizer and a chat template of its own."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer
from trl import is_conversational

from .token import read_values


# In a tensor of prompts, what is no token.
PAD = -1
# Keyword arguments of a model's `from_pretrained` that its tokenizer shares.
_SHARED_KWARGS = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder")


def load_critic_tokenizer(source: str | Path, model_init_kwargs: dict | None = None) -> Any:
    """
    The tokenizer of a critic's checkpoint.

    Args:
        source (`str` or `Path`):
            Its folder or Hub id.
        model_init_kwargs (`dict`, *optional*):
            Those of the critic: its revision and the like count for the tokenizer too.

    Raises:
        ValueError: If the checkpoint has no tokenizer.
    """
    kwargs = {name: value for name, value in (model_init_kwargs or {}).items() if name in _SHARED_KWARGS}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    except (OSError, ValueError):
        tokenizer = None
    # For some architectures one is made up where there is none: it has no words.
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"The critic {str(source)!r} comes without a tokenizer. Pass `critic_processing_class`: the one it was "
            "trained with."
        )
    return tokenizer


def tokenize_prompts(
    tokenizer: Any, prompts: list, tools: list | None = None, template_kwargs: dict | None = None
) -> list[list[int]]:
    """
    Prompts as a critic reads them: messages in its chat template, with the generation prompt; text as it is.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The critic's.
        prompts (`list`):
            Of texts or of conversations.
        tools (`list`, *optional*):
            Those of the policy, shown by templates that know of tools.
        template_kwargs (`dict`, *optional*):
            Further arguments of the chat template.

    Returns:
        `list[list[int]]`: The tokens of each.

    Raises:
        ValueError: If the tokenizer has no chat template for a conversation, or finds no token in a prompt.
    """
    if is_conversational({"prompt": prompts[0]}):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"The prompts are conversations, but the critic's {type(tokenizer).__name__} has no chat template. Set "
                "its `chat_template` and pass it as `critic_processing_class`, or take a critic that has one."
            )
        ids = tokenizer.apply_chat_template(
            prompts,
            tools=tools or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(template_kwargs or {}),
        )["input_ids"]
    else:
        ids = tokenizer(text=prompts)["input_ids"]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise ValueError(
                f"The critic's {type(tokenizer).__name__} finds no token in a prompt, so there is no state to value. "
                f"The prompt: {str(prompt)[:200]!r}"
            )
    return ids


def pad_prompts(prompts: list[list[int]]) -> torch.Tensor:
    """Prompts as rows, padded on the left with -1, shape `(B, P)`."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in prompts]
    return pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side="left")


def read_prompts(network: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    """
    What a critic answers at the last token of each prompt.

    Args:
        network (`nn.Module`):
            A critic, wrapped or not.
        prompts (`torch.Tensor`):
            Of [`pad_prompts`], shape `(B, P)`.

    Returns:
        `torch.Tensor`: `(B,)`, float32, with gradient.
    """
    mask = prompts != PAD
    mask = mask[:, mask.any(0)]  # no columns of padding alone
    ids = prompts[:, -mask.shape[1] :].clamp(min=0)
    none = ids[:, :0]
    inputs = {"prompt_ids": ids, "prompt_mask": mask.long(), "completion_ids": none, "completion_mask": none}
    return read_values(network, inputs).squeeze(1)
