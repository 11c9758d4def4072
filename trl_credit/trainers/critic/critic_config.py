from dataclasses import dataclass, field

from trl import GRPOConfig

from ...options import at_least, unless
from ...seam.config import NO_GROUP, CreditConfig


@dataclass
class CriticConfig(CreditConfig):
    r"""
    What all configurations with a critic share. This class includes only the parameters that are specific to the
    critic. For those of the credit log, refer to [`~trl_credit.seam.CreditConfig`], for all others to
    [`~trl.GRPOConfig`].

    Args:
        critic_model_name_or_path (`str`, *optional*):
            Checkpoint that the critic starts from if the trainer's `critic` argument is not given. Default: the
            policy's.
        critic_model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for the critic, e.g. `{"dtype": "bfloat16"}`.
        critic_initial_value (`float`, *optional*, defaults to `0.0`):
            What a fresh head outputs everywhere before its first update. Setting it to the mean reward, if you know it,
            saves the critic some steps.
        critic_peft_config (`dict`, *optional*):
            Arguments of a `peft.LoraConfig`, to train adapters and the head of the critic instead of all its weights,
            e.g. `{"r": 16, "target_modules": "all-linear"}`. The trainer argument of the same name takes any
            `PeftConfig`.
        critic_share_base (`bool`, *optional*, defaults to `False`):
            Make the critic a second adapter and a head on the policy's base, so that the base is in memory only once.
            For policies with adapters, on one process or with DDP. `critic_peft_config` describes the adapter, by
            default one like the policy's.
        critic_learning_rate (`float`, *optional*, defaults to `2e-6`):
            Learning rate of the critic's AdamW.
        critic_lr_scheduler_type (`str`, *optional*, defaults to `"constant_with_warmup"`):
            Schedule of the critic's learning rate, over its own updates, pretraining included.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Updates of linear warm-up.
        critic_weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of the critic's matrices.
        critic_max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Norm to which the critic's gradient is clipped; 0 for no clipping.
        critic_gradient_checkpointing (`bool`, *optional*):
            Gradient checkpointing of the critic. Default: as the policy's.
        critic_updates_per_step (`int`, *optional*, defaults to `1`):
            Updates of the critic for each optimizer step of the policy, on the same samples.
        critic_pretraining_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps of the critic on rollouts of the fixed policy before the policy moves.
        critic_pretraining_loss_threshold (`float`, *optional*):
            End pretraining early once the critic's loss over one rollout is at most this.
        critic_pretraining_explained_variance_threshold (`float`, *optional*):
            End pretraining early once the explained variance over one rollout is at least this. If both thresholds are
            set, both must hold.
        critic_hub_model_id (`str`, *optional*):
            Separate repository to which the critic is pushed. Default: the folder `critic` of the policy's repository.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            Only `"none"`: there is no group baseline to scale.

    > [!NOTE]
    > `num_generations` may be 1. `gradient_accumulation_steps` must divide `steps_per_generation` (by default they
    > are equal), so that the samples of an optimizer step are known when it begins.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["critic_model_init_kwargs", "critic_peft_config"]

    restricted = NO_GROUP

    critic_model_name_or_path: str | None = None
    critic_model_init_kwargs: dict | str | None = field(default=None, metadata=unless(critic_share_base=True))
    critic_initial_value: float = 0.0
    critic_peft_config: dict | str | None = None
    critic_share_base: bool = False
    critic_learning_rate: float = field(default=2e-6, metadata=at_least(0))
    critic_lr_scheduler_type: str = "constant_with_warmup"
    critic_warmup_steps: int = field(default=0, metadata=at_least(0))
    critic_weight_decay: float = field(default=0.0, metadata=at_least(0))
    critic_max_grad_norm: float = field(default=1.0, metadata=at_least(0))
    critic_gradient_checkpointing: bool | None = None
    critic_updates_per_step: int = field(default=1, metadata=at_least(1))
    critic_pretraining_steps: int = field(default=50, metadata=at_least(0))
    critic_pretraining_loss_threshold: float | None = field(default=None, metadata=unless(critic_pretraining_steps=0))
    critic_pretraining_explained_variance_threshold: float | None = field(
        default=None, metadata=unless(critic_pretraining_steps=0)
    )
    critic_hub_model_id: str | None = None
    scale_rewards: str = "none"

    def __post_init__(self):
        super().__post_init__()
        for option in ("critic_model_init_kwargs", "critic_peft_config"):
            value = getattr(self, option)
            if value is not None and not isinstance(value, dict):
                raise TypeError(
                    f"{type(self).__name__}: `{option}` must be a dict, got {type(value).__name__}. Pass a "
                    "`PeftConfig` as the trainer's argument."
                )
