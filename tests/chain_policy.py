"""
A policy whose values can be computed: a real language model without attention or MLP, a Markov chain over eight
symbols, and a reward of 1 if no `x` is among the tokens it writes.
"""

from pathlib import Path

import torch
from tiny import tiny_model, tiny_tokenizer


LETTERS = "abcdefx"
LENGTH = 10


def chain() -> torch.Tensor:
    """Logits of the next symbol, the last of which is EOS, given each letter."""
    logits = torch.randn(len(LETTERS), len(LETTERS) + 1, generator=torch.Generator().manual_seed(0))
    logits[:, LETTERS.index("x")] -= 0.5
    logits[LETTERS.index("a"), LETTERS.index("x")] += 2  # a dangerous state
    logits[LETTERS.index("b"), LETTERS.index("x")] -= 3  # a safe one
    return logits


def chain_policy_dir(path: Path) -> Path:
    """Saves it with its tokenizer."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    symbols = [*tokenizer(LETTERS)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.zero_()
        head.zero_()
        head[:, :8] = -100.0
        for i, symbol in enumerate(symbols[:-1]):
            embedding[symbol, i] = 1.0  # which the norm makes √16
            head[symbols, i] = chain()[i] / 4
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def true_values() -> torch.Tensor:
    """Probability of no `x` from here on, by tokens left and letter before: `(LENGTH + 1, letters)`."""
    probabilities = chain().double().softmax(-1)
    values = torch.ones(LENGTH + 1, len(LETTERS), dtype=torch.float64)
    for left in range(1, LENGTH + 1):
        following = torch.cat([values[left - 1], torch.ones(1, dtype=torch.float64)])  # after EOS nothing can go wrong
        following[LETTERS.index("x")] = 0
        values[left] = probabilities @ following
    return values


def no_x(completions, **kwargs):
    return [float("x" not in completion) for completion in completions]


def true_value(prompt: str, completion: str) -> float:
    """Of the state after a beginning of a completion that has not ended."""
    if "x" in completion:
        return 0.0
    return true_values()[LENGTH - len(completion), LETTERS.index((prompt + completion)[-1])].item()
