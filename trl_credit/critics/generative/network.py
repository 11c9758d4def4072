"""A critic that writes its values down: a causal language model, plain to save and to load."""

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..adapters import with_new_adapters, with_saved_adapters
from ..token import refuse_kwargs_of_a_model, turn_dropout_off


def make_generative_critic(
    source: str | Path | PreTrainedModel,
    peft_config: Any = None,
    model_init_kwargs: dict | None = None,
    copy_model: bool = False,
) -> nn.Module:
    """
    Make a generative critic out of a checkpoint or a model. All dropout is off: what is trained is what was sampled.

    Args:
        source (`str`, `Path` or `PreTrainedModel`):
            A folder or Hub id of a causal LM, or of the adapter of a LoRA critic; or a causal LM in memory.
        peft_config (`~peft.PeftConfig`, *optional*):
            Train adapters instead of all weights.
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained`; `dtype` defaults to `"float32"`.
        copy_model (`bool`, *optional*, defaults to `False`):
            Copy the weights of a model in memory, which otherwise is used as it is.

    Returns:
        `nn.Module`: The critic, a `PreTrainedModel` or a `PeftModel`.
    """
    kwargs = {"dtype": "float32", **(model_init_kwargs or {})}
    network: Any
    if isinstance(source, PreTrainedModel):
        if not copy_model and model_init_kwargs:
            raise ValueError(
                f"`critic_model_init_kwargs={model_init_kwargs}` has no effect on a critic that is already a model "
                f"({type(source).__name__}). Pass a path or a Hub id, or drop the kwargs."
            )
        network = _from_model(source, copy_model, refuse_kwargs_of_a_model(source, model_init_kwargs))
    elif (Path(source) / "adapter_config.json").is_file():
        network = _from_adapter(source, peft_config, kwargs)
        peft_config = None
    else:
        network = AutoModelForCausalLM.from_pretrained(str(source), **kwargs)
    turn_dropout_off(network)
    if peft_config is not None:
        network = with_new_adapters(network, peft_config, "CAUSAL_LM")
    return network


def _from_model(source: PreTrainedModel, copy_model: bool, dtype: Any = None) -> PreTrainedModel:
    if source.get_output_embeddings() is None:
        raise ValueError(f"A generative critic writes text, which a {type(source).__name__} cannot: pass a causal LM.")
    if not copy_model:
        return source
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"With ZeRO-3 the weights of a {type(source).__name__} in memory are already split over the processes and "
            "cannot be copied into a critic. Pass `critic` as a path or a Hub id."
        )
    network = AutoModelForCausalLM.from_config(copy.deepcopy(source.config), dtype=dtype or source.dtype)
    missing, _ = network.load_state_dict(source.state_dict(), strict=False)
    if missing:
        raise ValueError(f"A {type(source).__name__} lacks weights of a {type(network).__name__}: {missing[:5]}.")
    network.name_or_path = source.name_or_path
    return network


def _from_adapter(source: str | Path, peft_config: Any, kwargs: dict) -> nn.Module:
    from peft import PeftConfig

    base = str(PeftConfig.from_pretrained(str(source)).base_model_name_or_path)
    network = AutoModelForCausalLM.from_pretrained(base, **kwargs)
    return with_saved_adapters(network, source, peft_config)
