from dataclasses import dataclass, field

from ...critics.facts import RUNNING
from ...critics.generative.question import check_template
from ...options import above, at_least, between, one_of, only_with, unless
from ...seam.config import PER_TOKEN
from ...segmenting import DelimiterSegmenter
from ..critic.critic_config import CriticConfig
from ..critic.reward_range import A_RANGE, as_range


# Of `CriticConfig`, what a critic that writes its values has no use for: its default, and why.
_NO_USE: dict[str, tuple] = {
    "critic_initial_value": (None, "there is no head; what an untrained critic answers is what it was taught"),
    "critic_head_learning_rate": (None, "there is no head"),
    "critic_share_base": (
        False,
        "it generates and is trained with weights of its own; `critic_peft_config` alone saves memory",
    ),
    "critic_updates_per_step": (1, "REINFORCE needs answers of the critic as it is, so each is trained on once"),
    "critic_pretraining_rollouts": (
        None,
        "it learns from answers of its own as it is, which no file holds, and which cost more than the rollouts",
    ),
    "critic_pretraining_loss_threshold": (
        None,
        "the loss of REINFORCE says nothing of the error; use `critic_pretraining_patience`",
    ),
    "critic_pretraining_explained_variance_threshold": (None, "use `critic_pretraining_patience`"),
}
_OF_SERVER, _OF_COLOCATED = only_with(critic_vllm_mode="server"), only_with(critic_vllm_mode="colocate")


