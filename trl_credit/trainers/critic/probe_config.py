from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ...critics.probe.critic import BOUNDARIES
from ...options import above, at_least, between, is_number, is_whole, one_of, such_that
from .critic_config import CriticConfig


MEASURED = "measured"
# Options of a critic that a probe critic has too. All others must be left at their defaults.
_OF_A_PROBE_TOO = {
    "critic_model_name_or_path",
    "critic_head_learning_rate",
    "critic_hub_model_id",
    "critic_lambda",
    "critic_trust",
}


def _are_layers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_whole, value))


A_LAYER_OR_MORE = such_that(_are_layers, "whole numbers, at least one")


def _is_trust(value: Any) -> bool:
    return value == MEASURED or (is_number(value) and 0 <= value <= 1)


@dataclass
class ProbeConfig(CriticConfig):
    r"""
    What all configurations share whose critic may be a probe critic, `critic="probe"`. For the other options of the
    critic, refer to [`~trl_credit.trainers.critic.CriticConfig`].

    Args:
        critic_trust (`float` or `str`, *optional*, defaults to `"measured"`):
            How far a probe critic is leant on: w in [0, 1] of A = (1 - w) (R - b) + w A_λ; `"measured"` for the slope
            of the rewards on its values in the latest rollouts, each valued before it was learnt from.
        probe_boundaries (`str`, *optional*, defaults to `"entropy"`):
            At which states a probe critic is asked: `"entropy"`, where the entropy of the reference is above the
            running mean of a quantile; `"segments"`, between the segments of the trainer's `segmenter`; `"turns"`,
            where the policy has its turn; `"tokens"`, everywhere.
        probe_boundary_quantile (`float`, *optional*, defaults to `0.5`):
            The quantile for `probe_boundaries="entropy"`, in [0, 1].
        probe_layers (`list[int]`, *optional*, defaults to `[0]`):
            Layers of the reference whose hidden states it reads: 0 is the embedding of the token before the state, -1
            what the LM head reads.
        probe_uncertainty (`bool`, *optional*, defaults to `True`):
            Let it read the log-probabilities of the token before the state and of all the policy's tokens so far, and
            the entropy at the state.
        probe_hidden_size (`int`, *optional*, defaults to `32`):
            Width of its one hidden layer; 0 for a linear head.
        probe_updates (`int`, *optional*, defaults to `32`):
            Its updates for each rollout.
        probe_batch_size (`int`, *optional*, defaults to `256`):
            States per update.
        probe_buffer_rollouts (`int`, *optional*, defaults to `16`):
            Latest rollouts that it learns from.
        probe_buffer_memory (`float`, *optional*, defaults to `0.125`):
            Maximum number of GiB on the host that their states take, in bfloat16, an equal share for each rollout.
    """

    critic_trust: str = field(  # or a number; the command line's parser cannot take both
        default=MEASURED, metadata=such_that(_is_trust, f"a number in [0, 1] or {MEASURED!r}")
    )
    probe_boundaries: str = field(default="entropy", metadata=one_of(*BOUNDARIES))
    probe_boundary_quantile: float = field(default=0.5, metadata=between(0, 1))
    probe_layers: list[int] = field(default_factory=lambda: [0], metadata=A_LAYER_OR_MORE)
    probe_uncertainty: bool = True
    probe_hidden_size: int = field(default=32, metadata=at_least(0))
    probe_updates: int = field(default=32, metadata=above(0))
    probe_batch_size: int = field(default=256, metadata=above(0))
    probe_buffer_rollouts: int = field(default=16, metadata=above(0))
    probe_buffer_memory: float = field(default=0.125, metadata=above(0))

    def __post_init__(self):
        if isinstance(self.critic_trust, str) and self.critic_trust != MEASURED:
            with suppress(ValueError):
                self.critic_trust = float(self.critic_trust)  # type: ignore[assignment]  # from the command line
        super().__post_init__()

    def options_of_probe(self) -> list[str]:
        """Those that only a probe critic has."""
        return ["critic_trust", *(name for name in sorted(vars(self)) if name.startswith("probe_"))]

    def check_probe(self, is_probe: bool) -> None:
        """
        Raise `ValueError` for an option that has no effect on the critic that there is.

        Args:
            is_probe (`bool`):
                Whether it is a probe critic.
        """
        if not is_probe:
            self._refuse(self.options_of_probe(), "has no effect: the critic is no probe critic (`critic='probe'`)")
            if getattr(self, "policy_lambda", None) == MEASURED:
                raise ValueError(
                    f"{type(self).__name__}: `policy_lambda={MEASURED!r}` is for a probe critic (`critic='probe'`), "
                    "whose trust is measured. Set it to a number, or to another schedule."
                )
            return
        others = [name for name in vars(self) if name.startswith("critic_") and name not in _OF_A_PROBE_TOO]
        if self.critic_pretraining_steps == 0:
            others.remove("critic_pretraining_steps")
        self._refuse(others, "has no effect on a probe critic")
        self._refuse(
            [name for name in ("gamma", "truncation", "time_step") if hasattr(self, name)],
            "cannot be had with a probe critic, whose time steps are parts of a completion",
        )
        if self.probe_boundaries != "entropy":
            self._refuse(
                ["probe_boundary_quantile"], f"has no effect with `probe_boundaries={self.probe_boundaries!r}`"
            )
        if self.beta == 0:
            raise ValueError(
                f"{type(self).__name__}: a probe critic reads what the reference model makes of a rollout in the "
                "forward pass for the KL penalty, and `beta=0.0` makes none. Set `beta`, e.g. to 0.03."
            )
        if self.sync_ref_model:
            raise ValueError(
                f"{type(self).__name__}: with `sync_ref_model=True` the states that a probe critic reads would become "
                "others under it. Leave it at False."
            )

    def _refuse(self, names: list[str], why: str) -> None:
        for name in names:
            if getattr(self, name) != self._default(name):
                raise ValueError(
                    f"{type(self).__name__}: `{name}={getattr(self, name)!r}` {why}. Leave it at "
                    f"{self._default(name)!r}."
                )
