"""Adapters of a critic, new ones and those of an earlier run."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def with_new_adapters(network: Any, peft_config: Any, task_type: str, without: Iterable[str] = ()) -> nn.Module:
    """
    A network with fresh adapters.

    Args:
        network (`PreTrainedModel`):
            The base, which stays as it is.
        peft_config (`~peft.PeftConfig`):
            Without dropout, which would make values noisy.
        task_type (`str`):
            A [`~peft.TaskType`].
        without (`Iterable[str]`, *optional*):
            Modules that get no adapter, unless `peft_config` names its own with a pattern.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"`critic_peft_config` must be a `peft.PeftConfig`, got {type(peft_config).__name__}.")
    if dropout := getattr(peft_config, "lora_dropout", 0):
        raise ValueError(
            f"`critic_peft_config` has lora_dropout={dropout}, but dropout would make values noisy: a "
            "critic is trained without. Set it to 0."
        )
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = task_type
    excluded = getattr(peft_config, "exclude_modules", None)
    if without and not isinstance(excluded, str):
        peft_config.exclude_modules = {*(excluded or ()), *without}
    return get_peft_model(network, peft_config, autocast_adapter_dtype=_are_float32())


def with_saved_adapters(network: Any, source: str | Path, peft_config: Any = None) -> nn.Module:
    """
    A network with the adapters of an earlier run, still trainable.

    Args:
        network (`PreTrainedModel`):
            The base of the adapters.
        source (`str` or `Path`):
            Folder of the adapters.
        peft_config (`~peft.PeftConfig`, *optional*):
            Must be `None`: the saved adapters have their own.
    """
    from peft import PeftModel

    if peft_config is not None:
        raise ValueError(f"The critic {str(source)!r} has adapters already: drop `critic_peft_config`.")
    return PeftModel.from_pretrained(network, str(source), is_trainable=True, autocast_adapter_dtype=_are_float32())


def _are_float32() -> bool:
    """Whether adapters are float32 whatever their base is: with ZeRO-3, which wants one dtype, they are not."""
    return not is_deepspeed_zero3_enabled()
