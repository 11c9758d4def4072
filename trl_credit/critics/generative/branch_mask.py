"""Attention of branches that share a prefix, and which networks can take it."""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model


FLEX_BLOCK = 128  # tokens of a block of FlexAttention
_MASK_ROWS = 512  # of a dense mask that are made at a time


def sees(branch: torch.Tensor, position: torch.Tensor, cut: torch.Tensor) -> Callable[..., torch.Tensor]:
    """
    Which token attends to which, as a `mask_mod` of FlexAttention.

    A token attends to its own branch up to itself, and to the prefix up to where its branch leaves it. The order of the
    tokens in the row does not matter.

    Args:
        branch (`torch.Tensor`):
            0 for the prefix, -1 for padding, else the number of the branch, shape `(B, L)`.
        position (`torch.Tensor`):
            Position of each token in its own text, shape `(B, L)`.
        cut (`torch.Tensor`):
            For each token of a branch, how many tokens of the prefix come before it; 0 for all others. Shape `(B, L)`.

    Returns:
        `Callable`: `(row, head, query, key) -> bool`, of indices that broadcast.
    """

    def mask_mod(row, head, query, key):
        own = (branch[row, query] == branch[row, key]) & (position[row, key] <= position[row, query])
        prefix = (branch[row, key] == 0) & (position[row, key] < cut[row, query])
        return own | prefix

    return mask_mod


def dense_mask(branch: torch.Tensor, position: torch.Tensor, cut: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    The mask of [`sees`] as numbers that are added to attention scores: 0, or the lowest of `dtype`. Making it takes
    little memory beyond its own.

    Returns:
        `torch.Tensor`: Shape `(B, 1, L, L)`.
    """
    (batch, length), device = branch.shape, branch.device
    rows = torch.arange(batch, device=device)[:, None, None]
    tokens = torch.arange(length, device=device)
    mask_mod = sees(branch, position, cut)
    mask = torch.zeros(batch, length, length, dtype=dtype, device=device)
    for queries, part in zip(tokens.split(_MASK_ROWS), mask.split(_MASK_ROWS, dim=1), strict=True):
        part.masked_fill_(~mask_mod(rows, None, queries[:, None], tokens), torch.finfo(dtype).min)
    return mask.unsqueeze(1)


def block_mask(branch: torch.Tensor, position: torch.Tensor, cut: torch.Tensor):
    """
    The mask of [`sees`] for FlexAttention, which skips blocks without any attention and holds no L × L numbers.

    Returns:
        `~torch.nn.attention.flex_attention.BlockMask`: Of shape `(B, 1, L, L)`; L is a multiple of 128.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = branch.shape
    # Compiled, it never holds an L × L tensor; that takes a compiler, and is worth its time on GPUs only.
    compiled = branch.device.type == "cuda"
    return create_block_mask(
        sees(branch, position, cut), batch, None, length, length, branch.device, FLEX_BLOCK, _compile=compiled
    )


def attention_of(network: Any) -> str:
    """Name of the attention implementation of a network, wrapped or not."""
    return base_of(network).config.get_text_config()._attn_implementation


def takes_flex_attention(network: Any) -> bool:
    """Whether a network can be switched to FlexAttention."""
    base = base_of(network)
    return bool(base._supports_flex_attn) and base._can_set_attn_implementation()


@contextmanager
def attending(network: Any, implementation: str | None):
    """
    Around passes of a network, forward and backward, with an attention implementation.

    Args:
        network (`PreTrainedModel` or `PeftModel`):
            The network, wrapped or not.
        implementation (`str`, *optional*):
            Its name. Default: the network's.
    """
    base, kept = base_of(network), attention_of(network)
    base.set_attn_implementation(implementation or kept)
    try:
        yield
    finally:
        base.set_attn_implementation(kept)


def refuse_unpackable(network: Any) -> None:
    """
    Raise if a network cannot read branches that share a prefix as it would read each text by itself.

    Args:
        network (`PreTrainedModel` or `PeftModel`):
            A causal LM, wrapped or not.

    Raises:
        ValueError: By name and reason: an attention implementation that takes no such mask, layers that are no full
            attention (sliding windows, chunks, convolutions, linear attention, state spaces), a `forward` without
            `position_ids` or `logits_to_keep`, or prompt learning.
    """
    base = base_of(network)
    config = base.config.get_text_config()
    reason = None
    parameters = inspect.signature(inspect.unwrap(type(base).forward)).parameters
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()} - {"full_attention"}
    if attention_of(network) not in ("sdpa", "eager", "flex_attention"):
        reason = (
            f"`attn_implementation={attention_of(network)!r}` takes no such mask; load it with 'sdpa' or "
            "'flex_attention'"
        )
    elif kinds:
        reason = f"it has layers of {', '.join(sorted(kinds))}"
    elif not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None):
        reason = f"its attention has a sliding window of {config.sliding_window} tokens"
    elif missing := {"position_ids", "logits_to_keep"} - set(parameters):
        reason = f"its forward takes no {' and no '.join(sorted(missing))}"
    elif learned := prompt_learning_of(network):
        reason = f"{learned} puts tokens of its own in front"
    if reason:
        raise ValueError(
            f"The critic ({type(base).__name__}) cannot be trained on all answers about a completion in one sequence: "
            f"{reason}. Train it on each answer by itself (`critic_packing=False`)."
        )


def prompt_learning_of(network: Any) -> str | None:
    """Name of the method of adapters that are tokens, not weights; `None` if a network has none of these."""
    adapters = getattr(_unwrapped(network), "active_peft_config", None)
    return adapters.peft_type.value if adapters is not None and adapters.is_prompt_learning else None


def _unwrapped(network: Any) -> Any:
    """What DDP or DeepSpeed wraps."""
    return getattr(network, "module", network)


def base_of(network: Any) -> Any:
    """The `PreTrainedModel` inside, wrapped or not, with adapters or without."""
    network = _unwrapped(network)
    return network.get_base_model() if is_peft_model(network) else network