@dataclass
class GenACConfig(CriticConfig):
    r"""
    Configuration class for the [`GenACTrainer`].

    This class includes only the parameters that are specific to GenAC. For the critic's, refer to
    [`~trl_credit.trainers.critic.CriticConfig`], for all others to [`~trl.GRPOConfig`].

    Args:
        reward_range (`list[float]` or `str`, *optional*, defaults to `"running"`):
            Lowest and highest possible reward, the meaning of the scores 0 and 10. Rewards outside are refused.
            `"running"` learns the range: it begins with [0, 1] and grows to hold every reward of the training.
        critic_template (`str`, *optional*):
            The question that the critic is asked, with slots. Default:
            `trl_credit.critics.generative.question.TEMPLATE`; with another `reward_range` than [0, 1]
            `TEMPLATE_OF_REWARDS`, which says what the scores mean.
        critic_max_completion_length (`int`, *optional*, defaults to `1024`):
            Maximum length of the critic's answer, in tokens.
        critic_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature at which the critic's answers are sampled and their log-probabilities computed.
        critic_baseline (`str`, *optional*, defaults to `"leave_one_out"`):
            Baseline subtracted from the critic's rewards in its loss: `"leave_one_out"`, the mean reward of all other
            answers of the rollout; `"none"`, as in the paper.
        actor_description (`str`, *optional*):
            What the critic is told about the model that writes the completions. Default: that it is a language model,
            and how many parameters it has.
        hint_momentum (`float`, *optional*, defaults to `0.9`):
            Momentum, in [0, 1), of the running success rate that the critic is told: the weight of earlier rollouts.
            `None`: the critic is not told a success rate.
        segment_min_length (`int`, *optional*, defaults to `40`):
            Shortest segment of a completion, in tokens; a completion may be shorter.
        segment_target_length (`int`, *optional*, defaults to `120`):
            Preferred length of a segment.
        segment_max_length (`int`, *optional*, defaults to `240`):
            Length at which a segment ends in any case.
        max_segments (`int`, *optional*):
            Maximum number of segments of a completion; in longer completions the segments grow. Default: no limit.
        segment_lambda (`float`, *optional*, defaults to `1.0`):
            λ in [0, 1] of the advantages over segments. At 1, a segment's advantage is the reward minus its value.
        critic_packing (`bool`, *optional*, defaults to `True`):
            Train the critic on all answers about a completion in one sequence, in which they share the completion.
            Otherwise each answer has its own sequence, with the completion up to its state.
        critic_generation_batch_tokens (`int`, *optional*, defaults to `65536`):
            Tokens of the critic's prompts and answers per generated batch, padding included.
        critic_update_batch_tokens (`int`, *optional*, defaults to `32768`):
            Tokens per forward and backward pass of the critic's update, padding included.
        critic_mask_memory (`float`, *optional*, defaults to `2.0`):
            GiB for the attention mask of such a pass, with `critic_packing`: the mask grows with the square of the
            sequence length, so that the answers about a long completion are split over several sequences. FlexAttention
            needs none: it is the default on a CUDA GPU, unless `critic_model_init_kwargs` has an `attn_implementation`.
        critic_use_vllm (`bool`, *optional*):
            Let vLLM write the critic's answers; else transformers does. Default: as the policy's completions
            (`use_vllm`), unless these come from a server that cannot take the critic's weights. Parallelism, sleep mode
            and model implementation follow the policy's `vllm_*` settings.
        critic_vllm_mode (`str`, *optional*):
            `"policy"` for the policy's own engine or server, which takes the critic's weights for as long as the critic
            writes, so that there is never a second engine in memory: for a critic of the policy's architecture.
            `"colocate"` for an engine of its own in the training processes, beside the policy's if it has one.
            `"server"` for a server of its own, at `critic_vllm_server_base_url`. Default: `"policy"` where that can be,
            else `"colocate"`.
        critic_vllm_server_base_url (`str`, *optional*):
            URL of the critic's server, e.g. `"http://localhost:8001"`.
        critic_vllm_group_port (`int`, *optional*, defaults to `51217`):
            Port over which the critic's weights are sent to the server; must differ from the policy's
            `vllm_group_port`.
        critic_vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory for the critic's engine, with `critic_vllm_mode="colocate"`.
        critic_vllm_max_model_length (`int`, *optional*):
            Context of the critic's engine, with `critic_vllm_mode="colocate"`. Default: the critic's.
        critic_learning_rate (`float`, *optional*, defaults to `1e-6`):
            Learning rate of the critic's AdamW.
        critic_pretraining_steps (`int`, *optional*, defaults to `0`):
            Maximum number of optimizer steps of the critic, on rollouts of the fixed policy, before the policy moves.
        critic_pretraining_patience (`int`, *optional*):
            End pretraining once the critic's error on the evaluation data has reached no new minimum in this many
            evaluations. Default: run all `critic_pretraining_steps`.
        critic_validation_steps (`int`, *optional*, defaults to `10`):
            Pretraining updates between evaluations, with `critic_pretraining_patience`.

    """

    restricted = {
        **CriticConfig.restricted,
        **PER_TOKEN,
        **{
            name: ((default,), f"has no use for a critic that writes its values: {reason}")
            for name, (default, reason) in _NO_USE.items()
        },
    }

    reward_range: list[str] | None = field(  # type: ignore[assignment]
        default_factory=lambda: RUNNING,
        metadata=A_RANGE,
    )
    critic_template: str | None = None
    critic_max_completion_length: int = field(default=1024, metadata=at_least(1))
    critic_temperature: float = field(default=1.0, metadata=above(0))
    critic_baseline: str = field(default="leave_one_out", metadata=one_of("none", "leave_one_out"))
    actor_description: str | None = None
    hint_momentum: float | None = field(default=0.9, metadata=between(0, 1, open_end=True))
    segment_min_length: int = field(default=40, metadata=at_least(1))
    segment_target_length: int = field(default=120, metadata=at_least(1))
    segment_max_length: int = field(default=240, metadata=at_least(1))
    max_segments: int | None = field(default=None, metadata=at_least(1))
    segment_lambda: float = field(default=1.0, metadata=between(0, 1))
    critic_packing: bool = True
    critic_generation_batch_tokens: int = field(default=65536, metadata=at_least(1))
    critic_update_batch_tokens: int = field(default=32768, metadata=at_least(1))
    critic_mask_memory: float = field(default=2.0, metadata=above(0))
    critic_use_vllm: bool | None = None
    critic_vllm_mode: str | None = field(
        default=None, metadata=one_of("policy", "colocate", "server") | unless(critic_use_vllm=False)
    )
    critic_vllm_server_base_url: str | None = field(default=None, metadata=_OF_SERVER)
    critic_vllm_group_port: int = field(default=51217, metadata=_OF_SERVER)
    critic_vllm_gpu_memory_utilization: float = field(default=0.3, metadata=_OF_COLOCATED | between(0, 1))
    critic_vllm_max_model_length: int | None = field(default=None, metadata=_OF_COLOCATED | at_least(1))
    critic_learning_rate: float = 1e-6
    critic_pretraining_steps: int = 0
    critic_pretraining_patience: int | None = field(
        default=None, metadata=at_least(1) | unless(critic_pretraining_steps=0)
    )
    critic_validation_steps: int = field(default=10, metadata=at_least(1))

    def __post_init__(self):
        self.reward_range = as_range(self.reward_range)
        super().__post_init__()
        DelimiterSegmenter.of(self)  # refuses lengths that contradict each other
        if self.critic_template is not None:
            hint = ("success_rate",) if self.hint_momentum is not None else ()
            check_template(self.critic_template, (*hint, "problem", "partial_solution"))
            if not hint and "{success_rate}" in self.critic_template:
                raise ValueError(
                    "GenACConfig: `critic_template` has {success_rate}, but with `hint_momentum=None` the critic is "
                    "not told any. Take it out, or set `hint_momentum`."
                )
        if self.critic_vllm_mode == "server" and self.critic_vllm_server_base_url is None:
            raise ValueError("GenACConfig: `critic_vllm_mode='server'` needs `critic_vllm_server_base_url`.")
