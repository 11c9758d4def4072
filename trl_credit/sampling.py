"""What a generative critic writes, sampled with transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig


def chunks_within(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """
    Indices of sequences in chunks for which `longest · number` stays within a budget, the longest first.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each sequence, those to come included.
        budget (`int`):
            Tokens of a chunk, padding included. A sequence that is longer has a chunk of its own.
    """
    chunks: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room == 0:
            chunks.append([])
            room = max(budget // max(lengths[index], 1), 1)
        chunks[-1].append(index)
        room -= 1
    return chunks


@torch.no_grad()
def sample_answers(
    network: Any, prompts: list[list[int]], config: GenerationConfig, chunks: list[list[int]], synced: bool = False
) -> list[list[int]]:
    """
    Sample one answer to each prompt.

    Args:
        network (`PreTrainedModel` or `PeftModel`):
            A causal LM, in evaluation mode.
        prompts (`list[list[int]]`):
            Token ids.
        config (`~transformers.GenerationConfig`):
            How to sample, `pad_token_id` and `eos_token_id` (a list) included.
        chunks (`list[list[int]]`):
            Indices of the prompts that are generated together. An empty chunk takes part in the forward passes of
            other processes, and no more.
        synced (`bool`, *optional*, defaults to `False`):
            Whether weights are split over processes, which must then make as many forward passes each.

    Returns:
        `list[list[int]]`: Token ids of the answers, up to and with the first end of sequence.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    ends = set(config.eos_token_id)  # type: ignore[arg-type]
    for chunk in chunks:
        texts = [prompts[index] for index in chunk] or [[config.pad_token_id]]
        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), config.pad_token_id)  # type: ignore[arg-type]
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, longest - len(text) :] = torch.tensor(text)
            mask[row, longest - len(text) :] = 1
        written = network.generate(
            input_ids=ids.to(network.device),
            attention_mask=mask.to(network.device),
            generation_config=config,
            synced_gpus=synced,
        )[:, longest:].tolist()
        for index, tokens in zip(chunk, written, strict=False):
            length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
            answers[index] = tokens[:length]
    return answers
