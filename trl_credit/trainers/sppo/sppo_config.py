import math
from dataclasses import dataclass, field

from ..critic.critic_config import CriticConfig


@dataclass
class SPPOConfig(CriticConfig):
    r"""
    Configuration class for the [`SPPOTrainer`].

    This class includes only the parameters that are specific to SPPO. For the critic's, refer to
    [`~trl_credit.trainers.critic.CriticConfig`], for all others to [`~trl.GRPOConfig`].

    Args:
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt. The critic is the baseline, however many there are.
        critic_loss (`str`, *optional*, defaults to `"bce"`):
            What the critic is fitted with: `"bce"`, binary cross-entropy on the logit of the value, for rewards within
            `reward_range`; `"mse"`, half the squared error, for any rewards.
        reward_range (`list[float]`, *optional*, defaults to `[0.0, 1.0]`):
            Lowest and highest reward that there is, with `critic_loss="bce"`: rewards are mapped from it to [0, 1] for
            the critic, and values back.
        critic_initial_value (`float`, *optional*):
            What a fresh head answers everywhere before its first update, in units of the reward. Default: the mean
            reward of the first rollout, with `critic_loss="bce"` at least a twentieth of `reward_range` from its ends.
        critic_pretraining_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps of the critic on rollouts of the fixed policy before the policy moves.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            Only `"none"`: there is no group baseline to scale.
    """

    num_generations: int | None = field(
        default=1,
        metadata={"help": "Completions per prompt. The critic is the baseline, however many there are."},
    )
    critic_loss: str = field(
        default="bce",
        metadata={
            "help": "What the critic is fitted with: `bce` for rewards within `reward_range`, `mse` for any rewards.",
            "choices": ["bce", "mse"],
        },
    )
    reward_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "Lowest and highest reward that there is, with `critic_loss=bce`."},
    )
    critic_initial_value: float | None = field(
        default=None,
        metadata={
            "help": "What a fresh head of the critic answers everywhere before its first update, in units of the "
            "reward. Default: the mean reward of the first rollout."
        },
    )
    critic_pretraining_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps of the critic on rollouts of the fixed policy before the policy moves."},
    )
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Only `none`: there is no group baseline to scale."},
    )

    def __post_init__(self):
        if self.critic_loss not in ("bce", "mse"):
            raise ValueError(f"SPPOConfig: `critic_loss` must be 'bce' or 'mse', got {self.critic_loss!r}.")
        bounded = self.critic_loss == "bce"
        low, high = self.reward_range = _as_range(self.reward_range)
        if not bounded and (low, high) != (0, 1):
            raise ValueError(
                f"SPPOConfig: `reward_range={self.reward_range}` has no effect with `critic_loss='mse'`, which takes "
                "rewards as they are. Drop it."
            )
        if bounded and self.critic_initial_value is not None and not low < self.critic_initial_value < high:
            raise ValueError(
                f"SPPOConfig: `critic_initial_value={self.critic_initial_value}` must lie between the ends of "
                f"`reward_range={self.reward_range}`: a value at its end has no finite logit."
            )
        super().__post_init__()
        for name, only in (("scale_rewards", "none"), ("multi_objective_aggregation", "sum_then_normalize")):
            if getattr(self, name) != only:
                raise ValueError(
                    f"SPPOConfig: `{name}={getattr(self, name)!r}` has no effect: the baseline is the critic's value, "
                    f"not a group of completions, and advantages are not scaled. Leave it at {only!r}."
                )


def _as_range(value) -> list[float]:
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"SPPOConfig: `reward_range` must be two finite numbers, the lower one first, got {value!r}.")
    return [low, high]
