from dataclasses import dataclass, field

from ...critics.prompt_tokens import template_columns
from ...options import one_of, such_that, unless
from ..critic.critic_config import CriticConfig
from ..critic.reward_range import is_range, refuse_start_outside


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
            Loss of the critic: `"bce"`, binary cross-entropy on the logit of the value, for rewards within
            `reward_range`; `"mse"`, half the squared error, for any rewards.
        reward_range (`list[float]`, *optional*, defaults to `[0.0, 1.0]`):
            Lowest and highest possible reward, with `critic_loss="bce"`: rewards are mapped from this range to [0, 1]
            for the critic, and values are mapped back.
        critic_prompt_template (`str`, *optional*):
            What the critic reads in the place of the prompt: text with columns of the dataset in braces, `{prompt}`
            among them, e.g. `"{prompt}\n\nReference answer: {solution}"`. In a conversation `{prompt}` is the content
            of the last message of the user, which the text replaces. The policy never sees it. Default: the prompt.
        critic_initial_value (`float`, *optional*):
            What a fresh head outputs everywhere before its first update, in units of the reward. Default: the mean
            reward of the first rollout, with `critic_loss="bce"` kept at least a twentieth of `reward_range` away from
            its ends.
        critic_pretraining_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps of the critic on rollouts of the fixed policy before the policy moves.
    """

    num_generations: int | None = 1
    critic_loss: str = field(default="bce", metadata=one_of("bce", "mse"))
    reward_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata=such_that(is_range, "two finite numbers, the lower one first") | unless(critic_loss="mse"),
    )
    critic_prompt_template: str | None = None
    critic_initial_value: float | None = None
    critic_pretraining_steps: int = 0

    def __post_init__(self):
        if is_range(self.reward_range):
            self.reward_range = [float(end) for end in self.reward_range]
        self.check_options()
        if self.critic_loss == "bce":
            refuse_start_outside(self)
        if self.critic_prompt_template is not None:
            template_columns(self.critic_prompt_template)
        super().__post_init__()
