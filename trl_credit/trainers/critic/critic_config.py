from dataclasses import dataclass, field

from transformers.training_args import OptimizerNames
from trl import GRPOConfig

from ...options import at_least, between, one_of, unless
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
        critic_initial_value (`float`, *optional*):
            What a fresh head outputs everywhere before its first update. Default: the mean reward of the first rollout.
            A head that comes with the critic's checkpoint is left as it is.
        critic_peft_config (`dict`, *optional*):
            Arguments of a `peft.LoraConfig`, to train adapters and the head of the critic instead of all its weights,
            e.g. `{"r": 16, "target_modules": "all-linear"}`. The trainer argument of the same name takes any
            `PeftConfig`.
        critic_share_base (`bool`, *optional*, defaults to `False`):
            Make the critic a second adapter and a head on the policy's base, so that the base is in memory only once.
            For policies with adapters, on one process or with DDP. `critic_peft_config` describes the adapter, by
            default one like the policy's.
        critic_freeze (`list[str]`, *optional*):
            Parts of the critic that are not trained: `"attention"`, `"embeddings"`, or patterns of the names of its
            parameters, e.g. `"*layers.0.*"`. With adapters, those of these parts. Its head is always trained.
        critic_learning_rate (`float`, *optional*):
            Learning rate of the critic's weights, or adapters, below its head. Default: 0.1 / width of the critic, at
            most 1e-3: 1.1e-4 at 896.
        critic_head_learning_rate (`float`, *optional*):
            Learning rate of the critic's head. Default: the same number, or `critic_learning_rate` where that is
            higher, or 0.
        critic_optim (`str`, *optional*, defaults to `"adamw_torch"`):
            Optimizer of the critic, with the same names as `optim`. Betas and ε are the policy's.
        critic_optim_args (`str`, *optional*):
            Its arguments, in the format of `optim_args`.
        critic_lr_scheduler_type (`str`, *optional*, defaults to `"constant_with_warmup"`):
            Schedule of the critic's learning rates, over its own updates, pretraining included.
        critic_lr_scheduler_kwargs (`dict`, *optional*):
            Its arguments, like `lr_scheduler_kwargs`.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Updates of linear warm-up.
        critic_weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of the critic's matrices.
        critic_max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Norm to which the critic's gradient is clipped; 0 for no clipping.
        critic_gradient_checkpointing (`bool`, *optional*):
            Gradient checkpointing of the critic. Default: as the policy's.
        critic_update_batch_tokens (`int`, *optional*):
            Tokens that the critic reads at a time, padding included, in its updates and where it values a rollout; or
            those of the longest sequence, if that has more. Default: as many as `per_device_train_batch_size` of the
            longest have; for [`SPPOTrainer`], whose critic reads prompts alone, at least
            `per_device_train_batch_size` · `max_completion_length`.
        critic_offload (`bool`, *optional*, defaults to `False`):
            Keep the critic's weights and optimizer state on the host between its turns. On one process.
        critic_updates_per_step (`int`, *optional*, defaults to `1`):
            Updates of the critic for each optimizer step of the policy, on the same samples.
        critic_pretraining_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps of the critic on rollouts of the fixed policy before the policy moves.
        critic_pretraining_loss_threshold (`float`, *optional*):
            End pretraining early once the critic's loss over one rollout is at most this.
        critic_pretraining_explained_variance_threshold (`float`, *optional*):
            End pretraining early once the explained variance over one rollout is at least this. If both thresholds are
            set, both must hold.
        critic_pretraining_rollouts (`str`, *optional*):
            Folder of stored rollouts to pretrain on, so that later runs with the same policy generate none. What is not
            there is written first: the rollouts that `critic_pretraining_steps` updates need if each is used once.
            Default: none are stored, and each is used once.
        critic_pretraining_epochs (`int`, *optional*, defaults to `8`):
            Most passes over the stored rollouts.
        critic_pretraining_held_out (`float`, *optional*, defaults to `0.1`):
            Share of the prompts of the stored rollouts that the critic does not learn from. Its error on them is
            measured after each pass, and the critic with the lowest is kept. At 0 it is the last one.
        critic_pretraining_patience (`int`, *optional*, defaults to `2`):
            End pretraining after this many passes in a row without a lower error. `None`: make all passes.
        positive_reward_funcs (`list[str]`, *optional*):
            Names of the reward functions that decide which completions are right, or positive: every one of them that
            scores a completion must say so. Default: all with a positive weight.
        critic_hub_model_id (`str`, *optional*):
            Separate repository to which the critic is pushed. Default: the folder `critic` of the policy's repository.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            Only `"none"`: there is no group baseline to scale.

    > [!NOTE]
    > `num_generations` may be 1. `gradient_accumulation_steps` must divide `steps_per_generation` (by default they
    > are equal), so that the samples of an optimizer step are known when it begins.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + [
        "critic_model_init_kwargs",
        "critic_peft_config",
        "critic_lr_scheduler_kwargs",
    ]

    restricted = NO_GROUP

    critic_model_name_or_path: str | None = None
    critic_model_init_kwargs: dict | str | None = field(default=None, metadata=unless(critic_share_base=True))
    critic_initial_value: float | None = None
    critic_peft_config: dict | str | None = None
    critic_share_base: bool = False
    critic_freeze: list[str] | None = None
    critic_learning_rate: float | None = field(default=None, metadata=at_least(0))
    critic_head_learning_rate: float | None = field(default=None, metadata=at_least(0))
    critic_optim: str = field(default="adamw_torch", metadata=one_of(*(name.value for name in OptimizerNames)))
    critic_optim_args: str | None = None
    critic_lr_scheduler_type: str = "constant_with_warmup"
    critic_lr_scheduler_kwargs: dict | str | None = None
    critic_warmup_steps: int = field(default=0, metadata=at_least(0))
    critic_weight_decay: float = field(default=0.0, metadata=at_least(0))
    critic_max_grad_norm: float = field(default=1.0, metadata=at_least(0))
    critic_gradient_checkpointing: bool | None = None
    critic_update_batch_tokens: int | None = field(default=None, metadata=at_least(1))
    critic_offload: bool = field(default=False, metadata=unless(critic_share_base=True))
    critic_updates_per_step: int = field(default=1, metadata=at_least(1))
    critic_pretraining_steps: int = field(default=50, metadata=at_least(0))
    critic_pretraining_loss_threshold: float | None = field(default=None, metadata=unless(critic_pretraining_steps=0))
    critic_pretraining_explained_variance_threshold: float | None = field(
        default=None, metadata=unless(critic_pretraining_steps=0)
    )
    critic_pretraining_rollouts: str | None = field(default=None, metadata=unless(critic_pretraining_steps=0))
    critic_pretraining_epochs: int = field(default=8, metadata=at_least(1) | unless(critic_pretraining_rollouts=None))
    critic_pretraining_held_out: float = field(
        default=0.1, metadata=between(0, 1, open_end=True) | unless(critic_pretraining_rollouts=None)
    )
    critic_pretraining_patience: int | None = field(
        default=2, metadata=at_least(1) | unless(critic_pretraining_rollouts=None, critic_pretraining_held_out=0)
    )
    positive_reward_funcs: list[str] | None = None
    critic_hub_model_id: str | None = None
    scale_rewards: str = "none"

    def __post_init__(self):
        super().__post_init__()
        for option in ("critic_model_init_kwargs", "critic_peft_config", "critic_lr_scheduler_kwargs"):
            value = getattr(self, option)
            if value is not None and not isinstance(value, dict):
                raise TypeError(
                    f"{type(self).__name__}: `{option}` must be a dict, got {type(value).__name__}. Pass a "
                    "`PeftConfig` as the trainer's argument."
                )
        if self.critic_pretraining_rollouts is not None:
            for option in ("critic_pretraining_loss_threshold", "critic_pretraining_explained_variance_threshold"):
                if getattr(self, option) is not None:
                    raise ValueError(
                        f"{type(self).__name__}: `{option}={getattr(self, option)!r}` has no effect with "
                        f"`critic_pretraining_rollouts={self.critic_pretraining_rollouts!r}`: what is held out says "
                        "when to end, see `critic_pretraining_patience`. Leave it at None."
                    )
