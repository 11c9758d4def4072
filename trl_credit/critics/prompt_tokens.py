"""What a critic reads in the place of the policy's prompt: its text, and its tokens."""

from string import Formatter
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import is_conversational

from .critic import PROMPTS, ROWS


# In a tensor of prompts, what is no token.
PAD = -1


def template_columns(template: str) -> list[str]:
    """
    The columns of the dataset that a template names.

    Raises:
        ValueError: If it is not a template of columns that has the prompt among them.
    """
    try:
        columns = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"`critic_prompt_template={template!r}` is no template: {error}.") from None
    if "prompt" not in columns or not all(name.isidentifier() for name in columns):
        raise ValueError(
            f"`critic_prompt_template={template!r}` must have {{prompt}} and names of columns in braces, got "
            f"{columns}. A brace that is text is written twice."
        )
    return columns


def critic_prompts(template: str | None, rollout: dict) -> list:
    """
    Prompts of a critic that may be told more than the policy: columns of the dataset, e.g. a reference answer.

    Args:
        template (`str`, *optional*):
            Text with the names of columns in braces, `{prompt}` among them, e.g. `"{prompt}\\n\\nAnswer: {solution}"`.
            In a conversation `{prompt}` is the content of the last message of the user, which the text replaces.
            `None`: the prompts as they are.
        rollout (`dict`):
            With its `prompts`, and for a template its `rows`, those of the dataset.

    Raises:
        ValueError: If a column is missing, or a conversation has no message of the user.
    """
    if template is None:
        return rollout[PROMPTS]
    columns = template_columns(template)
    texts: list = []
    for row in rollout[ROWS]:
        if missing := [name for name in columns if name not in row]:
            raise ValueError(f"`critic_prompt_template` names {missing}, and the dataset has {sorted(row)}.")
        prompt = row["prompt"]
        if isinstance(prompt, str):
            texts.append(template.format(**row))
            continue
        asked = [i for i, message in enumerate(prompt) if message["role"] == "user"]
        if not asked:
            raise ValueError(
                f"`critic_prompt_template` puts its text into the last message of the user, and a prompt has none. It "
                f"begins: {str(prompt)[:200]!r}"
            )
        last = prompt[asked[-1]]
        content = template.format(**{**row, "prompt": last["content"]})
        texts.append([*prompt[: asked[-1]], {**last, "content": content}, *prompt[asked[-1] + 1 :]])
    return texts


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
