"""Token classification for architectures that transformers has no class for: the text backbone with a linear head."""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForTokenClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING


class BackboneForTokenClassification(PreTrainedModel):
    """
    The backbone of a language model with a linear head. It saves and loads as any model of transformers does, its
    weights named as in a causal LM; [`token_classifier`] has the class for a config.

    Args:
        config (`PreTrainedConfig`):
            Of a text model.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = AutoModel.from_config(config)
        self.score = nn.Linear(config.hidden_size, int(config.num_labels or 1))
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """One output for each token, shape `(B, T, num_labels)`."""
        output = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        return TokenClassifierOutput(logits=self.score(output.last_hidden_state))


def token_classifier(config: PreTrainedConfig) -> Any:
    """
    The class of transformers for a config's token classification, or else a [`BackboneForTokenClassification`].

    Raises:
        ValueError: If the config is of a model that reads images or sound.
    """
    if type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return AutoModelForTokenClassification
    if config.get_text_config() is not config:
        raise ValueError(
            f"A {type(config).__name__} is of a model that reads more than text, which a critic cannot: give a "
            "`critic` of text, or train such a policy with `GRPOTrainer` or `GRPOLambdaTrainer`."
        )
    config_class: Any = type(config)
    return _backbone_class(config_class)


def new_token_classifier(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A network of [`token_classifier`] with weights that are yet to be filled in."""
    kind = token_classifier(config)
    if kind is AutoModelForTokenClassification:
        return kind.from_config(config, dtype=dtype)
    return kind._from_config(config, dtype=dtype)


@cache
def _backbone_class(config_class: type) -> type:
    # One per config, so that plain `from_pretrained` knows what to read.
    name = f"{config_class.__name__.removesuffix('Config')}BackboneForTokenClassification"
    return type(name, (BackboneForTokenClassification,), {"config_class": config_class, "__module__": __name__})
