"""A critic on the policy's frozen base: its own adapters and head, and one set of base weights in memory.

The critic is a network like any LoRA critic, except that the parameters under its adapters *are* the policy's, the same
objects. The policy's modules do not know about it: the policy's names and adapters, and what is merged, saved or sent
to vLLM, are the same as without a critic.
"""

import copy
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel

from .backbone import new_token_classifier
from .token import add_saved_adapters, finish_token_critic, head_of


# Other initialisations take a part of the base away, of which there is only one.
_INITS_THAT_SPARE_THE_BASE = (True, False, "gaussian", "orthogonal")


def make_shared_base_critic(
    policy: Any,
    source: str | Path | None = None,
    initial_value: float = 0.0,
    peft_config=None,
) -> nn.Module:
    """
    Make a critic out of the frozen weights of a policy with adapters.

    Args:
        policy (`~peft.PeftModel`):
            The policy, which is not changed.
        source (`str` or `Path`, *optional*):
            Folder with the adapters and the head of an earlier critic on the same base. Default: fresh ones, so that
            every value is `initial_value` until the first update.
        initial_value (`float`, *optional*, defaults to `0.0`):
            What a fresh head answers everywhere.
        peft_config (`~peft.LoraConfig`, *optional*):
            Adapters of a fresh critic. Default: those of the policy, without dropout.

    Returns:
        `~peft.PeftModel`: The critic. It saves and loads like any critic with adapters, see
        [`~trl_credit.critics.token.make_token_critic`].

    Raises:
        ValueError: If the policy has no adapters, or its base is not frozen, is quantized, lies on several devices or
            was changed when the adapters were made; if `source` holds no adapters of this base; if `peft_config` would
            change the base.
    """
    if not is_peft_model(policy):
        raise ValueError(
            f"`critic_share_base=True` needs a policy with adapters on a frozen base, got a {type(policy).__name__}. "
            "Pass the trainer a `peft_config`, or a `PeftModel`."
        )
    policy_config = policy.peft_config[policy.active_adapter]
    _refuse_changed_base(policy_config, "The policy's adapters")
    if source is not None:
        if initial_value:
            raise ValueError(
                f"The critic {str(source)!r} has a head that has learned already, which cannot start at "
                f"`critic_initial_value` (an output of {initial_value:g}). Leave that option out."
            )
        _refuse_other_base(source, policy.get_base_model())
        return add_saved_adapters(_borrow(policy), source, peft_config)
    network = _borrow(policy)
    peft_config = _without_extras(policy_config) if peft_config is None else peft_config
    _refuse_unfit(peft_config)
    return finish_token_critic(network, initial_value, peft_config)


def _borrow(policy: Any) -> PreTrainedModel:
    """A model for token classification of the policy's own parameters, with a head that has no values yet."""
    base = policy.get_base_model()
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            "`critic_share_base=True` cannot share a quantized base. Load the policy in bfloat16 or float32, or give "
            "the critic a network of its own with `critic_peft_config`."
        )
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    with init_empty_weights(include_buffers=False):
        network = new_token_classifier(config, base.dtype)
    head = head_of(network)
    head.to_empty(device=base.device)
    own = {id(p) for p in head.parameters()}
    lent = {_name_without_adapters(name): p for name, p in base.named_parameters(remove_duplicate=False)}
    lent |= {_name_without_adapters(name): b for name, b in base.named_buffers(remove_duplicate=False)}
    wanted = [name for name, p in network.named_parameters() if id(p) not in own]
    lacking = [name for name in wanted if name not in lent]
    if lacking:
        raise ValueError(f"A {type(base).__name__} lacks weights of a {type(network).__name__}: {lacking[:5]}.")
    trained = [name for name in wanted if lent[name].requires_grad]
    if trained:
        raise ValueError(
            f"`critic_share_base=True` needs a frozen base, but the policy trains {trained[:5]} of it. Use a LoRA "
            "config with `bias='none'`."
        )
    devices = sorted({str(lent[name].device) for name in wanted})
    if len(devices) > 1:
        raise ValueError(f"`critic_share_base=True` needs a base on one device, got {devices}. Load the policy on one.")
    for name in wanted + [name for name, _ in network.named_buffers() if name in lent]:
        module, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(module), leaf, lent[name])
    network.name_or_path = base.name_or_path
    return network


def _name_without_adapters(name: str) -> str:
    """PEFT moves what it adapts to `base_layer`, and what it copies to `original_module`."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _without_extras(policy_config):
    """The policy's adapters as a critic can have them."""
    peft_config = copy.deepcopy(policy_config)
    peft_config.inference_mode = False
    for name, none in (("lora_dropout", 0.0), ("modules_to_save", None), ("trainable_token_indices", None)):
        if hasattr(peft_config, name):
            setattr(peft_config, name, none)
    return peft_config


def _refuse_unfit(peft_config) -> None:
    from peft import LoraConfig

    if not isinstance(peft_config, LoraConfig):
        raise TypeError(
            f"`critic_share_base=True` needs a `peft.LoraConfig` for the critic, got {type(peft_config).__name__}. "
            "Pass one as `critic_peft_config`."
        )
    if peft_config.bias != "none":
        raise ValueError(
            f"`critic_peft_config` has bias={peft_config.bias!r}, which would train biases that the critic shares with "
            "the policy. Set it to 'none'."
        )
    _refuse_changed_base(peft_config, "`critic_peft_config`")


def _refuse_changed_base(peft_config, whose: str) -> None:
    init = getattr(peft_config, "init_lora_weights", True)
    if init not in _INITS_THAT_SPARE_THE_BASE:
        raise ValueError(
            f"{whose}: init_lora_weights={init!r} changes the base weights, which `critic_share_base=True` shares. "
            f"Use one of {_INITS_THAT_SPARE_THE_BASE}."
        )


def _refuse_other_base(source, base: PreTrainedModel) -> None:
    from peft import PeftConfig

    if isinstance(source, nn.Module) or not (Path(source) / "adapter_config.json").is_file():
        given = f"a {type(source).__name__}" if isinstance(source, nn.Module) else repr(str(source))
        raise ValueError(
            "With `critic_share_base=True` the critic can start from the policy's base (give no `critic`) or from a "
            f"local folder with the adapters of an earlier critic, got {given}."
        )
    trained_on = PeftConfig.from_pretrained(source).base_model_name_or_path
    if trained_on != base.name_or_path:
        raise ValueError(
            f"The critic {str(source)!r} has adapters for {trained_on!r}, but the policy's base, which "
            f"`critic_share_base=True` shares, is {base.name_or_path!r}."
        )
