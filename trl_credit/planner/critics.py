"""What the critic of each method reads in a micro-batch of its update."""

import math
from dataclasses import dataclass

from .activations import Pass
from .setup import Setup
from .training import BFLOAT16, FLOAT32


# Defaults of GenACConfig.
SEGMENT, UPDATE_BATCH_TOKENS, MASK_MEMORY = 120, 32768, 2 * 2**30
GENERATION_BATCH_TOKENS = 65536
# Tokens of GenAC's template around problem and partial solution, and of those of them that come after both.
QUESTION, TAIL = 200, 40


@dataclass(frozen=True)
class Reading:
    """
    One micro-batch of a critic's update.

    Args:
        of (`Pass`):
            Its forward pass.
        scored (`int`):
            Tokens of answers in it, of a critic that writes; 0 of one with a head of one number.
        micro_batches (`int`):
            Micro-batches of an update.
    """

    of: Pass
    scored: int
    micro_batches: int


def reading_of(setup: Setup) -> Reading:
    """The largest micro-batch of the critic's update."""
    if setup.method == "genac":
        return _reading_of_answers(setup)
    if setup.method == "sppo":
        # Distinct prompts of a step, as many at once as have the tokens of the policy's completions.
        prompts = max(1, setup.batch * setup.accumulation // setup.generations)
        rows = min(prompts, setup.batch * max(1, setup.completion // setup.prompt))
        return Reading(Pass(rows, setup.prompt, setup.padded, lora_rank=setup.lora_rank), 0, math.ceil(prompts / rows))
    return Reading(Pass(setup.batch, setup.length, setup.padded, lora_rank=setup.lora_rank), 0, setup.accumulation)


def tokens_about_a_completion(setup: Setup) -> tuple[int, int]:
    """
    Tokens of all that GenAC's critic reads about a completion, each prefix once, and of its answers among them. No
    state has read the last segment, and nothing is chosen after the last token of an answer.
    """
    states = math.ceil(setup.completion / SEGMENT)
    shared = QUESTION + setup.length - min(SEGMENT, setup.completion)
    return shared + states * (TAIL + setup.answer - 1), states * setup.answer


def _reading_of_answers(setup: Setup) -> Reading:
    total, answers = tokens_about_a_completion(setup)
    itemsize = BFLOAT16 if setup.compute == "bfloat16" else FLOAT32
    # On a GPU FlexAttention needs no mask of numbers.
    longest = min(UPDATE_BATCH_TOKENS, math.isqrt(MASK_MEMORY // itemsize) if setup.on_cpu else UPDATE_BATCH_TOKENS)
    completions = setup.batch * setup.accumulation
    if total <= longest:
        at_once = min(completions, UPDATE_BATCH_TOKENS // total)
        if setup.on_cpu:
            at_once = min(at_once, MASK_MEMORY // (itemsize * total**2))
        width, scored, micro_batches = total, at_once * answers, math.ceil(completions / at_once)
    else:  # several rows for a completion, each with the shared text up to its last state
        branch = TAIL + setup.answer - 1
        shared = total - answers // setup.answer * branch
        at_once, width = 1, max(longest, shared + branch)
        scored = (width - shared) * setup.answer // branch
        micro_batches = completions * math.ceil(answers / scored)
    return Reading(
        Pass(at_once, width, masked=setup.on_cpu, own_mask=True, lora_rank=setup.lora_rank), scored, micro_batches
    )
