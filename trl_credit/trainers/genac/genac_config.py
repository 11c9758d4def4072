from dataclasses import dataclass, field

from ...critics.generative.question import check_template
from ..critic.critic_config import CriticConfig
from ..vapo.vapo_config import TOKEN_LOSS_TYPES


# Of `CriticConfig`, what a critic that writes its values has no use for, and why.
_NO_USE = {
    "critic_initial_value": "there is no head; what an untrained critic answers is what it was taught",
    "critic_head_learning_rate": "there is no head",
    "critic_share_base": "it generates and is trained with weights of its own; `critic_peft_config` alone saves memory",
    "critic_updates_per_step": "REINFORCE needs answers of the critic as it is, so each is trained on once",
    "critic_pretraining_loss_threshold": "the loss of REINFORCE says nothing of the error; use "
    "`critic_pretraining_patience`",
    "critic_pretraining_explained_variance_threshold": "use `critic_pretraining_patience`",
}


@dataclass
class GenACConfig(CriticConfig):
    r"""
    Configuration class for the [`GenACTrainer`].

    This class includes only the parameters that are specific to GenAC. For the critic's, refer to
    [`~trl_credit.trainers.critic.CriticConfig`], for all others to [`~trl.GRPOConfig`].

    Args:
        critic_template (`str`, *optional*):
            What the critic is asked, with its slots. Default:
            [`~trl_credit.critics.generative.question.TEMPLATE`].
        critic_max_completion_length (`int`, *optional*, defaults to `1024`):
            Longest answer of the critic, in tokens.
        critic_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature at which the critic's answers are sampled, and their log-probabilities taken.
        critic_baseline (`str`, *optional*, defaults to `"none"`):
            What is taken from the critic's rewards in its loss: `"none"` nothing, as in the paper;
            `"leave_one_out"` the mean reward of all other answers of the rollout.
        actor_description (`str`, *optional*):
            What the critic is told of who writes the completions. Default: a language model, and how many parameters it
            has.
        hint_momentum (`float`, *optional*, defaults to `0.9`):
            How much of the success rate that the critic is told is of earlier rollouts, in [0, 1). `None`: it is not
            told any.
        segment_min_length (`int`, *optional*, defaults to `40`):
            Shortest segment of a completion, in tokens; a completion may be shorter.
        segment_target_length (`int`, *optional*, defaults to `120`):
            Length of a segment from which on it ends at the next good place.
        segment_max_length (`int`, *optional*, defaults to `240`):
            Length at which a segment ends in any case.
        max_segments (`int`, *optional*):
            Most segments of a completion. Segments of a longer one are longer. Default: no limit.
        segment_lambda (`float`, *optional*, defaults to `1.0`):
            λ in [0, 1] of the advantages over segments. At 1 that of a segment is the reward less its value.
        critic_packing (`bool`, *optional*, defaults to `True`):
            Train the critic on all answers about a completion in one sequence, in which they share the completion.
            Otherwise each is a sequence of its own, with the completion up to its state.
        critic_generation_batch_tokens (`int`, *optional*, defaults to `65536`):
            Tokens of the critic's prompts and answers that are generated together, padding included.
        critic_update_batch_tokens (`int`, *optional*, defaults to `16384`):
            Tokens of a forward and backward pass of the critic's update, padding included.
        critic_mask_memory (`float`, *optional*, defaults to `1.0`):
            GiB for the attention mask of such a pass, with `critic_packing`: it grows with the square of a sequence, so
            that long completions are divided over several. FlexAttention (`attn_implementation="flex_attention"` in
            `critic_model_init_kwargs`) needs none.
        critic_use_vllm (`bool`, *optional*, defaults to `False`):
            Let vLLM write the critic's answers. The policy may do with or without. Parallelism, sleep mode and model
            implementation are those of the policy's `vllm_*` settings.
        critic_vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"` for an engine in the training processes, beside the policy's if it has one; `"server"` for a
            server of its own, at `critic_vllm_server_base_url`.
        critic_vllm_server_base_url (`str`, *optional*):
            Where the critic's server is, e.g. `"http://localhost:8001"`.
        critic_vllm_group_port (`int`, *optional*, defaults to `51217`):
            Port over which the server is sent the critic's weights; not that of the policy's `vllm_group_port`.
        critic_vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory for the critic's engine, with `"colocate"`.
        critic_vllm_max_model_length (`int`, *optional*):
            Context of the critic's engine, with `"colocate"`. Default: the critic's.
        critic_learning_rate (`float`, *optional*, defaults to `1e-6`):
            Learning rate of the critic's AdamW.
        critic_pretraining_steps (`int`, *optional*, defaults to `0`):
            Most optimizer steps of the critic on rollouts of the fixed policy before the policy moves.
        critic_pretraining_patience (`int`, *optional*):
            End the pretraining once the critic's error on the evaluation data has not fallen below its lowest in so
            many evaluations. Default: make all `critic_pretraining_steps`.
        critic_validation_steps (`int`, *optional*, defaults to `10`):
            Updates of the pretraining from one evaluation to the next, with `critic_pretraining_patience`.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            Only `"none"`: there is no group baseline to scale.

    > [!NOTE]
    > Rewards must lie in [0, 1], as the critic's values do.
    """

    critic_template: str | None = field(
        default=None, metadata={"help": "What the critic is asked, with its slots. Default: the package's."}
    )
    critic_max_completion_length: int = field(
        default=1024, metadata={"help": "Longest answer of the critic, in tokens."}
    )
    critic_temperature: float = field(
        default=1.0, metadata={"help": "Temperature at which the critic's answers are sampled."}
    )
    critic_baseline: str = field(
        default="none",
        metadata={
            "help": "What is taken from the critic's rewards in its loss: `none`, or `leave_one_out`, the mean of all "
            "other answers of the rollout.",
            "choices": ["none", "leave_one_out"],
        },
    )
    actor_description: str | None = field(
        default=None,
        metadata={
            "help": "What the critic is told of who writes the completions. Default: a language model and its size."
        },
    )
    hint_momentum: float | None = field(
        default=0.9,
        metadata={
            "help": "How much of the success rate that the critic is told is of earlier rollouts. `None`: it is not "
            "told any."
        },
    )
    segment_min_length: int = field(default=40, metadata={"help": "Shortest segment of a completion, in tokens."})
    segment_target_length: int = field(
        default=120, metadata={"help": "Length of a segment from which on it ends at the next good place."}
    )
    segment_max_length: int = field(default=240, metadata={"help": "Length at which a segment ends in any case."})
    max_segments: int | None = field(
        default=None, metadata={"help": "Most segments of a completion. Default: no limit."}
    )
    segment_lambda: float = field(default=1.0, metadata={"help": "Lambda in [0, 1] of the advantages over segments."})
    critic_packing: bool = field(
        default=True,
        metadata={
            "help": "Train the critic on all answers about a completion in one sequence, in which they share the "
            "completion."
        },
    )
    critic_generation_batch_tokens: int = field(
        default=65536,
        metadata={"help": "Tokens of the critic's prompts and answers that are generated together."},
    )
    critic_update_batch_tokens: int = field(
        default=16384,
        metadata={"help": "Tokens of a forward and backward pass of the critic's update."},
    )
    critic_mask_memory: float = field(
        default=1.0, metadata={"help": "GiB for the attention mask of such a pass, with `critic_packing`."}
    )
    critic_use_vllm: bool = field(default=False, metadata={"help": "Let vLLM write the critic's answers."})
    critic_vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "`colocate` for an engine in the training processes, `server` for one at "
            "`critic_vllm_server_base_url`.",
            "choices": ["colocate", "server"],
        },
    )
    critic_vllm_server_base_url: str | None = field(default=None, metadata={"help": "Where the critic's server is."})
    critic_vllm_group_port: int = field(
        default=51217, metadata={"help": "Port over which the critic's server is sent its weights."}
    )
    critic_vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory for the critic's engine."}
    )
    critic_vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Context of the critic's engine. Default: the critic's."}
    )
    critic_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the critic's AdamW."})
    critic_pretraining_steps: int = field(
        default=0,
        metadata={
            "help": "Most optimizer steps of the critic on rollouts of the fixed policy before the policy moves."
        },
    )
    critic_pretraining_patience: int | None = field(
        default=None,
        metadata={
            "help": "End the pretraining once the critic's error on the evaluation data has not fallen below its "
            "lowest in so many evaluations."
        },
    )
    critic_validation_steps: int = field(
        default=10,
        metadata={"help": "Updates of the pretraining from one evaluation to the next."},
    )
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Only `none`: there is no group baseline to scale."},
    )

    def __post_init__(self):
        defaults = {name: CriticConfig.__dataclass_fields__[name].default for name in _NO_USE}
        for name, reason in _NO_USE.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"GenACConfig: `{name}={getattr(self, name)!r}` has no use for a critic that writes its values: "
                    f"{reason}. Leave it at {defaults[name]!r}."
                )
        super().__post_init__()
        lengths = ("segment_min_length", "segment_target_length", "segment_max_length")
        optional = ("max_segments", "critic_pretraining_patience")
        tokens = ("critic_max_completion_length", "critic_generation_batch_tokens", "critic_update_batch_tokens")
        for name in (*lengths, *tokens, "critic_validation_steps", *optional):
            value = getattr(self, name)
            if (value is not None or name not in optional) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"GenACConfig: `{name}` must be a whole number of at least 1, got {value!r}.")
        shortest, target, longest = (getattr(self, name) for name in lengths)
        if not shortest <= target <= longest or longest < 2 * shortest:
            raise ValueError(
                f"GenACConfig: `segment_target_length` ({target}) must lie between `segment_min_length` ({shortest}) "
                f"and `segment_max_length` ({longest}), and the last be at least twice the first."
            )
        if self.hint_momentum is not None and not 0 <= self.hint_momentum < 1:
            raise ValueError(f"GenACConfig: `hint_momentum` must be in [0, 1), or None, got {self.hint_momentum!r}.")
        if self.critic_template is not None:
            hint = ("success_rate",) if self.hint_momentum is not None else ()
            check_template(self.critic_template, (*hint, "problem", "partial_solution"))
            if not hint and "{success_rate}" in self.critic_template:
                raise ValueError(
                    "GenACConfig: `critic_template` has {success_rate}, but with `hint_momentum=None` the critic is "
                    "not told any. Take it out, or set `hint_momentum`."
                )
        if not 0 <= self.segment_lambda <= 1:
            raise ValueError(f"GenACConfig: `segment_lambda` must be in [0, 1], got {self.segment_lambda!r}.")
        if not 0 < self.critic_temperature < float("inf"):
            raise ValueError(
                f"GenACConfig: `critic_temperature` must be a positive number, got {self.critic_temperature!r}: "
                "REINFORCE learns from answers that were sampled."
            )
        if self.critic_baseline not in ("none", "leave_one_out"):
            raise ValueError(
                f"GenACConfig: `critic_baseline` must be 'none' or 'leave_one_out', got {self.critic_baseline!r}."
            )
        if self.critic_pretraining_patience is not None and self.critic_pretraining_steps == 0:
            raise ValueError(
                f"GenACConfig: `critic_pretraining_patience={self.critic_pretraining_patience}` has no effect with "
                "`critic_pretraining_steps=0`."
            )
        if not 0 < self.critic_mask_memory < float("inf"):
            raise ValueError(
                f"GenACConfig: `critic_mask_memory` must be a positive number, got {self.critic_mask_memory!r}."
            )
        self._check_vllm()
        if self.loss_type not in TOKEN_LOSS_TYPES:
            raise ValueError(
                f"GenACConfig: `loss_type={self.loss_type!r}` has no per-token advantage. Choose one of "
                f"{TOKEN_LOSS_TYPES}."
            )
        for name, only in (("scale_rewards", "none"), ("multi_objective_aggregation", "sum_then_normalize")):
            if getattr(self, name) != only:
                raise ValueError(
                    f"GenACConfig: `{name}={getattr(self, name)!r}` has no effect: advantages come from the critic, "
                    f"not from a group of completions. Leave it at {only!r}."
                )
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"GenACConfig: `importance_sampling_level={self.importance_sampling_level!r}` gives a completion one "
                "ratio, but its segments have advantages of their own. Use 'token'."
            )

    def _check_vllm(self):
        if self.critic_vllm_mode not in ("colocate", "server"):
            raise ValueError(
                f"GenACConfig: `critic_vllm_mode` must be 'colocate' or 'server', got {self.critic_vllm_mode!r}."
            )
        only_with = {
            "critic_vllm_mode": (None, self.critic_use_vllm),
            "critic_vllm_server_base_url": ("server", self.critic_vllm_mode == "server"),
            "critic_vllm_group_port": ("server", self.critic_vllm_mode == "server"),
            "critic_vllm_gpu_memory_utilization": ("colocate", self.critic_vllm_mode == "colocate"),
            "critic_vllm_max_model_length": ("colocate", self.critic_vllm_mode == "colocate"),
        }
        for name, (mode, is_used) in only_with.items():
            value = getattr(self, name)
            if value != self.__dataclass_fields__[name].default and not (self.critic_use_vllm and is_used):
                needs = "critic_use_vllm=True" + (f"` and `critic_vllm_mode={mode!r}" if mode else "")
                raise ValueError(f"GenACConfig: `{name}={value!r}` has no effect without `{needs}`.")
        if self.critic_vllm_mode == "server" and self.critic_vllm_server_base_url is None:
            raise ValueError("GenACConfig: `critic_vllm_mode='server'` needs `critic_vllm_server_base_url`.")
