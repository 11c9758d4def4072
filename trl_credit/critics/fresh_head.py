"""Where a head starts that has not learned anything."""

from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from .token import head_of


def trained_head(network: nn.Module) -> dict[str, Any]:
    """The trained parameters of a critic's head, by their names in the critic."""
    head = {id(parameter) for parameter in head_of(network).parameters()}
    return {name: p for name, p in network.named_parameters() if id(p) in head and p.requires_grad}


def answers_everywhere(network: nn.Module, value: float) -> bool:
    """
    Whether a critic gives every state this value: its head is zero, and has the value for its bias, or none. Every
    process must call this; the main one decides, for FSDP2 may have the weights there alone.
    """
    (answer,) = broadcast_object_list([_answers_here(network, value)])
    return answer


def _answers_here(network: nn.Module, value: float) -> bool:
    parameters = list(trained_head(network).values())
    if any(hasattr(p, "ds_id") for p in parameters):  # split by ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return _answers_everywhere(parameters, value)
    return _answers_everywhere(parameters, value)


def _answers_everywhere(parameters: list[torch.Tensor], value: float) -> bool:
    if any(p.is_meta for p in parameters):
        return False
    wanted = [torch.full_like(p, value if p.dim() == 1 else 0.0) for p in parameters]
    return all(torch.equal(p.detach(), other) for p, other in zip(parameters, wanted, strict=True))
