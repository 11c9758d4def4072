import json
import math
from dataclasses import dataclass, field
from typing import Any

from transformers.training_args import OptimizerNames
from trl import GRPOConfig

from ...seam import CreditConfig


# By default, see docs/results/critic_rates.md.
HEAD_LEARNING_RATE = 1e-2


@dataclass
class CriticConfig(CreditConfig):
    r"""
    What all configurations with a critic share. This class includes only the parameters that are specific to the
    critic. For those of the credit log, refer to [`~trl_credit.seam.CreditConfig`], for all others to
    [`~trl.GRPOConfig`].

    Args:
        critic_model_name_or_path (`str`, *optional*):
            Checkpoint that the critic starts from, when the trainer's `critic` argument is not given. Default: the
            policy's.
        critic_model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for the critic, e.g. `{"dtype": "bfloat16"}`.
        critic_initial_value (`float`, *optional*):
            What a fresh head answers everywhere before its first update. Default: the mean reward of the first rollout.
            A head that comes with the critic's checkpoint is left as it is.
        critic_peft_config (`dict`, *optional*):
            Arguments of a `peft.LoraConfig`, to train adapters and the head of the critic instead of all its weights,
            e.g. `{"r": 16, "target_modules": "all-linear"}`. The trainer's argument of the same name takes any
            `PeftConfig`.
        critic_share_base (`bool`, *optional*, defaults to `False`):
            Make the critic a second adapter and a head on the policy's base, so that the base is in memory once. For
            policies with adapters, on one process or with DDP. The adapter is `critic_peft_config`, by default one like
            the policy's.
        critic_learning_rate (`float`, *optional*, defaults to `1e-4`):
            Learning rate of the critic's weights, or adapters, below its head.
        critic_head_learning_rate (`float`, *optional*):
            Learning rate of the critic's head. Default: 1e-2, or `critic_learning_rate` where that is higher, or 0.
        critic_optim (`str`, *optional*, defaults to `"adamw_torch"`):
            Optimizer of the critic, by the names that `optim` has. Betas and ε are those of the policy's.
        critic_optim_args (`str`, *optional*):
            Its arguments, as `optim_args` are written.
        critic_lr_scheduler_type (`str`, *optional*, defaults to `"constant_with_warmup"`):
            Schedule of the critic's learning rates, over its own updates, pretraining included.
        critic_lr_scheduler_kwargs (`dict`, *optional*):
            Its arguments, as those of `lr_scheduler_kwargs`.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Updates of linear warm-up.
        critic_weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of the critic's matrices.
        critic_max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Norm to which the critic's gradient is clipped; 0 for no clip.
        critic_gradient_checkpointing (`bool`, *optional*):
            Gradient checkpointing of the critic. Default: as the policy's.
        critic_updates_per_step (`int`, *optional*, defaults to `1`):
            Updates of the critic for each optimizer step of the policy, on the same samples.
        critic_pretraining_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps of the critic on rollouts of the fixed policy before the policy moves.
        critic_pretraining_loss_threshold (`float`, *optional*):
            End the pretraining early once the critic's loss over one rollout is at most this.
        critic_pretraining_explained_variance_threshold (`float`, *optional*):
            End the pretraining early once the explained variance over one rollout is at least this. With both
            thresholds, both must hold.
        critic_hub_model_id (`str`, *optional*):
            Repository of its own that the critic is pushed to. Default: the folder `critic` of the policy's.

    > [!NOTE]
    > `num_generations` may be 1. `gradient_accumulation_steps` must divide `steps_per_generation` (the default is that
    > they are equal), so that the samples of an optimizer step are known when it begins.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + [
        "critic_model_init_kwargs",
        "critic_peft_config",
        "critic_lr_scheduler_kwargs",
    ]

    critic_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint that the critic starts from. Default: the policy's."},
    )
    critic_model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained` for the critic."},
    )
    critic_initial_value: float | None = field(
        default=None,
        metadata={
            "help": "What a fresh head of the critic answers everywhere before its first update. Default: the mean "
            "reward of the first rollout."
        },
    )
    critic_peft_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of a `peft.LoraConfig`, to train adapters and the head of the critic instead of all its "
            "weights."
        },
    )
    critic_share_base: bool = field(
        default=False,
        metadata={"help": "Make the critic a second adapter and a head on the base of a policy with adapters."},
    )
    critic_learning_rate: float = field(
        default=1e-4, metadata={"help": "Learning rate of the critic's weights, or adapters, below its head."}
    )
    critic_head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the critic's head. Default: 1e-2, or `critic_learning_rate` where that is "
            "higher, or 0."
        },
    )
    critic_optim: str = field(
        default="adamw_torch",
        metadata={"help": "Optimizer of the critic, by the names that `optim` has."},
    )
    critic_optim_args: str | None = field(
        default=None, metadata={"help": "Arguments of the critic's optimizer, as `optim_args` are written."}
    )
    critic_lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "Schedule of the critic's learning rates, over its own updates, pretraining included."},
    )
    critic_lr_scheduler_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the critic's schedule, as those of `lr_scheduler_kwargs`."}
    )
    critic_warmup_steps: int = field(default=0, metadata={"help": "Updates of linear warm-up of the critic."})
    critic_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the critic's matrices."})
    critic_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Norm to which the critic's gradient is clipped; 0 for no clip."}
    )
    critic_gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Gradient checkpointing of the critic. Default: as the policy's."}
    )
    critic_updates_per_step: int = field(
        default=1,
        metadata={"help": "Updates of the critic for each optimizer step of the policy, on the same samples."},
    )
    critic_pretraining_steps: int = field(
        default=50,
        metadata={
            "help": "Optimizer steps of the critic on rollouts of the fixed policy before the policy moves.",
        },
    )
    critic_pretraining_loss_threshold: float | None = field(
        default=None,
        metadata={"help": "End the pretraining early once the critic's loss over one rollout is at most this."},
    )
    critic_pretraining_explained_variance_threshold: float | None = field(
        default=None,
        metadata={"help": "End the pretraining early once the explained variance over one rollout is at least this."},
    )
    critic_hub_model_id: str | None = field(
        default=None,
        metadata={
            "help": "Repository of its own that the critic is pushed to. Default: the folder `critic` of the policy's."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        for option, lowest in (
            ("critic_warmup_steps", 0),
            ("critic_updates_per_step", 1),
            ("critic_pretraining_steps", 0),
        ):
            value = getattr(self, option)
            if not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name}: `{option}` must be a whole number of at least {lowest}, got {value!r}.")
        for option in (
            "critic_learning_rate",
            "critic_head_learning_rate",
            "critic_weight_decay",
            "critic_max_grad_norm",
        ):
            value = getattr(self, option)
            if option == "critic_head_learning_rate" and value is None:
                continue
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: `{option}` must be a finite number of at least 0, got {value!r}.")
        if self.critic_optim not in set(OptimizerNames):
            raise ValueError(
                f"{name}: `critic_optim` must be one of {[optim.value for optim in OptimizerNames]}, got "
                f"{self.critic_optim!r}."
            )
        if self.critic_initial_value is not None and not math.isfinite(self.critic_initial_value):
            raise ValueError(f"{name}: `critic_initial_value` must be finite, got {self.critic_initial_value}.")
        self.critic_lr_scheduler_kwargs = _as_dict(
            self.critic_lr_scheduler_kwargs, f"{name}: `critic_lr_scheduler_kwargs`"
        )
        self.critic_peft_config = _as_dict(self.critic_peft_config, f"{name}: `critic_peft_config`")
        self.critic_model_init_kwargs = _as_dict(self.critic_model_init_kwargs, f"{name}: `critic_model_init_kwargs`")
        if self.critic_share_base and self.critic_model_init_kwargs is not None:
            raise ValueError(
                f"{name}: `critic_model_init_kwargs={self.critic_model_init_kwargs!r}` has no effect with "
                "`critic_share_base=True`: the base is the policy's."
            )
        if self.critic_pretraining_steps == 0:
            for option in ("critic_pretraining_loss_threshold", "critic_pretraining_explained_variance_threshold"):
                if getattr(self, option) is not None:
                    raise ValueError(
                        f"{name}: `{option}={getattr(self, option)}` has no effect with `critic_pretraining_steps=0`."
                    )

    @property
    def head_learning_rate(self) -> float:
        """Learning rate of the critic's head."""
        if self.critic_head_learning_rate is not None:
            return self.critic_head_learning_rate
        return self.critic_learning_rate and max(self.critic_learning_rate, HEAD_LEARNING_RATE)


def _as_dict(value: Any, name: str) -> Any:
    if isinstance(value, str):
        value = json.loads(value)
    if value is not None and not isinstance(value, dict):
        raise TypeError(
            f"{name} must be a dict, got {type(value).__name__}. A `PeftConfig` is an argument of the trainer."
        )
    return value
