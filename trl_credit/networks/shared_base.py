"""A critic that is a second adapter and a head on the policy's frozen base: one set of base weights in memory."""

import copy
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.modeling_outputs import TokenClassifierOutput

from .token_critic import Float32Head


ADAPTER = "critic"


class SharedBaseCritic(nn.Module):
    """
    The critic's adapter and head. It reads the base's last hidden states, and only within [`active`] has its adapter
    the place of the policy's.

    Args:
        policy (`~peft.PeftModel`):
            The policy, a causal LM with LoRA adapters.
        peft_config (`~peft.LoraConfig`):
            The critic's adapter.
        initial_value (`float`, *optional*, defaults to `0.0`):
            What the fresh head answers everywhere.
    """

    def __init__(self, policy: Any, peft_config: Any, initial_value: float = 0.0):
        from peft import LoraConfig

        super().__init__()
        if not isinstance(peft_config, LoraConfig) or peft_config.modules_to_save or peft_config.lora_dropout:
            raise ValueError(
                "`critic_share_base` needs a `LoraConfig` without `modules_to_save` and dropout for the critic, got "
                f"{peft_config}."
            )
        self._policy = (policy,)  # in a tuple: the critic's parameters are its own only
        peft_config = copy.deepcopy(peft_config)
        peft_config.inference_mode = False
        policy.add_adapter(ADAPTER, peft_config)
        adapters = [p for name, p in policy.named_parameters() if f".{ADAPTER}." in name]
        for parameter in adapters:  # until the policy's optimizer and DDP have been made of what requires a gradient
            parameter.requires_grad_(False)
        self.adapters = nn.ParameterList(adapters)
        self.score = Float32Head(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, initial_value)
        self.score.to(adapters[0].device)

    @property
    def policy(self) -> Any:
        return self._policy[0]

    @property
    def peft_config(self):
        return self.policy.peft_config

    def make_trainable(self) -> None:
        """To be called when the policy's optimizer and DDP have been made."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    @contextmanager
    def active(self):
        """Around forward and backward of the critic: gradient checkpointing goes forward again in the latter."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self.policy.modules() if isinstance(module, BaseTunerLayer)]
        kept = [layer._active_adapter for layer in layers]
        for layer in layers:
            layer._active_adapter = [ADAPTER]
        try:
            yield
        finally:
            for layer, adapters in zip(layers, kept, strict=True):
                layer._active_adapter = adapters

    @contextmanager
    def hidden(self):
        """Around the saving of the policy: it saves no other adapters than its own."""
        own = [name for name in self.policy.peft_config if name != ADAPTER]
        self.policy.save_pretrained = partial(self.policy.save_pretrained, selected_adapters=own)
        try:
            yield
        finally:
            del self.policy.save_pretrained

    def forward(self, input_ids, attention_mask=None, position_ids=None) -> TokenClassifierOutput:
        base = self.policy.get_base_model().base_model
        states = base(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return TokenClassifierOutput(logits=self.score(states))

    def save_pretrained(self, folder, state_dict: dict | None = None) -> None:
        """As a token-classification adapter with its head, which loads on a base of its own."""
        from peft import TaskType, get_peft_model_state_dict
        from safetensors.torch import save_file

        weights = get_peft_model_state_dict(self.policy, adapter_name=ADAPTER)
        weights |= {f"base_model.model.score.{name}": p.detach() for name, p in self.score.named_parameters()}
        config = copy.deepcopy(self.policy.peft_config[ADAPTER])
        config.task_type, config.modules_to_save, config.inference_mode = TaskType.TOKEN_CLS, ["score"], True
        config.base_model_name_or_path = self.policy.get_base_model().config.name_or_path
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(
            {name: weight.detach().cpu().contiguous() for name, weight in weights.items()},
            Path(folder) / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config.save_pretrained(folder)


def share_base(policy: Any, accelerator, peft_config, initial_value: float) -> SharedBaseCritic:
    """
    A [`SharedBaseCritic`] on a policy, or an error that says why there can be none.

    Args:
        policy (`nn.Module`):
            The policy; it must have adapters.
        accelerator (`Accelerator`):
            The run's accelerator: one process, or DDP.
        peft_config (`~peft.PeftConfig` or `None`):
            The critic's adapter; by default one like the policy's.
        initial_value (`float`):
            What the fresh head answers everywhere.
    """
    from accelerate.utils import DistributedType, is_peft_model

    if not is_peft_model(policy):
        raise ValueError(
            "`critic_share_base=True` needs a policy with adapters, whose base does not change: pass `peft_config`."
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ValueError(
            "`critic_share_base=True` works on one process and with DDP, not with "
            f"{accelerator.distributed_type.value}: there the base belongs to the policy's engine. Use "
            "`critic_peft_config` without it."
        )
    config = peft_config if peft_config is not None else policy.peft_config["default"]
    return SharedBaseCritic(policy, config, initial_value)
