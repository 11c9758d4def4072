from dataclasses import dataclass, field

from ...critics.facts import RUNNING
from ..critic.reward_range import A_RANGE_OR_NONE
from ..vapo.vapo_config import VAPOConfig


@dataclass
class BPCOConfig(VAPOConfig):
    r"""
    Configuration class for the [`BPCOTrainer`].

    This class includes only the parameters whose defaults are not VAPO's. For all others, refer to
    [`~trl_credit.VAPOConfig`]; among them `critic_prompt_template`, with which the critic is told more than the policy.

    Args:
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt.
        trust_region (`str`, *optional*, defaults to `"dppo_tv"`):
            What keeps the policy close to what sampled its completions, see
            [`~trl_credit.seam.trust_region.TrustRegionConfig`].
        reward_range (`list[float]` or `str`, *optional*, defaults to `"running"`):
            Lowest and highest possible reward, to which values are bounded. Rewards outside are refused. `"running"`
            learns the range: it begins with [0, 1] and grows to hold all that is earned in training.
        critic_loss (`str`, *optional*, defaults to `"bce"`):
            Loss of the critic: `"bce"`, binary cross-entropy on the logit of a value within `reward_range`; `"mse"`,
            half the squared error.
        positive_lm_coef (`float`, *optional*, defaults to `0.0`):
            Weight μ of the language-modeling loss on the completions with a positive reward; 0 for none.
    """

    num_generations: int | None = 1
    trust_region: str = "dppo_tv"
    reward_range: list[str] | None = field(  # type: ignore[assignment]
        default_factory=lambda: RUNNING,
        metadata=A_RANGE_OR_NONE,
    )
    critic_loss: str = "bce"
    positive_lm_coef: float = 0.0
