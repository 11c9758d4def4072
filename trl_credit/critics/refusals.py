"""What a critic cannot be given: images, tokens of another vocabulary, a checkpoint without values."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoTokenizer


# By how much embeddings of a family may differ in their rows: those are padded to multiples of up to this.
_PADDING_OF_EMBEDDINGS = 1024
_IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes", "spatial_shapes")


def refuse_image_columns(dataset: Any) -> None:
    """Raise if a dataset has images, which a text critic would not see."""
    found = {"image", "images"} & set(getattr(dataset, "column_names", None) or ())
    if found:
        raise ValueError(
            f"The dataset has the columns {sorted(found)}, which the critic cannot take: it reads text only. Train "
            "vision-language models with `GRPOTrainer` or `GRPOLambdaTrainer`, or take the columns out."
        )


def refuse_images(inputs: dict) -> None:
    """Raise if a rollout has inputs that a text critic would not see."""
    found = [name for name in _IMAGE_INPUTS if name in inputs]
    if found:
        raise ValueError(
            f"The rollout has {found}, which the critic cannot take: it reads text only. Train vision-language models "
            "with `GRPOTrainer` or `GRPOLambdaTrainer`."
        )


def refuse_causal_lm(path: str) -> None:
    """Raise for a checkpoint that has no value head and would be given an untrained one."""
    if (Path(path) / "adapter_config.json").is_file():
        return
    architectures = AutoConfig.from_pretrained(path).architectures or []
    if any(name.endswith("ForCausalLM") for name in architectures):
        raise ValueError(f"{path} is a causal LM ({architectures[0]}), which has no values: give a critic.")


def refuse_other_vocabulary(network: Any, source: Any, policy: Any, tokenizer) -> None:
    """
    Raise if a critic that reads the policy's tokens does not know them.

    Args:
        network (`PreTrainedModel` or `PeftModel`):
            The critic.
        source (`str`, `Path` or `PreTrainedModel`):
            What it was made of; a folder or Hub id may have a tokenizer, which must then have the policy's vocabulary.
        policy (`PreTrainedModel` or `PeftModel`):
            The policy.
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's.
    """
    known, used = (x.get_input_embeddings().weight for x in (network, policy))
    known, used = (getattr(weight, "ds_shape", weight.shape)[0] for weight in (known, used))
    # Models of a family pad their embeddings to different sizes.
    if not len(tokenizer) <= known <= max(used, len(tokenizer)) + _PADDING_OF_EMBEDDINGS:
        raise ValueError(
            f"The critic {_called(source)} knows {known} tokens, the policy {used} and its tokenizer {len(tokenizer)}: "
            "it would be given tokens that it has not learned. Give a critic of the policy's family, or one "
            "of prompts with a tokenizer of its own (`critic_processing_class`); or, if the policy's embeddings were "
            "resized, resize the critic's as well."
        )
    if isinstance(source, (str, Path)) and has_other_vocabulary(str(source), tokenizer):
        raise ValueError(
            f"The critic {_called(source)} has another vocabulary than the policy, whose tokens it would be given. "
            "Give a critic of the policy's family."
        )


def has_other_vocabulary(path: str, tokenizer) -> bool:
    """Whether the tokenizer that was saved with a critic knows other tokens; `False` if there is none."""
    try:
        own = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):  # none was saved with it
        return False
    if len(own) <= len(own.all_special_ids):  # for some architectures one is made up where there is none
        return False
    return own.get_vocab() != tokenizer.get_vocab()


def _called(source: Any) -> str:
    return f"of a {type(source).__name__}" if isinstance(source, nn.Module) else repr(str(source))
