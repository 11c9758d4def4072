from dataclasses import dataclass, field

from ..vapo.vapo_config import VAPOConfig


@dataclass
class SAOConfig(VAPOConfig):
    r"""
    Configuration class for the [`SAOTrainer`].

    This class includes only the parameters whose defaults are not VAPO's. For all others, refer to
    [`~trl_credit.VAPOConfig`].

    Args:
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt.
        trust_region (`str`, *optional*, defaults to `"dis"`):
            What keeps the policy close to what sampled its completions, see
            [`~trl_credit.seam.trust_region.TrustRegionConfig`].
        epsilon (`float`, *optional*, defaults to `0.3`):
            A token counts if its ratio is at least 1 - `epsilon`: 0.3 for math, 0.8 for code.
        epsilon_high (`float`, *optional*, defaults to `5.0`):
            And at most 1 + `epsilon_high`: 5.0 for math, 3.0 for code.
        length_adaptive_alpha (`float`, *optional*, defaults to `1.5`):
            α of the length-adaptive λ. λ is 0 up to a length of 1/α.
        critic_freeze (`list[str]`, *optional*, defaults to `['attention']`):
            Parts of the critic that are not trained: `"attention"`, `"embeddings"`, or patterns of the names of its
            parameters.
        critic_learning_rate (`float`, *optional*, defaults to `5e-6`):
            Learning rate of the critic's weights, or adapters, below its head.
        critic_updates_per_step (`int`, *optional*, defaults to `2`):
            Updates of the critic for each optimizer step of the policy, on the same samples.
        positive_lm_coef (`float`, *optional*, defaults to `0.0`):
            Weight μ of the language-modeling loss on the completions with a positive reward; 0 for none.
    """

    num_generations: int | None = 1
    trust_region: str = "dis"
    epsilon: float = 0.3
    epsilon_high: float | None = 5.0
    length_adaptive_alpha: float = 1.5
    critic_freeze: list[str] | None = field(default_factory=lambda: ["attention"])
    critic_learning_rate: float | None = 5e-6
    critic_updates_per_step: int = 2
    positive_lm_coef: float = 0.0
