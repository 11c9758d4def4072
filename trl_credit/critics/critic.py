"""The contract of critics: what every critic provides, and what runs its network."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn


# In a rollout, its prompts as they are in the dataset, texts or conversations, one per completion.
PROMPTS = "prompts"
# And the rows themselves, for critics that are told more than the policy.
ROWS = "rows"


class Runner(Protocol):
    """
    What runs a critic's network: a [`~trl_credit.critics.engine.CriticEngine`] in a run that trains it, a
    [`LocalRunner`] elsewhere.
    """

    network: Any

    @property
    def num_processes(self) -> int:
        """Processes that evaluate it together."""
        ...

    @property
    def process_index(self) -> int:
        """Which of them this is."""
        ...

    def evaluate(self, forward: Callable[[nn.Module], Any]) -> Any:
        """`forward(network)` without gradients. Every process must call it equally often."""
        ...

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of all processes, of one shape on each, along its first dimension."""
        ...


class LocalRunner:
    """
    A network on its own, on one process.

    Args:
        network (`nn.Module`):
            The network, on its device.
    """

    num_processes, process_index = 1, 0

    def __init__(self, network: nn.Module):
        self.network: Any = network.eval()

    @torch.no_grad()
    def evaluate(self, forward: Callable[[nn.Module], Any]) -> Any:
        """`forward(network)` without gradients."""
        return forward(self.network)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return x


class AcceleratedRunner:
    """The processes of a run, for what runs a network on them. Subclasses have the network, and evaluate it."""

    accelerator: Accelerator

    @property
    def num_processes(self) -> int:
        """See [`Runner`]."""
        return self.accelerator.num_processes

    @property
    def process_index(self) -> int:
        """See [`Runner`]."""
        return self.accelerator.process_index

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of all processes, of one shape on each, along its first dimension."""
        return self.accelerator.gather(x)  # type: ignore[return-value]


class Critic:
    """
    The base of every kind of critic: [`~trl_credit.critics.token.TokenCritic`],
    [`~trl_credit.critics.prompt.PromptCritic`] or [`~trl_credit.critics.generative.critic.GenerativeCritic`]. Trainers,
    the report on critics and [`~trl_credit.critic_report.CriticProbeCallback`] all ask it in the same way.

    Args:
        network (`nn.Module` or [`Runner`]):
            The network, on its device, or what runs it.
        name (`str`):
            What it is called in a report.

    `parse_rate` is the share of the latest answers that could be read; NaN for a critic that gives numbers.
    """

    kind: ClassVar[str]
    parse_rate: float = float("nan")
    # Completions of a report that are read at a time, those of a length together; `None` for all of them.
    batch_size: int | None = None

    def __init__(self, network: nn.Module | Runner, name: str):
        self.runner: Runner = LocalRunner(network) if isinstance(network, nn.Module) else network
        self.name = name

    @property
    def network(self) -> Any:
        """The network, not wrapped."""
        return self.runner.network

    def state_values(self, rollout: dict) -> torch.Tensor:
        """
        Values of all states of a rollout. Every process must call it, with equally many completions.

        Args:
            rollout (`dict`):
                `prompt_ids`, `prompt_mask` of shape `(B, P)`, padded on the left; `completion_ids`, `completion_mask`
                of shape `(B, T)`, padded on the right; `tool_mask` of the same shape if tools wrote some of the tokens;
                `prompts`, the B prompts as they are in the dataset, and `rows`, its rows, for a critic that reads
                other columns too; and, to tell a critic that values only a few states which ones, `cuts`: for each
                completion, in rising order, the numbers of tokens after which they lie.

        Returns:
            `torch.Tensor`: `(B, T + 1)`, float32, without gradient. Column t is the state in which token t is chosen;
            for a completion of l tokens, column l is the state after its last one. NaN where the critic has no answer:
            beyond the completion, in states that leave no room for an answer, and where its answer could not be read.
        """
        raise NotImplementedError

    def own_prompts(self, rollout: dict) -> dict[str, torch.Tensor]:
        """
        `prompt_ids` and `prompt_mask` of what it reads in the place of the policy's prompts; empty if it reads those.

        Args:
            rollout (`dict`):
                As in [`state_values`].
        """
        return {}

    def values(self, rollouts: Sequence[Any]) -> list[np.ndarray]:
        """
        Values of all states of completions given as lists, as in a report.

        Args:
            rollouts (`Sequence[Rollout]`):
                Each with `prompt`, `row`, `prompt_ids`, `completion_ids` and `cuts`, see
                [`~trl_credit.critic_report.Rollout`].

        Returns:
            `list[np.ndarray]`: Of shape `(T + 1,)` each, as in [`state_values`].
        """
        device = next(self.network.parameters()).device
        order = list(range(len(rollouts)))
        size = self.batch_size or len(order)
        if size < len(order):  # those of a length together, for little padding
            order.sort(key=lambda i: len(rollouts[i].prompt_ids) + len(rollouts[i].completion_ids))
        found: list[Any] = [None] * len(order)
        for at in range(0, len(order), size):
            rows = order[at : at + size]
            values = self.state_values(as_rollout([rollouts[row] for row in rows], device))
            for row, line in zip(rows, values.double().cpu().numpy(), strict=True):
                found[row] = line[: len(rollouts[row].completion_ids) + 1]
        return found


def as_rollout(rollouts: Sequence[Any], device: Any = None) -> dict:
    """
    Completions given as lists, in the form that [`Critic.state_values`] takes.

    Args:
        rollouts (`Sequence[Rollout]`):
            Each with `prompt`, `row`, `prompt_ids`, `completion_ids` and `cuts`.
        device (*optional*):
            Where the tensors go.
    """
    width = max(len(rollout.prompt_ids) for rollout in rollouts)
    length = max(len(rollout.completion_ids) for rollout in rollouts)
    batch: dict[str, list] = {"prompt_ids": [], "prompt_mask": [], "completion_ids": [], "completion_mask": []}
    for rollout in rollouts:
        left, right = width - len(rollout.prompt_ids), length - len(rollout.completion_ids)
        batch["prompt_ids"].append([0] * left + rollout.prompt_ids)
        batch["prompt_mask"].append([0] * left + [1] * len(rollout.prompt_ids))
        batch["completion_ids"].append(rollout.completion_ids + [0] * right)
        batch["completion_mask"].append([1] * len(rollout.completion_ids) + [0] * right)
    return {
        **{name: torch.tensor(rows, device=device) for name, rows in batch.items()},
        PROMPTS: [rollout.prompt for rollout in rollouts],
        ROWS: [rollout.row for rollout in rollouts],
        "cuts": [list(rollout.cuts) for rollout in rollouts],
    }


def nan_beyond_the_end(values: torch.Tensor, rollout: dict) -> torch.Tensor:
    """Values of shape `(B, T + 1)` with NaN in the columns after a completion's last state."""
    columns = torch.arange(values.shape[1], device=values.device)
    return torch.where(columns > rollout["completion_mask"].sum(1, keepdim=True), torch.nan, values)


def on_device(network: nn.Module) -> nn.Module:
    """On the GPU if there is one."""
    return network.to("cuda" if torch.cuda.is_available() else "cpu")
