"""What is on a GPU, and when: the parts of a plan."""

from dataclasses import dataclass

from .activations import Pass, Precision
from .critics import GENERATION_BATCH_TOKENS, reading_of
from .generation import cache_bytes, gathered_for_generation, step_logits_bytes
from .logits import CRITICS_TILE_WORDS_ON_CPU, TILE_WORDS
from .setup import PROBE, Setup
from .shape import ModelShape
from .training import FLOAT32, ITEMSIZE, Training, training
from .update import Head, Moment, worst_moment


GIB = 2**30
# When: transformers or vLLM generates, GenAC's critic answers, the policy is updated, the critic is, and AdamW steps.
PHASES = ("generation", "critic's answers", "policy's update", "critic's update", "critic's step")
GENERATION, ANSWERS, POLICY, CRITIC, STEP = PHASES
# Of a process on a GPU: CUDA's context, workspaces of cuBLAS, what the allocator cannot use.
PROCESS = 1.5 * GIB


@dataclass(frozen=True)
class Part:
    """
    Something in memory.

    Args:
        owner (`str`):
            Whose it is: `"policy"`, `"critic"`, `"reference"`, `"vLLM"`, `"process"`.
        what (`str`):
            What it is.
        bytes (`dict[str, float]`):
            By phase; not there in others.
    """

    owner: str
    what: str
    bytes: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """
    Where the memory of a GPU goes.

    Args:
        setup ([`~trl_credit.planner.setup.Setup`]):
            What it was made for.
        parts (`list[Part]`):
            What is there.
    """

    setup: Setup
    parts: list[Part]

    @property
    def phases(self) -> list[str]:
        """Those that the run has."""
        left_out = set() if self.setup.method == "genac" else {ANSWERS}
        if not self.setup.has_critic:
            left_out |= {CRITIC, STEP}
        return [phase for phase in PHASES if phase not in left_out]

    def total(self, phase: str) -> float:
        """Bytes in a phase."""
        return sum(part.bytes.get(phase, 0.0) for part in self.parts)

    @property
    def peak(self) -> float:
        """Bytes in the phase that has most."""
        return max(map(self.total, self.phases))

    @property
    def fits(self) -> bool:
        """Whether the GPU has as much."""
        return self.peak <= self.setup.gpu_memory * GIB


def make_plan(setup: Setup) -> Plan:
    """Where the memory of a GPU goes in a run."""
    policy, precision = policy_training(setup), policy_precision(setup)
    parts = [
        Part("policy", "weights", dict.fromkeys(PHASES, policy.weights)),
        Part("policy", "optimizer", dict.fromkeys(PHASES, policy.optimizer)),
    ]
    update = policy_update(setup, policy, precision)
    # The critic is updated when the policy has none.
    parts.append(Part("policy", "gradients", {POLICY: update.gradients}))
    # DDP keeps its buckets, ZeRO and FSDP2 let go of what they have gathered.
    gathered = dict.fromkeys(PHASES if setup.split == "ddp" else (POLICY,), policy.gathered)
    parts.append(Part("policy", "gathered weights and buckets", gathered))
    parts.append(Part("policy", "activations", {POLICY: update.activations}))
    parts.append(Part("policy", "logits", {POLICY: update.logits}))
    if setup.critic == PROBE and not setup.lora_rank:  # with adapters the policy without them is the reference
        frozen = training(setup.policy.parameters, 0, *_itemsizes(setup), setup.split, setup.gpus, 0, 0)
        parts.append(Part("reference", "weights", dict.fromkeys(PHASES, frozen.weights)))
    if setup.has_critic:
        parts += critic_parts(setup)
    parts += generation_parts(setup, precision)
    if not setup.on_cpu:
        parts.append(Part("process", "CUDA and fragments, a guess", dict.fromkeys(PHASES, PROCESS)))
    return Plan(setup, [part for part in parts if any(part.bytes.values())])


# --- The policy


def policy_precision(setup: Setup) -> Precision:
    """ZeRO and FSDP2 compute on weights in bfloat16, whatever they were loaded in."""
    compute = ITEMSIZE[setup.compute]
    return Precision(ITEMSIZE[setup.dtype] if setup.split in ("one", "ddp") else compute, compute)


def policy_training(setup: Setup) -> Training:
    """TRL's default for the policy is a fused AdamW."""
    shape = setup.policy
    adapters = shape.adapters(setup.lora_rank)
    frozen, trained = (shape.parameters, adapters) if setup.lora_rank else (0, shape.parameters)
    return training(
        frozen,
        trained,
        *_itemsizes(setup),
        setup.split,
        setup.gpus,
        _layer(shape),
        2 * shape.embeddings,
        accumulates_whole=setup.accumulation > 1,
    )


