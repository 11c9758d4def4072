"""TRL's language-model head, which never holds more logits than a tile, for networks beside the policy."""

import inspect
from contextlib import contextmanager
from typing import Any

import trl.trainer.utils as trl_utils
from accelerate.utils import is_peft_model
from torch import nn

from .versions import HAS_TILED_HEAD, INSTALLED


# Words of a tile on a CPU, where TRL folds it in a dozen tensors as large as itself.
_WORDS_ON_CPU = 2048
# Config fields by which an architecture changes its logits, other than those that TRL's head follows.
_UNKNOWN_TRANSFORMS = (
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logits_mup_width_multiplier",
    "unpadded_vocab_size",
)


@contextmanager
def tiled_lm_head(network: Any, temperature: float):
    """
    Inside, a network gives log-probabilities of tokens and no logits, at whatever level it is called.

    `network(..., shift_labels=tokens, fused_lm_head=True).log_probs` has the shape `(B, L)` of `tokens`: at each
    position the log-probability of that token as the next one, 0 where it is -100. Neither the forward nor the backward
    pass holds the logits of more than a tile.

    Args:
        network (`PreTrainedModel` or `PeftModel`):
            A causal LM, wrapped or not, that [`why_not_tiled`] has nothing against.
        temperature (`float`):
            Divides the logits.
    """
    model = _causal_lm(network)
    forward, words = vars(model).get("forward"), trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl_utils.add_fused_lm_head(model, temperature)
    if model.device.type == "cpu":
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = _WORDS_ON_CPU
    try:
        yield
    finally:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = words
        del model.forward
        if forward is not None:
            model.forward = forward


def why_not_tiled(network: Any) -> str | None:
    """
    What stands against [`tiled_lm_head`] for a network, in words, or `None`.

    Args:
        network (`PreTrainedModel` or `PeftModel`):
            A causal LM, wrapped or not.
    """
    if not HAS_TILED_HEAD:
        return f"trl {INSTALLED} has no head in tiles, 1.15 and later have"
    model = _causal_lm(network)
    name, head = type(model).__name__, model.get_output_embeddings()
    adapters = getattr(getattr(network, "module", network), "active_peft_config", None)
    if not inspect.unwrap(type(model).forward).__module__.startswith("transformers."):
        return f"what {name} does with its logits is not known"
    if adapters is not None and adapters.is_prompt_learning:
        return f"{adapters.peft_type.value} puts tokens of its own in front"
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return f"its language-model head is a {type(head).__name__}"
    if {id(child) for child in model.children()} != {id(model.base_model), id(head)}:
        return f"{name} is more than a backbone and a language-model head"
    config = model.config.get_text_config()
    fields = [field for field in _UNKNOWN_TRANSFORMS if getattr(config, field, None) is not None]
    return f"{name} changes its logits by `{fields[0]}`" if fields else None


def _causal_lm(network: Any) -> Any:
    """The `PreTrainedModel` inside."""
    network = getattr(network, "module", network)
    return network.get_base_model() if is_peft_model(network) else network
