"""The network of a probe critic: a small head, and what it has to know of its features."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file

from ...saved import reading


WEIGHTS_FILE = "probe.safetensors"


class ProbeNetwork(nn.Module):
    r"""
    Bounded values of states, \\( V = \sigma(\cdot) \\) within the range of the rewards, from their features.

    Args:
        feature_size (`int`):
            F, the features of a state.
        hidden_size (`int`, *optional*, defaults to `32`):
            Width of the one hidden layer; 0 for a linear head.
        reward_range (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            Lowest and highest reward that there is.
        length (`int`, *optional*, defaults to `1024`):
            Most tokens of a completion, in which positions are measured.
        seed (`int`, *optional*, defaults to `0`):
            Of the hidden layer's weights. The last layer starts at 0.

    Example:

    ```python
    >>> network = ProbeNetwork(feature_size=8)
    >>> values = network.values(features)  # (M, 8) -> (M,)
    ```
    """

    shift: torch.Tensor
    scale: torch.Tensor
    begun: torch.Tensor
    threshold: torch.Tensor
    length: torch.Tensor
    reward_range: torch.Tensor

    def __init__(
        self,
        feature_size: int,
        hidden_size: int = 32,
        reward_range: tuple[float, float] = (0.0, 1.0),
        length: int = 1024,
        seed: int = 0,
    ):
        super().__init__()
        low, high = reward_range
        if not low < high:
            raise ValueError(f"`reward_range` must be two numbers, the lower one first, got {reward_range}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            if hidden_size:
                layers += [nn.Linear(feature_size, hidden_size), nn.Tanh()]
            last = nn.Linear(hidden_size or feature_size, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(*layers, last).float()
        self.register_buffer("shift", torch.zeros(feature_size))
        self.register_buffer("scale", torch.ones(feature_size))
        self.register_buffer("begun", torch.tensor(False))
        # Running mean of the entropies at which a state is asked about, see `RunningMean`.
        self.register_buffer("threshold", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("length", torch.tensor(length))
        self.register_buffer("reward_range", torch.tensor([low, high], dtype=torch.float64))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of the values, shape `(M,)`, from features of shape `(M, F)`."""
        return self.head(self.scaled(features)).squeeze(-1)

    def scaled(self, features: torch.Tensor) -> torch.Tensor:
        """Features as the head takes them, float32 of the same shape."""
        return (features.float() - self.shift) / self.scale

    @torch.no_grad()
    def values(self, features: torch.Tensor) -> torch.Tensor:
        """Values within the range of the rewards, shape `(M,)`, float32, where the features are."""
        low, high = self.reward_range.tolist()
        fraction = torch.sigmoid(self(features.to(self.shift.device)))
        return (low + (high - low) * fraction).to(features.device)

    @torch.no_grad()
    def begin(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """
        Start at the mean target, and with features of one size. Nothing happens to a network that has begun.

        Args:
            features (`torch.Tensor`):
                Of the first rollout, shape `(M, F)`.
            targets (`torch.Tensor`):
                In [0, 1], shape `(M,)`.
        """
        if self.begun:
            return
        features = features.to(self.shift).float()
        # A feature that does not vary yet may do so later, on a scale that is not known.
        spread = features.std(0, correction=0)
        self.shift.copy_(features.mean(0))
        self.scale.copy_(torch.where(spread > 1e-6, spread, 1.0))
        last: Any = self.head[-1]
        last.bias.fill_(torch.logit(targets.mean().cpu().clamp(0.01, 0.99)).item())
        self.begun.fill_(True)

    def save(self, folder: str | Path) -> None:
        """Write `probe.safetensors`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, Path(folder) / WEIGHTS_FILE)

    @classmethod
    def load(cls, source: str | Path) -> "ProbeNetwork":
        """
        A network that was saved.

        Args:
            source (`str` or `Path`):
                A folder or Hub id.
        """
        path = Path(str(cached_file(str(source), WEIGHTS_FILE)))
        with reading(path):
            weights = load_file(path)
        is_deep = "head.2.weight" in weights
        hidden_size = len(weights["head.0.weight"]) if is_deep else 0
        low, high = weights["reward_range"].tolist()
        network = cls(len(weights["shift"]), hidden_size, (low, high))
        network.load_state_dict(weights)
        return network