def policy_update(setup: Setup, trained: Training, precision: Precision) -> Moment:
    """Of a micro-batch."""
    of = Pass(setup.batch, setup.length, setup.padded, lora_rank=setup.lora_rank)
    # With Triton only positions of the completion are scored.
    scored = setup.batch * (setup.length - 1 if setup.on_cpu else setup.completion)
    return worst_moment(
        setup.policy,
        precision,
        of,
        trained.gradients,
        setup.accumulation > 1,
        setup.checkpointing,
        Head(scored, TILE_WORDS, not setup.lora_rank, setup.on_cpu),
    )


# --- The critic


def critic_precision(setup: Setup) -> Precision:
    """Its weights are float32 by default, those that it shares are the policy's."""
    compute = ITEMSIZE[setup.compute]
    if setup.split not in ("one", "ddp"):
        return Precision(compute, compute)
    return Precision(ITEMSIZE[setup.dtype if setup.shared_base else setup.critic_dtype], compute)


def critic_training(setup: Setup) -> Training:
    """The default for critics is an AdamW that is not fused."""
    shape = setup.critic_shape
    whole = shape.parameters if setup.method == "genac" else shape.value_model
    layer = _layer(shape)
    if setup.lora_rank:
        frozen = 0 if setup.shared_base else whole
        trained = shape.adapters(setup.lora_rank)
    else:
        frozen = shape.attention if setup.method == "sao" else 0
        trained = whole - frozen
    return training(
        frozen,
        trained,
        ITEMSIZE[setup.critic_dtype],
        FLOAT32,
        setup.split,
        setup.gpus,
        layer,
        shape.embeddings * (2 if setup.method == "genac" else 1),
        is_fused=False,
        largest=shape.largest_matrix if setup.on_cpu else None,
    )


def critic_parts(setup: Setup) -> list[Part]:
    """What a network beside the policy adds."""
    shape, trained, precision = setup.critic_shape, critic_training(setup), critic_precision(setup)
    reading = reading_of(setup)
    head = None
    if setup.method == "genac":
        words = CRITICS_TILE_WORDS_ON_CPU if setup.on_cpu else TILE_WORDS
        scored = reading.of.tokens if setup.on_cpu else reading.scored
        head = Head(scored, words, not setup.lora_rank, setup.on_cpu)
    accumulates = reading.micro_batches > 1
    gathered = dict.fromkeys(PHASES if setup.split == "ddp" else (CRITIC,), trained.gathered)
    update = worst_moment(shape, precision, reading.of, trained.gradients, accumulates, setup.checkpointing, head)
    return [
        Part("critic", "weights", dict.fromkeys(PHASES, trained.weights)),
        Part("critic", "optimizer", dict.fromkeys(PHASES, trained.optimizer)),
        Part("critic", "gradients", {CRITIC: update.gradients, STEP: trained.gradients}),
        Part("critic", "gathered weights and buckets", gathered),
        Part("critic", "activations", {CRITIC: update.activations}),
        Part("critic", "logits", {CRITIC: update.logits}),
        Part("critic", "roots of AdamW", {STEP: trained.step}),
    ]


# --- Generation


def generation_parts(setup: Setup, precision: Precision) -> list[Part]:
    """vLLM's share, or the caches of transformers: of the policy, and of a critic that writes."""
    parts = []
    if setup.vllm is not None:
        # It writes the answers of GenAC's critic too, with the critic's weights.
        awake = (GENERATION, ANSWERS) if setup.vllm_sleep else PHASES
        share = setup.vllm * setup.gpu_memory * GIB
        parts.append(Part("vLLM", "its share", dict.fromkeys(awake, share)))
    else:
        completions = setup.batch * setup.accumulation  # of a rollout, which is one step by default
        cache = cache_bytes(setup.policy, precision, completions * setup.length)
        logits = step_logits_bytes(completions, setup.policy.vocab)
        gathered = gathered_for_generation(setup, setup.policy)
        parts.append(Part("policy", "cache of generation", {GENERATION: cache + logits + gathered}))
    if setup.method == "genac" and setup.vllm is None:
        shape = setup.critic_shape
        cache = cache_bytes(shape, critic_precision(setup), GENERATION_BATCH_TOKENS)
        gathered = gathered_for_generation(setup, shape)
        parts.append(Part("critic", "cache of generation", {ANSWERS: cache + gathered}))
    return parts


def _itemsizes(setup: Setup) -> tuple[int, int]:
    """Bytes of a frozen and of a trained weight of the policy: adapters are float32."""
    return ITEMSIZE[setup.dtype], FLOAT32 if setup.lora_rank else ITEMSIZE[setup.dtype]


def _layer(shape: ModelShape) -> float:
    """Parameters of a layer."""
    return sum(inputs * outputs for inputs, outputs in shape.linear) / shape.layers
