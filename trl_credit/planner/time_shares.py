"""Where the time of a step goes, estimated from operations and bytes. Nothing of it has been measured on a GPU."""

import math

from .critics import SEGMENT, reading_of, tokens_about_a_completion
from .setup import PROBE, Setup
from .shape import ModelShape
from .training import BFLOAT16


# Of an H100: operations per second in bfloat16 and bytes per second, and how much of both training and decoding reach.
OPERATIONS, BANDWIDTH = 989e12 * 0.4, 3.35e12 * 0.6
# Seconds in which transformers starts the kernels of one layer for one token, which no batch makes shorter.
LAUNCHES = 0.4e-3
VINE_CONTINUATIONS = 9  # VinePPOConfig's default
# Rows that vLLM, and transformers within the default token budgets, decode at a time.
ROWS_AT_ONCE = 256


def pass_operations(shape: ModelShape, parameters: float, tokens: int, width: int) -> float:
    """Of a forward pass: two for each weight and token, and attention to half of the row on average."""
    attention = 2 * shape.layers * width * shape.heads * shape.head_dim
    return tokens * (2 * parameters + attention)


def update_operations(shape: ModelShape, parameters: float, tokens: int, width: int, checkpointing: bool) -> float:
    """A backward pass is two forward passes; checkpointing makes one more."""
    return (3 + checkpointing) * pass_operations(shape, parameters, tokens, width)


def generation_seconds(shape: ModelShape, rows: int, start: int, tokens: int, read: int, is_vllm: bool) -> float:
    """
    Of `rows` texts of `tokens` new tokens each, behind `start` tokens, of which `read` in all are read anew.

    Decoding reads all weights and the cache for each token: with few rows that is what takes its time.
    """
    seconds = pass_operations(shape, shape.parameters, read, start) / OPERATIONS
    cache = 2 * BFLOAT16 * shape.layers * shape.kv_heads * shape.head_dim
    batches = math.ceil(rows / ROWS_AT_ONCE)
    at_once = rows / batches
    width = start + tokens // 2
    moved = BFLOAT16 * shape.parameters + at_once * width * cache
    step = max(moved / BANDWIDTH, pass_operations(shape, shape.parameters, int(at_once), width) / OPERATIONS)
    if not is_vllm:
        step = max(step, LAUNCHES * shape.layers)
    return seconds + batches * tokens * step


def time_shares(setup: Setup) -> dict[str, float]:
    """
    Seconds of an optimizer step by what they are spent on, with one step per rollout. Read them as shares.

    Args:
        setup ([`~trl_credit.planner.setup.Setup`]):
            The run.
    """
    policy, is_vllm = setup.policy, setup.vllm is not None
    completions = setup.batch * setup.accumulation
    tokens = completions * setup.length
    # vLLM reads a prompt once for all its completions.
    prompts = max(1, completions // setup.generations) if is_vllm else completions
    read = prompts * setup.prompt
    seconds = {
        "generation": generation_seconds(policy, completions, setup.prompt, setup.completion, read, is_vllm),
        "policy's update": update_operations(policy, policy.parameters, tokens, setup.length, setup.checkpointing)
        / OPERATIONS,
    }
    if setup.critic == PROBE:
        seconds["reference"] = pass_operations(policy, policy.parameters, tokens, setup.length) / OPERATIONS
    if setup.method == "vineppo":
        states = math.ceil(setup.completion / SEGMENT)
        rows = completions * states * VINE_CONTINUATIONS
        read = completions * setup.length if is_vllm else rows * setup.length // 2
        seconds["continuations"] = generation_seconds(
            policy, rows, setup.length // 2, setup.completion // 2, read, is_vllm
        )
    if setup.method == "genac":
        seconds |= _seconds_of_answers(setup, completions, is_vllm)
    elif setup.has_critic:
        shape, reading = setup.critic_shape, reading_of(setup)
        own = reading.of.tokens * reading.micro_batches
        width = reading.of.width
        if setup.method not in ("vapo", "bpco"):  # which take their values from the update's own pass
            seconds["critic's values"] = pass_operations(shape, shape.value_model, own, width) / OPERATIONS
        update = update_operations(shape, shape.value_model, own, width, setup.checkpointing)
        seconds["critic's update"] = update / OPERATIONS
    return seconds


def _seconds_of_answers(setup: Setup, completions: int, is_vllm: bool) -> dict[str, float]:
    """What the states of a completion share is read once."""
    shape = setup.critic_shape
    states = math.ceil(setup.completion / SEGMENT)
    total, answers = tokens_about_a_completion(setup)
    start, read, own = setup.length // 2, completions * (total - answers), completions * total
    width = reading_of(setup).of.width
    update = update_operations(shape, shape.parameters, own, width, setup.checkpointing)
    return {
        "critic's answers": generation_seconds(shape, completions * states, start, setup.answer, read, is_vllm),
        "critic's update": update / OPERATIONS,
    }
