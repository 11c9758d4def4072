"""What a model's `config.json` says about its size; no weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """
    Numbers of a causal language model that memory and time depend on.

    Args:
        parameters (`int`):
            All of them, tied ones once.
        layers, hidden, heads, kv_heads, head_dim, vocab (`int`):
            As in its config.
        intermediate (`int`):
            Width of its feed-forward layer; of a mixture of experts, of all the experts that a token visits.
        tied (`bool`):
            Whether embeddings and language-model head are one matrix.
        attention (`int`):
            Parameters of its attention, those that `critic_freeze=["attention"]` spares.
        linear (`tuple[tuple[int, int], ...]`):
            Inputs and outputs of each linear layer below the head: those that have adapters.
    """

    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    attention: int
    linear: tuple[tuple[int, int], ...]

    @property
    def embeddings(self) -> int:
        """Parameters of the embeddings, which are as many as those of the head."""
        return self.vocab * self.hidden

    @property
    def value_model(self) -> int:
        """Parameters of a value model made from it: a number for each token in the place of the head."""
        return self.parameters - (0 if self.tied else self.embeddings) + self.hidden + 1

    @property
    def largest_matrix(self) -> int:
        """Parameters of the largest matrix."""
        return max(self.embeddings, *(inputs * outputs for inputs, outputs in self.linear))

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters on all linear layers below the head."""
        return rank * sum(inputs + outputs for inputs, outputs in self.linear)


def read_config(model: str) -> PreTrainedConfig:
    """
    The config of a model.

    Args:
        model (`str`):
            A folder with a `config.json`, such a file, or a Hub id.

    Raises:
        ValueError: If it cannot be had; a Hub id needs the Hub or its cache.
    """
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        what = (
            "has no config.json that can be read"
            if Path(model).exists()
            else "is no file or folder here, and its config could not be had from the Hub"
        )
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{model!r} {what}. Give a folder with a config.json, or such a file. ({reason})") from error


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """
    The shape of the causal language model that a config describes. The model is made without memory for its weights.

    Raises:
        ValueError: If it is none of text alone.
    """
    if config.get_text_config() is not config:
        raise ValueError(f"A {type(config).__name__} is of a model that reads more than text, which is not planned.")
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # without memory each has got its own
    head = model.get_output_embeddings()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=_width_of_feed_forward(config),
        vocab=config.vocab_size,
        tied=head.weight is model.get_input_embeddings().weight,
        attention=sum(p.numel() for module in attention for p in module.parameters()),
        linear=tuple(
            (module.in_features, module.out_features)
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not head
        ),
    )


def _width_of_feed_forward(config: Any) -> int:
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        return experts * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    return getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
