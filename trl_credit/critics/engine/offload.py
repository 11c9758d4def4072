"""A critic whose weights and optimizer state are on the host while it is not its turn."""

from contextlib import contextmanager

import torch
from torch import nn


class Offload:
    """
    Keeps a network and its optimizer's state on the host, and copies them to the device for each turn. On one process.

    Outside of a turn they can be saved, loaded and changed in place, on the host.

    Args:
        network (`nn.Module`):
            The network, on its device; its buffers stay there.
        optimizer (`torch.optim.Optimizer`):
            Its optimizer.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer):
        self.network, self.optimizer = network, optimizer
        self.device = next(network.parameters()).device
        for weight in network.parameters():
            weight.data = weight.data.to("cpu")

    @contextmanager
    def turn(self, updates: bool):
        """
        Around passes of the network.

        Args:
            updates (`bool`):
                Whether the optimizer steps: then its state is there, too, and what has changed is kept.
        """
        weights = [(weight, weight.data) for weight in self.network.parameters()]
        for weight, host in weights:
            weight.data = host.to(self.device, copy=True)
        states = self._states() if updates else {}
        for (state, name), host in states.values():
            state[name] = host.to(self.device, copy=True)
        try:
            yield
        finally:
            for weight, host in weights:
                if updates and weight.requires_grad:
                    host.copy_(weight.data)
                weight.data = host
            for key, ((state, name), value) in (self._states() if updates else {}).items():
                # New ones come with the first step.
                state[name] = states[key][1].copy_(value) if key in states else value.to("cpu")

    def _states(self) -> dict[tuple, tuple[tuple[dict, str], torch.Tensor]]:
        """Where each tensor of the optimizer's state is, and the tensor; numbers stay where they are."""
        return {
            (weight, name): ((state, name), value)
            for weight, state in self.optimizer.state.items()
            for name, value in state.items()
            if torch.is_tensor(value) and value.dim() > 0
        }
