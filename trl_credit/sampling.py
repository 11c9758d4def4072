"""Continuations of texts, sampled with transformers: padded, generated and cut at their end."""

from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, GenerationConfig


def chunks_within(lengths: Sequence[int], budget: int, families: Sequence[int] | None = None) -> list[list[int]]:
    """
    Indices of sequences in chunks for which `longest · number` stays within a budget, the longest first.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each sequence, those to come included.
        budget (`int`):
            Tokens of a chunk, padding included. A sequence that is longer has a chunk of its own.
        families (`Sequence[int]`, *optional*):
            Which sequences belong together: they are in one chunk, or in chunks that follow each other. Default: none.
    """
    families = range(len(lengths)) if families is None else families
    longest: dict[int, int] = {}
    for family, length in zip(families, lengths, strict=True):
        longest[family] = max(length, longest.get(family, 0))
    chunks: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-longest[families[i]], families[i], -lengths[i])):
        width = max(width, lengths[index])
        if not chunks or width * (len(chunks[-1]) + 1) > budget:
            chunks.append([])
            width = lengths[index]
        chunks[-1].append(index)
    return [sorted(chunk, key=lambda i: (-lengths[i], i)) for chunk in chunks]


@contextmanager
def checkpoint_settings_aside(network: Any):
    """
    Around `generate`: what its config leaves out it would take from the checkpoint, such as `min_p`, `suppress_tokens`
    or `repetition_penalty`, and draw from another distribution than the one that is learned or measured.

    Args:
        network (`PreTrainedModel` or `PeftModel`):
            A causal LM.
    """
    holders = [network, network.get_base_model()] if hasattr(network, "get_base_model") else [network]
    kept = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, kept, strict=True):
            holder.generation_config = config


@torch.no_grad()
def sample_continuations(
    network: Any,
    prompts: Sequence[list[int]],
    room: Sequence[int],
    ends: Iterable[int],
    pad: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    chunks: list[list[int]] | None = None,
    synced: bool = False,
    read: Callable[[list[int]], Cache | None] | None = None,
) -> list[list[int]]:
    """
    Sample one continuation of each prompt.

    Args:
        network (`PreTrainedModel` or `PeftModel`):
            A causal LM, in evaluation mode.
        prompts (`Sequence[list[int]]`):
            Token ids.
        room (`Sequence[int]`):
            Most tokens of each continuation.
        ends (`Iterable[int]`):
            Tokens that end one.
        pad (`int`):
            The token of the padding.
        temperature, top_p, top_k (*optional*):
            How tokens are drawn: by default from the whole distribution.
        chunks (`list[list[int]]`, *optional*):
            Indices of the prompts that are generated together. An empty chunk takes part in the forward passes of other
            processes, and no more. Default: all together.
        synced (`bool`, *optional*, defaults to `False`):
            Whether weights are split over processes, which must then make as many forward passes each.
        read (`Callable`, *optional*):
            From a chunk to the keys and values of what the network has read of it: of the first columns of its prompts,
            padded on the left. Default: it has read nothing.

    Returns:
        `list[list[int]]`: Token ids of the continuations, up to and with the first end.
    """
    ends = set(ends)
    continuations: list[list[int]] = [[] for _ in prompts]
    for chunk in [list(range(len(prompts)))] if chunks is None else chunks:
        texts = [prompts[index] for index in chunk] or [[pad]]
        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), pad)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, longest - len(text) :] = torch.tensor(text)
            mask[row, longest - len(text) :] = 1
        config = GenerationConfig(
            max_new_tokens=max((room[index] for index in chunk), default=max(room, default=1)),
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
            disable_compile=True,
        )
        with checkpoint_settings_aside(network):
            written = network.generate(
                input_ids=ids.to(network.device),
                attention_mask=mask.to(network.device),
                generation_config=config,
                synced_gpus=synced,
                past_key_values=None if read is None else read(chunk),
            )[:, longest:].tolist()
        for index, tokens in zip(chunk, written, strict=False):
            continuations[index] = up_to_end(tokens[: room[index]], ends)
    return continuations


def up_to_end(tokens: list[int], ends: Container[int]) -> list[int]:
    """Tokens up to and with the first that ends them."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length]
