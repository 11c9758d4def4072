"""Bytes of the cache that transformers generates with."""

from .activations import Precision
from .setup import Setup
from .shape import ModelShape
from .training import BFLOAT16, FLOAT32


def cache_bytes(shape: ModelShape, precision: Precision, tokens: int) -> float:
    """
    Keys and values of `tokens` tokens in all layers. Under autocast the rotary embedding leaves keys in float32.

    Args:
        shape ([`~trl_credit.planner.shape.ModelShape`]):
            The network.
        precision ([`~trl_credit.planner.activations.Precision`]):
            Its numbers.
        tokens (`int`):
            Prompts and completions, padding included.
    """
    key = FLOAT32 if precision.is_autocast else precision.compute
    return tokens * shape.layers * shape.kv_heads * shape.head_dim * (key + precision.compute)


def step_logits_bytes(rows: int, vocab: int) -> float:
    """Logits of the next token of each row, in float32, and the probabilities made of them."""
    return 2 * FLOAT32 * rows * vocab


def gathered_for_generation(setup: Setup, shape: ModelShape) -> float:
    """Weights that ZeRO-3 and FSDP2 gather as a whole, in order to generate."""
    return BFLOAT16 * shape.parameters if setup.split in ("zero3", "fsdp2") else 0.0
