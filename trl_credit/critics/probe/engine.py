"""What runs a probe critic beside the policy: the same small head on every process, on the host."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ...credit.running_mean import RunningMean
from ...credit.trust import trust_sums, trust_weight
from ...saved import fitting, read_tensors
from ..critic import AcceleratedRunner
from .learner import ProbeLearner
from .network import ProbeNetwork


STATE_FILE = "probe_state.pt"
# Of so many entropies a quantile is as good as of all.
_ENOUGH_ENTROPIES = 1_000_000
# Rollouts whose changes of value are looked at.
_ROLLOUTS_OF_CHANGES = 5


class ProbeEngine(AcceleratedRunner):
    """
    A probe critic in a run, with the part of [`~trl_credit.critics.engine.CriticEngine`]'s interface that makes sense
    for it: nothing is wrapped or split, and all processes learn from the states of all.

    Args:
        learner ([`~trl_credit.critics.probe.learner.ProbeLearner`]):
            How it learns.
        accelerator (`Accelerator`):
            The run's.
    """

    def __init__(self, learner: ProbeLearner, accelerator: Accelerator):
        self.learner, self.accelerator = learner, accelerator
        self._changes: deque[torch.Tensor] = deque(maxlen=_ROLLOUTS_OF_CHANGES)  # and returns, see `trust_sums`

    @property
    def network(self) -> ProbeNetwork:
        """The head."""
        return self.learner.network

    @property
    def module(self) -> ProbeNetwork:
        """The same: it is not wrapped."""
        return self.learner.network

    @property
    def steps(self) -> int:
        """Updates so far."""
        return self.learner.steps

    @property
    def trust(self) -> float:
        """See [`~trl_credit.critics.probe.learner.ProbeLearner`]."""
        return self.learner.trust

    @property
    def trust_in_changes(self) -> float:
        """How far changes of its values can be leant on, in [0, 1]: the slope of the returns on them."""
        return trust_weight(torch.stack(list(self._changes))) if self._changes else 0.0

    @torch.no_grad()
    def evaluate(self, forward: Callable[[nn.Module], Any]) -> Any:
        """`forward(network)` without gradients."""
        return forward(self.network)

    def begin(self, total_steps: int) -> None:
        """Nothing is scheduled."""

    def move_threshold(self, entropy: torch.Tensor, mask: torch.Tensor, quantile: float) -> None:
        """
        Let the threshold of boundaries follow the entropies of a rollout. Every process must call this.

        Args:
            entropy, mask (`torch.Tensor`):
                Of this process, shape `(B, T)`.
            quantile (`float`):
                The quantile that it is the running mean of.
        """
        seen = self._of_all(entropy[mask].float().unsqueeze(1)).squeeze(1)
        if len(seen):
            sample = seen[:: 1 + len(seen) // _ENOUGH_ENTROPIES]
            mean = RunningMean(*self.network.threshold.tolist()).updated(torch.quantile(sample, quantile))
            self.network.threshold.copy_(torch.tensor(mean))

    def measure(self, values: torch.Tensor, returns: torch.Tensor) -> None:
        """Take note of how well the states of a rollout were predicted, shape `(M,)`. Every process must call this."""
        self.learner.measure(self._sums_of_all(values, returns))

    def measure_changes(self, changes: torch.Tensor, returns: torch.Tensor) -> None:
        """
        Take note of how the values of a rollout changed, and what came of it, shape `(M,)`. Every process must call
        this.
        """
        self._changes.append(self._sums_of_all(changes, returns).cpu())

    def _sums_of_all(self, values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
        sums = trust_sums(values, returns).to(self.accelerator.device)
        return self.accelerator.reduce(sums, reduction="sum")  # type: ignore[return-value]

    def learn(self, features: torch.Tensor, returns: torch.Tensor) -> float:
        """
        As [`~trl_credit.critics.probe.learner.ProbeLearner.learn`], from the states of all processes. Every one must
        call this.
        """
        states = self._of_all(torch.cat([features.float(), returns.cpu().float().unsqueeze(1)], dim=1))
        return self.learner.learn(states[:, :-1], states[:, -1])

    def _of_all(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, on the host; there may be another number of them on each."""
        if self.num_processes > 1:
            rows = rows.to(self.accelerator.device)
            rows = self.accelerator.pad_across_processes(rows, dim=0, pad_index=torch.nan)  # type: ignore[arg-type]
            rows = self.accelerator.gather(rows)
            rows = rows[~rows.isnan().any(1)]
        return rows.cpu()

    def save(self, folder: str | Path) -> None:
        """Save the head. Every process must call this."""
        if self.accelerator.is_main_process:
            self.network.save(folder)
        self.accelerator.wait_for_everyone()

    def save_state(self, folder: str | Path, **counters: int) -> None:
        """Save optimizer, buffer, trust and counters beside it. Every process must call this."""
        if self.accelerator.is_main_process:
            Path(folder).mkdir(parents=True, exist_ok=True)
            state = {"learner": self.learner.state_dict(), "changes": list(self._changes), "counters": counters}
            torch.save(state, Path(folder) / STATE_FILE)
        self.accelerator.wait_for_everyone()

    def load_state(self, folder: str | Path, network_folder: str | Path) -> dict[str, int]:
        """
        Continue where [`save_state`] left off.

        Args:
            folder (`str` or `Path`):
                That of [`save_state`].
            network_folder (`str` or `Path`):
                That of [`save`], which the state repeats.

        Returns:
            `dict`: The counters.
        """
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no state of a probe critic ({STATE_FILE}): the run cannot be resumed from it. It was "
                "saved with `save_only_model=True` or with another critic."
            )
        state = read_tensors(path)
        with fitting(str(path), "Resume with the options of a probe critic that the run began with."):
            self.learner.load_state_dict(state["learner"])
            self._changes.clear()
            self._changes.extend(state["changes"])
        return state["counters"]

    def go_back(self, folder: str | Path, network_folder: str | Path) -> None:
        """Restore the head and how it learns as [`save_state`] left them. The update count continues."""
        steps = self.steps
        self.load_state(folder, network_folder)
        self.learner.steps = steps
