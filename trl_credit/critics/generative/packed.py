"""Log-probabilities of answers about the prefixes of a text, in sequences that hold each prefix once.

A generative critic answers about every state of a completion. The prompts of these states are prefixes of each other,
up to a short tail. Read one by one, a completion of T tokens costs about T² / (2 · segment length) of them. Here a row
holds the shared text once, and for each answer a branch: the tail and the answer, which attend to the shared text up to
where the state is, at the positions that they would have behind it. Log-probabilities and gradients are the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...seam.lm_head import tiled_lm_head, why_not_tiled
from .branch_mask import FLEX_BLOCK, attention_of, block_mask, dense_mask


@dataclass(frozen=True)
class CriticQuery:
    """
    What a generative critic reads to value the states of one completion, as tokens of the critic.

    The prompt of state k is `shared_ids[:cuts[k]] + tail_ids`, so the prompts of a completion share what they have in
    common by construction.

    Args:
        shared_ids (`list[int]`):
            All that comes before the partial solution, then all segments but the last, which no state has read.
        cuts (`list[int]`):
            For each of K states where its partial solution ends in `shared_ids`; that of the first is empty.
        tail_ids (`list[int]`):
            What follows the partial solution: the end of the template and the start of the critic's turn.

    Raises:
        ValueError: If `tail_ids` is empty: the first token of an answer would be chosen at a token that others share.
    """

    shared_ids: list[int]
    cuts: list[int]
    tail_ids: list[int]

    def __post_init__(self):
        """Refuse a query without a tail."""
        if not self.tail_ids:
            raise ValueError("Something must follow the partial solution in what the critic reads, if only a newline.")

    def prompts(self) -> list[list[int]]:
        """The K prompts."""
        return [self.shared_ids[:cut] + self.tail_ids for cut in self.cuts]


@dataclass(frozen=True)
class Row:
    """
    One sequence: the text that some states of a completion share, and a branch for the answer about each of them.

    Args:
        index (`int`):
            Which of the queries it belongs to.
        query ([`CriticQuery`]):
            The query.
        states (`list[int]`):
            States of the query, increasing.
        answers (`list[list[int]]`):
            Tokens of the answer about each of `states`, at least one.
    """

    index: int
    query: CriticQuery
    states: list[int]
    answers: list[list[int]]

    @property
    def prefix(self) -> int:
        """Tokens that the branches share."""
        return self.query.cuts[self.states[-1]]

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answers, which are those with a log-probability."""
        return sum(map(len, self.answers))

    def __len__(self) -> int:
        """Tokens that the network reads: all but the last of each answer."""
        return self.prefix + sum(_branch_length(self.query, answer) for answer in self.answers)

    def layout(self) -> list[tuple[int, int, int, int]]:
        """
        Token, branch, position and cut (see [`~trl_credit.critics.generative.branch_mask.sees`]) of each token.

        The tokens at which those of the answers are chosen come last, in the order of the answers, so that the
        language-model head has one stretch to read.
        """
        tail = self.query.tail_ids
        prefix = [(token, 0, place, 0) for place, token in enumerate(self.query.shared_ids[: self.prefix])]
        tails, chosen = [], []
        for branch, (state, answer) in enumerate(zip(self.states, self.answers, strict=True), start=1):
            cut = self.query.cuts[state]
            tokens = [(token, branch, cut + i, cut) for i, token in enumerate(tail + answer[:-1])]
            tails += tokens[: len(tail) - 1]
            chosen += tokens[len(tail) - 1 :]
        return prefix + tails + chosen


