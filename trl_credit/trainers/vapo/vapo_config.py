from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ...critics.facts import RUNNING
from ...critics.prompt_tokens import template_columns
from ...options import above, at_least, between, is_number, one_of, such_that, unless
from ...seam.config import PER_TOKEN
from ..critic.probe_config import MEASURED, ProbeConfig
from ..critic.reward_range import A_RANGE_OR_NONE, as_range, is_range_or_running, refuse_start_outside


LAMBDA_SCHEDULES = ("length_adaptive", "relative_position", MEASURED)


def _is_lambda(value: Any) -> bool:
    return value in LAMBDA_SCHEDULES or (is_number(value) and 0 <= value <= 1)


@dataclass
class VAPOConfig(ProbeConfig):
    r"""
    Configuration class for the [`VAPOTrainer`].

    This class includes only the parameters that are specific to VAPO. For the critic's, refer to
    [`~trl_credit.trainers.critic.CriticConfig`] and [`~trl_credit.trainers.critic.probe_config.ProbeConfig`], for all
    others to [`~trl.GRPOConfig`].

    Args:
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount γ in [0, 1].
        critic_lambda (`float`, *optional*, defaults to `1.0`):
            λ in [0, 1] of the returns to which the critic is fitted. At 1 they are the discounted rewards themselves.
        time_step (`str`, *optional*, defaults to `"token"`):
            What a time step of the credit is: `"token"`; or `"turn"`, for agents: what the policy writes between two
            answers of tools or of an environment. A turn has one value, that of the state in which it begins, one
            advantage for all its tokens, and the rewards from its first token up to the next turn. γ and λ then count
            turns.
        policy_lambda (`float` or `str`, *optional*, defaults to `"length_adaptive"`):
            λ of the policy's advantages: a number in [0, 1]; `"length_adaptive"` for 1 - 1 / (`length_adaptive_alpha` ·
            length); `"relative_position"` for the λ at which the last reward reaches the first token of every
            completion with weight `relative_position_weight`; or, with a probe critic, `"measured"` for 1 less
            the slope of the rewards on changes of its values from state to state, in [0, 1], in the latest rollouts,
            each valued before it was learnt from.
        length_adaptive_alpha (`float`, *optional*, defaults to `0.05`):
            α of the length-adaptive λ. λ is 0 up to a length of 1/α.
        relative_position_weight (`float`, *optional*, defaults to `0.5`):
            The fraction for `policy_lambda="relative_position"`, in [0, 1].
        critic_loss (`str`, *optional*, defaults to `"mse"`):
            Loss of the critic: `"mse"`, half the squared error; `"bce"`, binary cross-entropy on the logit of a value
            within `reward_range`.
        reward_range (`list[float]` or `str`, *optional*):
            Lowest and highest possible reward, to which values are bounded: the critic puts out the logit of a value
            between them. Rewards outside are refused. `"running"` learns the range: it begins with [0, 1] and grows to
            hold all that is earned in training. Default: values may be any number; with `critic_loss="bce"`
            `"running"`, and with a probe critic [0, 1].
        critic_prompt_template (`str`, *optional*):
            What the critic reads in the place of the prompt: text with columns of the dataset in braces, `{prompt}`
            among them, e.g. `"{prompt}\n\nReference answer: {solution}"`. In a conversation `{prompt}` is the content
            of the last message of the user, which the text replaces. The policy never sees it. Default: the prompt.
        critic_clip_range (`float`, *optional*):
            Range around the rollout's values to which the critic's values are clipped, as in PPO; not used during
            pretraining. `None` for no clipping.
        positive_lm_coef (`float`, *optional*, defaults to `0.1`):
            Weight μ of the language-modeling loss on the completions with a positive reward; 0 for none.
        positive_reward_threshold (`float`, *optional*, defaults to `0.0`):
            A reward above this, as returned by the reward functions, counts as positive.
        whiten_advantages (`bool`, *optional*, defaults to `False`):
            Shift and scale the advantages to mean 0 and standard deviation 1 over the tokens of a rollout, across all
            processes.
        truncation (`str`, *optional*, defaults to `"terminal"`):
            What follows a completion that ran out of room: `"terminal"`, nothing, so that its reward is its return;
            `"bootstrap"`, the critic's value of the state after its last token. To leave such completions out
            altogether, set `mask_truncated_completions`, which leaves out all that do not end with EOS, including those
            that end at a stop string.
        epsilon (`float`, *optional*, defaults to `0.2`):
            Lower clip of the ratio.
        epsilon_high (`float`, *optional*, defaults to `0.28`):
            Upper clip of the ratio.

    > [!NOTE]
    > With `critic_pretraining_steps=0`, `policy_lambda=0.95`, `critic_lambda=0.95`, `epsilon_high=0.2` and
    > `positive_lm_coef=0` this is PPO; with `critic_lambda=1` and pretraining it is VC-PPO.
    """

    restricted = ProbeConfig.restricted | PER_TOKEN

    gamma: float = field(default=1.0, metadata=between(0, 1))
    critic_lambda: float = field(default=1.0, metadata=between(0, 1))
    time_step: str = field(default="token", metadata=one_of("token", "turn"))
    policy_lambda: str = field(  # or a number; the command line's parser cannot take both
        default="length_adaptive", metadata=such_that(_is_lambda, f"a number in [0, 1] or one of {LAMBDA_SCHEDULES}")
    )
    length_adaptive_alpha: float = field(default=0.05, metadata=above(0))
    relative_position_weight: float = field(default=0.5, metadata=between(0, 1))
    critic_loss: str = field(default="mse", metadata=one_of("mse", "bce"))
    reward_range: list[str] | None = field(  # or numbers; the command line's parser cannot take both
        default=None, metadata=A_RANGE_OR_NONE
    )
    critic_prompt_template: str | None = None
    critic_clip_range: float | None = field(default=None, metadata=above(0) | unless(critic_loss="bce"))
    positive_lm_coef: float = field(default=0.1, metadata=at_least(0))
    positive_reward_threshold: float = 0.0
    whiten_advantages: bool = False
    truncation: str = field(default="terminal", metadata=one_of("terminal", "bootstrap"))
    epsilon_high: float | None = 0.28

    def __post_init__(self):
        if isinstance(self.policy_lambda, str) and self.policy_lambda not in LAMBDA_SCHEDULES:
            with suppress(ValueError):
                self.policy_lambda = float(self.policy_lambda)  # type: ignore[assignment]  # from the command line
        if self.reward_range is None and self.critic_loss == "bce":
            self.reward_range = RUNNING  # type: ignore[assignment]
        self.reward_range = as_range(self.reward_range)
        if is_range_or_running(self.reward_range):
            refuse_start_outside(self)
        if self.critic_prompt_template is not None:
            template_columns(self.critic_prompt_template)
        super().__post_init__()
