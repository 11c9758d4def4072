"""What to change so that a run fits."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from .memory import Plan, make_plan
from .setup import TOKEN_CRITICS, Setup


class Change(NamedTuple):
    """
    A change to a setup.

    Args:
        text (`str`):
            What it is, as a user sets it.
        plan ([`~trl_credit.planner.memory.Plan`]):
            With this and all changes before it.
    """

    text: str
    plan: Plan


def _one_row(setup: Setup) -> Setup | None:
    if setup.batch == 1:
        return None
    return replace(setup, batch=1, accumulation=setup.batch * setup.accumulation)


def _sharded(setup: Setup) -> Setup | None:
    if setup.split not in ("ddp", "zero2") or setup.shared_base:
        return None
    return replace(setup, sharding="zero3")


def _shared(setup: Setup) -> Setup | None:
    fits = setup.method in (*TOKEN_CRITICS, "sppo") and setup.critic is None and setup.lora_rank
    return replace(setup, shared_base=True, critic_dtype="float32") if fits and setup.split in ("one", "ddp") else None


def _with_adapters(setup: Setup) -> Setup | None:
    return None if setup.lora_rank else replace(setup, lora_rank=32)


def _low_precision_base(setup: Setup) -> Setup | None:
    # Of weights that are trained in bfloat16 most updates would be lost to rounding; those of a base are not trained.
    return replace(setup, dtype="bfloat16") if setup.lora_rank and setup.dtype == "float32" else None


def _low_precision_critic(setup: Setup) -> Setup | None:
    if not setup.lora_rank or not setup.has_critic or setup.shared_base or setup.critic_dtype == "bfloat16":
        return None
    return replace(setup, critic_dtype="bfloat16")


# In the order of what they cost: time first, then what the run is.
_CHANGES: tuple[tuple[str, Callable[[Setup], Setup | None]], ...] = (
    ("gradient checkpointing", lambda setup: None if setup.checkpointing else replace(setup, checkpointing=True)),
    (
        "vllm_enable_sleep_mode=True",
        lambda setup: replace(setup, vllm_sleep=True) if setup.vllm is not None and not setup.vllm_sleep else None,
    ),
    (
        "use_vllm=True with vllm_gpu_memory_utilization=0.3 and sleep mode",
        lambda setup: replace(setup, vllm=0.3, vllm_sleep=True) if setup.vllm is None else None,
    ),
    ("per_device_train_batch_size=1, accumulated as often as makes the same step", _one_row),
    ("--accelerate_config zero3", _sharded),
    ("adapters of rank 32 (--use_peft, critic_peft_config)", _with_adapters),
    ("a base in bfloat16 (dtype)", _low_precision_base),
    ('critic_model_init_kwargs={"dtype": "bfloat16"}', _low_precision_critic),
    ("critic_share_base=True", _shared),
)


def advice(setup: Setup) -> list[Change]:
    """
    Changes one after the other, each of which lowers the peak, until the run fits or there are no more.

    Args:
        setup ([`~trl_credit.planner.setup.Setup`]):
            What does not fit.
    """
    plan, changes = make_plan(setup), []
    for text, change in _CHANGES:
        if plan.fits:
            break
        changed = change(plan.setup)
        if changed is None:
            continue
        after = make_plan(changed)
        if after.peak < 0.99 * plan.peak:
            plan = after
            changes.append(Change(text, plan))
    return changes