def plan_rows(
    queries: Sequence[CriticQuery],
    answers: Sequence[Sequence[list[int]]],
    max_tokens: int,
    packed: bool = True,
    mask_bytes: int | None = None,
    itemsize: int = 4,
) -> list[list[Row]]:
    """
    Put answers in rows, and rows in micro-batches.

    A completion has as few rows as limits allow, as each row repeats the text up to its last state.

    Args:
        queries (`Sequence[CriticQuery]`):
            One per completion.
        answers (`Sequence[Sequence[list[int]]]`):
            For each of them the answers about its K states; an empty one is left out.
        max_tokens (`int`):
            Tokens of a micro-batch, padding included. A branch that is longer with its prefix has one of its own.
        packed (`bool`, *optional*, defaults to `True`):
            `False` gives each answer a row of its own, which holds its whole prompt.
        mask_bytes (`int`, *optional*):
            Memory for the dense mask of a micro-batch, which is quadratic in the length of its rows. `None`: there is
            none, as with FlexAttention.
        itemsize (`int`, *optional*, defaults to `4`):
            Bytes of a number of that mask.

    Returns:
        `list[list[Row]]`: Micro-batches, the longest rows first.
    """
    longest = max_tokens
    if mask_bytes is not None:
        longest = min(longest, math.isqrt(mask_bytes // itemsize))
    rows = []
    for index, (query, own) in enumerate(zip(queries, answers, strict=True)):
        if len(own) != len(query.cuts):
            raise ValueError(f"Query {index} has {len(query.cuts)} states and {len(own)} answers.")
        for states in _groups(query, own, longest if packed else 0):
            rows.append(Row(index, query, states, [list(own[state]) for state in states]))

    batches: list[list[Row]] = []
    for row in sorted(rows, key=len, reverse=True):
        if batches:
            number, width = len(batches[-1]) + 1, len(batches[-1][0])
            fits = number * width <= max_tokens
            if fits and mask_bytes is not None and any(len(other.states) > 1 for other in [*batches[-1], row]):
                fits = number * width**2 * itemsize <= mask_bytes
        if batches and fits:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def answer_log_probs(network: Any, rows: Sequence[Row], temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of the answers in a micro-batch, in one forward pass. The logits are computed in tiles wherever
    the network allows it, else those of all answers are in memory at once.

    Rows of one branch each need no mask but that of their padding. For others the network must be one that
    [`~trl_credit.critics.generative.branch_mask.refuse_unpackable`] accepts.

    Args:
        network (`PreTrainedModel` or `PeftModel`):
            A causal LM, wrapped or not.
        rows (`Sequence[Row]`):
            A micro-batch of [`plan_rows`]. If empty, the network is still run, for processes that wait for each other.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities of shape `(N, A)`, float32, with gradient, 0 at padding,
        and which of them are tokens. The N answers are in order of rows and then of states, A is the longest one.
    """
    device = next(network.parameters()).device
    layouts = [row.layout() for row in rows] or [[(0, 0, 0, 0)]]
    width = max(map(len, layouts))
    branched = any(len(row.states) > 1 for row in rows)
    flex = attention_of(network) == "flex_attention"
    if branched:  # fused attention wants masks aligned in memory
        width += -width % (FLEX_BLOCK if flex else 8)
    # On the left, so that the answers of all rows end together.
    padded = [[(0, -1, 0, 0)] * (width - len(layout)) + layout for layout in layouts]
    ids, branch, position, cut = torch.tensor(padded, device=device).permute(2, 0, 1).contiguous()
    if not branched:
        mask = (branch >= 0).long()
    elif flex:
        mask = block_mask(branch, position, cut)
    else:
        mask = dense_mask(branch, position, cut, _computing_dtype(network, device))
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}

    answers = [answer for row in rows for answer in row.answers]
    tokens = torch.tensor([token for answer in answers for token in answer], dtype=torch.long, device=device)
    counts = torch.tensor([row.answer_tokens for row in rows] or [0], device=device)
    chosen = torch.arange(width, device=device) >= width - counts.unsqueeze(1)
    if why_not_tiled(network) is None:
        labels = torch.full_like(ids, -100).masked_scatter(chosen, tokens)
        with tiled_lm_head(network, temperature):
            log_probs = network(**inputs, shift_labels=labels, fused_lm_head=True).log_probs[chosen]
    else:
        kept = max(int(counts.max()), 1)
        logits = network(**inputs, logits_to_keep=kept, use_cache=False).logits
        logits = logits[chosen[:, -kept:]].float() / temperature
        log_probs = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)

    lengths = torch.tensor([len(answer) for answer in answers], dtype=torch.long, device=device)
    present = torch.arange(max(map(len, answers), default=0), device=device) < lengths.unsqueeze(1)
    return log_probs.new_zeros(present.shape).masked_scatter(present, log_probs), present


def _branch_length(query: CriticQuery, answer: Sequence[int]) -> int:
    return len(query.tail_ids) + len(answer) - 1


def _groups(query: CriticQuery, answers: Sequence[Sequence[int]], longest: int) -> list[list[int]]:
    """
    States of each row. From the last state backwards a row takes what fits: each costs its last state's prefix, so the
    fullest rows belong to the longest prefixes.
    """
    groups: list[list[int]] = []
    room = -1
    for state in reversed(range(len(answers))):
        if not answers[state]:
            continue
        length = _branch_length(query, answers[state])
        if length > room:
            groups.append([])
            room = longest - query.cuts[state]
        groups[-1].insert(0, state)
        room -= length
    return groups


def _computing_dtype(network: Any, device: torch.device) -> torch.dtype:
    """That of attention scores: a mask of another one is copied in every layer."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
