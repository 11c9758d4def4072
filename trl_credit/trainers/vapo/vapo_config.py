from dataclasses import dataclass, field

from ..critic.critic_config import CriticConfig


# TRL's loss types that are a function of a per-token ratio and a per-token advantage.
TOKEN_LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo")
LAMBDA_SCHEDULES = ("length_adaptive", "relative_position")


@dataclass
class VAPOConfig(CriticConfig):
    r"""
    Configuration class for the [`VAPOTrainer`].

    This class includes only the parameters that are specific to VAPO. For the critic's, refer to
    [`~trl_credit.trainers.critic.CriticConfig`], for all others to [`~trl.GRPOConfig`].

    Args:
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount γ in [0, 1].
        critic_lambda (`float`, *optional*, defaults to `1.0`):
            λ in [0, 1] of the returns that the critic is fitted to. At 1 they are the discounted rewards themselves.
        policy_lambda (`float` or `str`, *optional*, defaults to `"length_adaptive"`):
            λ of the policy's advantages: a number in [0, 1]; `"length_adaptive"` for 1 - 1 / (`length_adaptive_alpha` ·
            length); or `"relative_position"` for λ by which the last reward keeps the fraction
            `relative_position_weight` at the first token of every completion.
        length_adaptive_alpha (`float`, *optional*, defaults to `0.05`):
            α of the length-adaptive λ. λ is 0 up to a length of 1/α.
        relative_position_weight (`float`, *optional*, defaults to `0.5`):
            The fraction for `policy_lambda="relative_position"`, in [0, 1].
        critic_clip_range (`float`, *optional*):
            Clip of the critic's values around those of the rollout, as in PPO; none during pretraining. `None` for no
            clip.
        positive_lm_coef (`float`, *optional*, defaults to `0.1`):
            Weight μ of the language-modeling loss on the completions with a positive reward; 0 for none.
        positive_reward_threshold (`float`, *optional*, defaults to `0.0`):
            A reward above it, as the reward functions give it, is positive.
        whiten_advantages (`bool`, *optional*, defaults to `False`):
            Shift and scale the advantages to mean 0 and standard deviation 1 over the tokens of a rollout, of all
            processes.
        truncation (`str`, *optional*, defaults to `"terminal"`):
            What comes after a completion that was cut off: `"terminal"` nothing, its reward is its return;
            `"bootstrap"` the critic's value of the state after its last token. To leave such completions out
            altogether, set `mask_truncated_completions`.
        epsilon (`float`, *optional*, defaults to `0.2`):
            Lower clip of the ratio.
        epsilon_high (`float`, *optional*, defaults to `0.28`):
            Upper clip of the ratio.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            Only `"none"`: there is no group baseline to scale.

    > [!NOTE]
    > With `critic_pretraining_steps=0`, `policy_lambda=0.95`, `critic_lambda=0.95`, `epsilon_high=0.2` and
    > `positive_lm_coef=0` this is PPO; with `critic_lambda=1` and the pretraining it is VC-PPO.
    """

    gamma: float = field(default=1.0, metadata={"help": "Discount gamma in [0, 1]."})
    critic_lambda: float = field(
        default=1.0,
        metadata={"help": "Lambda in [0, 1] of the returns that the critic is fitted to."},
    )
    policy_lambda: str = field(  # or a number; the command line's parser cannot take both
        default="length_adaptive",
        metadata={
            "help": "Lambda of the policy's advantages: a number in [0, 1], `length_adaptive` or `relative_position`."
        },
    )
    length_adaptive_alpha: float = field(
        default=0.05,
        metadata={"help": "Alpha of the length-adaptive lambda, 1 - 1 / (alpha * length)."},
    )
    relative_position_weight: float = field(
        default=0.5,
        metadata={
            "help": "Fraction of the last reward that reaches the first token, for `policy_lambda=relative_position`."
        },
    )
    critic_clip_range: float | None = field(
        default=None,
        metadata={"help": "Clip of the critic's values around those of the rollout; none during pretraining."},
    )
    positive_lm_coef: float = field(
        default=0.1,
        metadata={"help": "Weight of the language-modeling loss on the completions with a positive reward."},
    )
    positive_reward_threshold: float = field(
        default=0.0,
        metadata={"help": "A reward above it, as the reward functions give it, is positive."},
    )
    whiten_advantages: bool = field(
        default=False,
        metadata={"help": "Shift and scale the advantages to mean 0 and standard deviation 1 over a rollout."},
    )
    truncation: str = field(
        default="terminal",
        metadata={
            "help": "What comes after a cut-off completion: `terminal` nothing; `bootstrap` the critic's value.",
            "choices": ["terminal", "bootstrap"],
        },
    )
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip of the ratio."})
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Only `none`: there is no group baseline to scale."},
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.policy_lambda, str) and self.policy_lambda not in LAMBDA_SCHEDULES:
            try:
                self.policy_lambda = float(self.policy_lambda)  # type: ignore[assignment]  # text from the command line
            except ValueError:
                raise ValueError(
                    f"VAPOConfig: `policy_lambda` must be a number in [0, 1] or one of {LAMBDA_SCHEDULES}, got "
                    f"{self.policy_lambda!r}."
                ) from None
        fractions = ["gamma", "critic_lambda", "relative_position_weight"]
        if not isinstance(self.policy_lambda, str):
            fractions.append("policy_lambda")
        for name in fractions:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"VAPOConfig: `{name}` must be a number in [0, 1], got {value!r}.")
        if not self.length_adaptive_alpha > 0:
            raise ValueError(
                f"VAPOConfig: `length_adaptive_alpha` must be positive, got {self.length_adaptive_alpha!r}."
            )
        if self.critic_clip_range is not None and not self.critic_clip_range > 0:
            raise ValueError(
                f"VAPOConfig: `critic_clip_range` must be positive, or None for no clip, got "
                f"{self.critic_clip_range!r}."
            )
        if not self.positive_lm_coef >= 0:
            raise ValueError(f"VAPOConfig: `positive_lm_coef` must be at least 0, got {self.positive_lm_coef!r}.")
        if self.truncation not in ("terminal", "bootstrap"):
            raise ValueError(f"VAPOConfig: `truncation` must be 'terminal' or 'bootstrap', got {self.truncation!r}.")
        if self.loss_type not in TOKEN_LOSS_TYPES:
            raise ValueError(
                f"VAPOConfig: `loss_type={self.loss_type!r}` has no per-token advantage. Choose one of "
                f"{TOKEN_LOSS_TYPES}; 'dapo' is VAPO's mean over all tokens."
            )
        for name, only in (("scale_rewards", "none"), ("multi_objective_aggregation", "sum_then_normalize")):
            if getattr(self, name) != only:
                raise ValueError(
                    f"VAPOConfig: `{name}={getattr(self, name)!r}` has no effect: advantages come from the critic, not "
                    f"from a group of completions. Leave it at {only!r}; `whiten_advantages` scales advantages."
                )
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"VAPOConfig: `importance_sampling_level={self.importance_sampling_level!r}` gives a completion one "
                "ratio, but its tokens have advantages of their own. Use 'token'."
            )
