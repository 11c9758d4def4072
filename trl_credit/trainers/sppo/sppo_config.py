from dataclasses import dataclass, field

from ...critics.facts import RUNNING
from ...critics.probe.critic import PROMPT
from ...critics.prompt_tokens import template_columns
from ...options import one_of, unless
from ..critic.probe_config import A_LAYER_OR_MORE, ProbeConfig
from ..critic.reward_range import A_RANGE, as_range, refuse_start_outside


@dataclass
class SPPOConfig(ProbeConfig):
    r"""
    Configuration class for the [`SPPOTrainer`].

    This class includes only the parameters that are specific to SPPO. For the critic's, refer to
    [`~trl_credit.trainers.critic.CriticConfig`] and [`~trl_credit.trainers.critic.probe_config.ProbeConfig`], for all
    others to [`~trl.GRPOConfig`].

    Args:
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt. The critic is the baseline, however many there are.
        critic_loss (`str`, *optional*, defaults to `"bce"`):
            Loss of the critic: `"bce"`, binary cross-entropy on the logit of the value, for rewards within
            `reward_range`; `"mse"`, half the squared error, for any rewards.
        reward_range (`list[float]` or `str`, *optional*, defaults to `"running"`):
            Lowest and highest possible reward, with `critic_loss="bce"`: rewards are mapped from this range to [0, 1]
            for the critic, and values are mapped back. Rewards outside are refused. `"running"` learns the range: it
            begins with [0, 1] and grows to hold every reward of the training.
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
        probe_boundaries (`str`, *optional*, defaults to `"prompt"`):
            At which states a probe critic is asked: only `"prompt"`, the end of the prompt.
        probe_layers (`list[int]`, *optional*, defaults to `[-1]`):
            Layers of the reference whose hidden states a probe critic reads: -1 is what the LM head reads. 0, the
            embedding of the prompt's last token, says nothing where all prompts end alike.
    """

    num_generations: int | None = 1
    critic_loss: str = field(default="bce", metadata=one_of("bce", "mse"))
    reward_range: list[str] | None = field(  # type: ignore[assignment]
        default_factory=lambda: RUNNING,  # parsers know no other default of a list
        metadata=A_RANGE | unless(critic_loss="mse"),
    )
    critic_prompt_template: str | None = None
    critic_initial_value: float | None = None
    critic_pretraining_steps: int = 0
    probe_boundaries: str = field(default=PROMPT, metadata=one_of(PROMPT))
    probe_layers: list[int] = field(default_factory=lambda: [-1], metadata=A_LAYER_OR_MORE)

    def __post_init__(self):
        self.reward_range = as_range(self.reward_range)
        self.check_options()
        if self.critic_loss == "bce":
            refuse_start_outside(self)
        if self.critic_prompt_template is not None:
            template_columns(self.critic_prompt_template)
        super().__post_init__()
