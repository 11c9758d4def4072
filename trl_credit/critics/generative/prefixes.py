"""Generation in which what the states of a completion share is read once, with transformers."""

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .branch_mask import base_of, prompt_learning_of
from .packed import CriticQuery


@dataclass(frozen=True)
class StatePrompt:
    """
    What a generative critic reads to value one state.

    Args:
        query ([`~trl_credit.critics.generative.packed.CriticQuery`]):
            What it is asked about the completion.
        state (`int`):
            Which of the states.
    """

    query: CriticQuery
    state: int

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return self.query.shared_ids[: self.shared] + self.query.tail_ids

    @property
    def shared(self) -> int:
        """How many of them, the first ones, are also in the prompts of the later states."""
        return self.query.cuts[self.state]

    def __len__(self) -> int:
        return self.shared + len(self.query.tail_ids)


def tokens_read(prompts: Sequence[StatePrompt], once: bool) -> int:
    """
    Tokens that the critic reads before it answers.

    Args:
        prompts (`Sequence[StatePrompt]`):
            All that it is asked.
        once (`bool`):
            Whether it reads once what the states of a completion share.
    """
    if not once:
        return sum(map(len, prompts))
    prefixes = {id(prompt.query): 0 for prompt in prompts}
    for prompt in prompts:
        prefixes[id(prompt.query)] = max(prefixes[id(prompt.query)], prompt.shared)
    return sum(prefixes.values()) + sum(len(prompt.query.tail_ids) for prompt in prompts)


def keeps_prefixes(network: Any) -> bool:
    """
    Whether what a network has read can be cut off at any token, to go on from there: not where layers keep a window or
    a running state instead of all keys and values.

    Args:
        network (`PreTrainedModel` or `PeftModel`):
            A causal LM.
    """
    base = base_of(network)
    takes = inspect.signature(inspect.unwrap(type(base).forward)).parameters
    if base._is_stateful or prompt_learning_of(network) or "logits_to_keep" not in takes:
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=base.config).layers)


class Prefixes:
    """
    Keys and values of what the states of completions share, each read once and kept while states need it.

    Args:
        network (`PreTrainedModel` or `PeftModel`):
            One that [`keeps_prefixes`].
        prompts (`Sequence[StatePrompt]`):
            All that the critic is asked.
        chunks (`list[list[int]]`):
            Indices of the prompts that are answered together.
        pad (`int`):
            The token of the padding.
        synced (`bool`, *optional*, defaults to `False`):
            Whether weights are split over processes: each then makes one forward pass for each chunk.
    """

    def __init__(self, network: Any, prompts: Sequence[StatePrompt], chunks: list[list[int]], pad: int, synced=False):
        self.network, self.prompts, self.pad, self.synced = network, prompts, pad, synced
        self._chunks_left = Counter(query for chunk in chunks for query in {self._name(index) for index in chunk})
        self._lengths: dict[int, int] = {}
        for index, prompt in enumerate(prompts):
            self._lengths[self._name(index)] = max(self._lengths.get(self._name(index), 0), prompt.shared)
        self._kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def of(self, chunk: list[int]) -> DynamicCache | None:
        """
        Keys and values of the prompts of a chunk up to their tails, in the columns that they have when prompts are
        padded on the left. `None` if there are none.
        """
        self._read({self._name(index): self.prompts[index].query for index in chunk})
        width = max((len(self.prompts[index]) for index in chunk), default=0)
        # The columns behind are read anew in all rows: as many as the longest tail has.
        columns = width - max((len(self.prompts[index].query.tail_ids) for index in chunk), default=0)
        cache = self._gathered(chunk, width, columns) if columns > 0 else None
        for query in {self._name(index) for index in chunk}:
            self._chunks_left[query] -= 1
            if not self._chunks_left[query]:
                del self._kept[query]
        return cache

    def _name(self, index: int) -> int:
        return id(self.prompts[index].query)

    def _read(self, queries: dict[int, CriticQuery]) -> None:
        """One forward pass over the prefixes that have not been read."""
        unread = {name: query for name, query in queries.items() if name not in self._kept}
        new = {name: query.shared_ids[: self._lengths[name]] for name, query in unread.items()}
        if not new and not self.synced:
            return
        texts = list(new.values()) or [[]]
        width = max(1, *map(len, texts))
        padded = [text + [self.pad] * (width - len(text)) for text in texts]  # on the right, where no token sees it
        ids = torch.tensor(padded, device=self.network.device)
        cache = DynamicCache(config=base_of(self.network).config)
        self.network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for row, (name, text) in enumerate(new.items()):
            self._kept[name] = [(keys[row, :, : len(text)], values[row, :, : len(text)]) for keys, values, *_ in cache]

    def _gathered(self, chunk: list[int], width: int, columns: int) -> DynamicCache:
        cache = DynamicCache(config=base_of(self.network).config)
        kept = [self._kept[self._name(index)] for index in chunk]
        # Tokens of each row in these columns, behind its padding.
        counts = [max(columns - (width - len(self.prompts[index])), 0) for index in chunk]
        for number in range(len(cache.layers)):
            keys, values = (
                _side_by_side([layers[number][part] for layers in kept], counts, columns) for part in (0, 1)
            )
            cache.update(keys, values, number)
        return cache


def _side_by_side(rows: list[torch.Tensor], counts: list[int], columns: int) -> torch.Tensor:
    """The first tokens of rows of shape `(heads, tokens, width)`, so many of each, padded on the left."""
    batch = rows[0].new_zeros(len(rows), rows[0].shape[0], columns, rows[0].shape[2])
    for place, row, count in zip(batch, rows, counts, strict=True):
        place[:, columns - count :] = row[:, :count]
    return batch
