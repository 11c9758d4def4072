"""What a plan is made for: the options of `trl-credit plan`."""

from dataclasses import dataclass

from .shape import ModelShape


TOKEN_CRITICS = ("vapo", "sao", "bpco")  # a value for each token
METHODS_WITH_CRITIC = (*TOKEN_CRITICS, "sppo", "genac")
PLANNED_METHODS = ("grpo", "grpo-lambda", "vineppo", *METHODS_WITH_CRITIC)
SHARDINGS = ("ddp", "zero2", "zero3", "fsdp2")
PROBE = "probe"


@dataclass(frozen=True)
class Setup:
    """
    A run, as far as memory and time depend on it.

    Args:
        method (`str`):
            One of `PLANNED_METHODS`.
        policy ([`~trl_credit.planner.shape.ModelShape`]):
            The policy.
        critic ([`~trl_credit.planner.shape.ModelShape`] or `str`, *optional*):
            What the critic starts from, or `"probe"`. Default: as the policy, where the method has a critic.
        gpus (`int`, *optional*, defaults to `1`):
            GPUs of the run.
        gpu_memory (`float`, *optional*, defaults to `80.0`):
            GiB of each.
        sharding (`str`, *optional*):
            One of `SHARDINGS`, with several GPUs. Default: `"ddp"`.
        prompt (`int`, *optional*, defaults to `512`):
            Tokens of a prompt.
        completion (`int`, *optional*, defaults to `8192`):
            Tokens of a completion.
        batch (`int`, *optional*, defaults to `1`):
            Completions of a micro-batch, `per_device_train_batch_size`.
        accumulation (`int`, *optional*, defaults to `8`):
            Micro-batches of an optimizer step, `gradient_accumulation_steps`.
        generations (`int`, *optional*, defaults to `8`):
            Completions of a prompt, `num_generations`.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of the policy's weights as they are loaded: `"float32"`, which is TRL's default, or `"bfloat16"`.
        critic_dtype (`str`, *optional*, defaults to `"float32"`):
            The same of the critic's, with adapters: weights that are trained are float32 in any case.
        compute (`str`, *optional*, defaults to `"bfloat16"`):
            What they compute in: `"bfloat16"`, as with TRL's default `bf16=True`, or `"float32"`.
        lora_rank (`int`, *optional*, defaults to `0`):
            Rank of adapters of policy and critic on all linear layers; 0 for none.
        shared_base (`bool`, *optional*, defaults to `False`):
            Whether the critic is a second adapter on the policy's base.
        checkpointing (`bool`, *optional*, defaults to `True`):
            Gradient checkpointing, which is TRL's default.
        vllm (`float`, *optional*):
            Share of the GPU's memory for a colocated vLLM. Default: transformers generates.
        vllm_sleep (`bool`, *optional*, defaults to `False`):
            Whether vLLM gives its memory back during updates.
        answer (`int`, *optional*, defaults to `1024`):
            Tokens of an answer of GenAC's critic.
        padded (`bool`, *optional*, defaults to `True`):
            Whether completions differ in length, so that attention has a mask.
        on_cpu (`bool`, *optional*, defaults to `False`):
            Whether it runs on a CPU, for the comparison with measurements.

    Raises:
        ValueError: If an option has no effect or contradicts another.
    """

    method: str
    policy: ModelShape
    critic: ModelShape | str | None = None
    gpus: int = 1
    gpu_memory: float = 80.0
    sharding: str | None = None
    prompt: int = 512
    completion: int = 8192
    batch: int = 1
    accumulation: int = 8
    generations: int = 8
    dtype: str = "float32"
    critic_dtype: str = "float32"
    compute: str = "bfloat16"
    lora_rank: int = 0
    shared_base: bool = False
    checkpointing: bool = True
    vllm: float | None = None
    vllm_sleep: bool = False
    answer: int = 1024
    padded: bool = True
    on_cpu: bool = False

    def __post_init__(self):
        """Refuse what has no meaning."""
        whole = ("gpus", "prompt", "completion", "batch", "accumulation", "generations", "answer")
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.lora_rank < 0:
            raise ValueError(f"`lora_rank` must be at least 0, got {self.lora_rank}.")
        if self.gpu_memory <= 0:
            raise ValueError(f"`gpu_memory` must be above 0, got {self.gpu_memory}.")
        if self.vllm is not None and not 0 < self.vllm < 1:
            raise ValueError(f"`vllm` must be between 0 and 1, got {self.vllm}.")
        if self.method not in PLANNED_METHODS:
            raise ValueError(f"`method` must be one of {', '.join(PLANNED_METHODS)}, got {self.method!r}.")
        if self.gpus == 1 and self.sharding is not None:
            raise ValueError(f"`sharding={self.sharding!r}` has no effect on one GPU. Drop it.")
        if self.vllm_sleep and self.vllm is None:
            raise ValueError("`vllm_sleep` has no effect without `vllm`. Drop it.")
        if self.critic_dtype != "float32" and (not self.has_critic or not self.lora_rank or self.shared_base):
            raise ValueError(
                f"`critic_dtype={self.critic_dtype!r}` has no effect: it is for the base of a critic with adapters "
                "(`lora_rank`) that is not shared. Drop it."
            )
        if self.critic is not None and self.method not in METHODS_WITH_CRITIC:
            raise ValueError(f"`critic` has no effect: {self.method} has none. Drop it.")
        if self.critic == PROBE and self.method not in ("vapo", "bpco"):
            raise ValueError(f"`critic='probe'` is for vapo and bpco, got {self.method}.")
        if self.shared_base:
            if self.method not in (*TOKEN_CRITICS, "sppo") or self.critic is not None:
                raise ValueError("`shared_base` is for a critic of vapo, sao, bpco or sppo that is the policy's own.")
            if not self.lora_rank:
                raise ValueError("`shared_base` needs a frozen base: set `lora_rank`.")
            if self.sharding not in (None, "ddp"):
                raise ValueError(f"`shared_base` works on one GPU and with ddp, got {self.sharding}.")
        if self.batch * self.accumulation * self.gpus % self.generations:
            raise ValueError(
                f"A step has batch {self.batch} x accumulation {self.accumulation} x {self.gpus} GPUs = "
                f"{self.batch * self.accumulation * self.gpus} completions, which `generations={self.generations}` "
                "does not divide."
            )

    @property
    def split(self) -> str:
        """How weights are spread: `"one"`, or one of `SHARDINGS`."""
        return "one" if self.gpus == 1 else self.sharding or "ddp"

    @property
    def has_critic(self) -> bool:
        """Whether a network is trained beside the policy; a probe is next to none."""
        return self.method in METHODS_WITH_CRITIC and self.critic != PROBE

    @property
    def critic_shape(self) -> ModelShape:
        """What the critic starts from."""
        return self.critic if isinstance(self.critic, ModelShape) else self.policy

    @property
    def length(self) -> int:
        """Tokens of a prompt and its completion."""
        return self.prompt + self.completion
