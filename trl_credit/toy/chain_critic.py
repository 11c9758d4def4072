"""
A generative critic for the quickstart's task: what it is asked, what it reads with, and the oracle that it learns from.

Asked `0.23|3+4*2-1=3+8-1=|`, with the actor's success rate, the problem and the chain so far, it answers
`1-1=0|3+8-1=1-1=0|00+<score>8</score>`: the chain's last line worked to its end, then the problem without a fault,
whether both end in the same digit, and a score.
"""

import random
import re
from pathlib import Path

import torch
from transformers import Qwen2Tokenizer

from ..trainers.genac.traces.oracle import State
from .task import ALPHABET, solve
from .tiny_model import load


TEMPLATE = "{success_rate}|{problem}{partial_solution}|"
TEMPLATE_WITHOUT_HINT = "|{problem}{partial_solution}|"
_LINE = re.compile(r"\d(?:[-+*]\d)*")


def trace(state: State) -> str:
    """
    What the oracle writes: it works out the last line of the chain and the problem, and if both end in the same digit,
    the chain is still right.

    It knows the task and not the actor, so that its scores are a guess: 0 to 2 for a chain that is wrong, and for one
    that is right from 8 to 10 when no operation is left, two less for each that is.
    """
    problem = state.problem.rstrip("=")
    solution = solve(problem)
    line = (state.partial_solution.rstrip("=") or problem).split("=")[-1]
    if not _LINE.fullmatch(line):
        return f"|{solution}|-<score>0</score>"
    rest = solve(line) or line
    ends = rest[-1] + solution[-1]
    left = len(line) // 2  # operations
    sign, guess = ("+", max(9 - 2 * left, 1)) if ends[0] == ends[1] else ("-", 1)
    score = guess + random.Random(state.query).randint(-1, 1)
    return f"{rest}|{solution}|{ends}{sign}<score>{score}</score>"


def segment_lines(token_ids, tokenizer, trainable=None) -> list[int]:
    """A [`~trl_credit.segmenting.Segmenter`] of chains: each line, with its `=`, is a segment."""
    equals = tokenizer.convert_tokens_to_ids("=")
    ends = [end for end, token in enumerate(token_ids, start=1) if token == equals]
    return sorted({*ends, len(token_ids)} - {0})


def save_start(actor: str | Path, folder: str | Path) -> None:
    """Save what the critic starts from: the actor, with a few more tokens that it has to learn."""
    model, _ = load(actor)
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> Qwen2Tokenizer:
    """The actor's tokens with their ids, then those of the template and the score."""
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    symbols = [*ALPHABET, "<|endoftext|>", "<|im_end|>", "|", "."]
    tokenizer = Qwen2Tokenizer(
        {symbol: i for i, symbol in enumerate(symbols)}, merges=[], padding_side="left", **special
    )
    tokenizer.add_tokens(["<score>", "</score>"])
    return tokenizer
