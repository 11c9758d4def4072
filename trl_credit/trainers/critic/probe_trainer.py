from typing import Any

import torch

from ...critics.facts import PROBE, CriticFacts
from ...segmenting import Segmenter
from .critic_trainer import CriticTrainer
from .probe import Probe
from .probe_config import ProbeConfig


class ProbeTrainer(CriticTrainer):
    """A trainer with a critic beside the policy, or a probe critic on what the reference makes of its rollouts."""

    args: ProbeConfig
    config_class: type[ProbeConfig] = ProbeConfig
    _probe: Probe | None = None

    def __init__(self, *args, segmenter: Segmenter | None = None, **kwargs):
        self._segmenter = segmenter
        super().__init__(*args, **kwargs)

    @property
    def of_critic(self) -> Any:
        return self._probe or self

    def kind_of(self, critic: Any, facts: CriticFacts | None) -> str:
        is_probe = critic == PROBE or (facts is not None and facts.kind == PROBE)
        self.args.check_probe(is_probe)
        if self._segmenter is not None and not (is_probe and self.args.probe_boundaries == "segments"):
            raise ValueError(
                "`segmenter` has no effect: it is for a probe critic (`critic='probe'`) with "
                "`probe_boundaries='segments'`. Drop it."
            )
        if not is_probe:
            return super().kind_of(critic, facts)
        self._probe = Probe(self, self._segmenter)
        return PROBE

    def critic_options(self) -> list[str]:
        own = self.args.options_of_probe()
        return [name for name in super().critic_options() if name not in own]

    # --- What a probe critic does more

    def measure(self, values: torch.Tensor, returns: torch.Tensor, counted: torch.Tensor, mode: str) -> None:
        """
        Take note of how well a rollout was valued.

        Args:
            values, returns, counted (`torch.Tensor`):
                Values, Monte-Carlo returns and which of them count, of one shape.
            mode (`str`):
                `"train"` or `"eval"`: an evaluation changes nothing.
        """

    def lean(self, advantages: torch.Tensor, rewards: torch.Tensor, rollout: dict, mode: str) -> torch.Tensor:
        """
        The critic's advantages, as far as it is leant on.

        Args:
            advantages (`torch.Tensor`):
                Shape `(B, T)`.
            rewards (`torch.Tensor`):
                Shape `(B,)`, NaN for none.
            rollout (`dict`):
                TRL's, with the group's `advantages`.
            mode (`str`):
                `"train"` or `"eval"`.
        """
        return advantages

    def learn(self, rollout: dict, targets: torch.Tensor, steps: torch.Tensor, mode: str) -> None:
        """
        Learn from a rollout as soon as its credit is known. A network beside the policy does so when the policy steps.

        Args:
            rollout (`dict`):
                The rollout.
            targets, steps (`torch.Tensor`):
                What the critic should have said, and where, shape `(B, T)`.
            mode (`str`):
                `"train"` or `"eval"`: an evaluation changes nothing.
        """
