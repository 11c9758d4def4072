"""What users hand over, read and checked: reward functions, rollout functions, where generation stops."""

import functools
import itertools
import math
from collections.abc import Iterable
from numbers import Real
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from trl.trainer.utils import is_async_callable


logger = get_logger(__name__)


class TurnScores(NamedTuple):
    """
    Rewards that are not one per token of a completion, and so have to be one per turn.

    Args:
        rewards (`list[float]`):
            0 where none was given.
        tokens (`int`):
            Those of the completion.
    """

    rewards: list[float]
    tokens: int


def distinct_names(names: list[str]) -> list[str]:
    """Names of reward functions, by which metrics and columns go: the second `reward` is `reward_2`."""
    distinct: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        distinct.append(name if name not in distinct else next(new for new in numbered if new not in distinct))
    return distinct


def checked_reward_func(func, name: str, token_scores: dict | None = None):
    """
    `func`, with an error that says which reward is not one. TRL itself checks their number. Rewards per token or per
    turn go to `token_scores`, if there is one, and their sum to TRL: tokens and turns that are `None` or NaN are not
    scored, which is 0, and a completion of which none is scored is not.
    """

    def check_number(reward, where):
        if not (isinstance(reward, Real) or (hasattr(reward, "item") and torch.as_tensor(reward).numel() == 1)):
            is_list = isinstance(reward, (list, tuple)) and token_scores is None
            raise TypeError(
                f"Reward function {name!r} returned {reward!r} ({type(reward).__name__}) for {where}. A reward must be "
                "a finite number, or None for what it does not score."
                + " Rewards per token or per turn are for trainers that place them, as VAPOTrainer does."
                * is_list
            )

    def warn_of_nan(where):
        logger.warning(f"Reward function {name!r} returned NaN for {where}: it counts as not scored.")

    def check_tokens(row, scores, completion_ids):
        per_token = completion_ids is None or len(scores) == len(completion_ids[row])
        part = "token" if per_token else "turn"
        numbers = []
        for token, score in enumerate(scores):
            where = f"{part} {token} of completion {row}"
            if score is not None:
                check_number(score, where)
            number = math.nan if score is None else float(score)
            if math.isinf(number):
                raise ValueError(
                    f"Reward function {name!r} returned {number} for {where}. A reward must be a finite number, or "
                    "None for what it does not score."
                )
            numbers.append(number)
        nans = [token for token, score in enumerate(scores) if score is not None and math.isnan(score)]
        if nans:
            warn_of_nan(f"{len(nans)} of the {part}s of completion {row}, first for {part} {nans[0]}")
        if all(map(math.isnan, numbers)):
            return None
        assert token_scores is not None
        known = [0.0 if math.isnan(number) else number for number in numbers]
        token_scores[row] = known if per_token else TurnScores(known, len(completion_ids[row]))
        return sum(known)

    def check(rewards, completion_ids=None):
        if isinstance(rewards, list) and token_scores is not None:
            rewards = [
                check_tokens(row, reward, completion_ids) if isinstance(reward, (list, tuple)) else reward
                for row, reward in enumerate(rewards)
            ]
        one_each = isinstance(rewards, Iterable) and not isinstance(rewards, (str, dict))
        if not one_each or getattr(rewards, "ndim", 1) != 1:
            raise TypeError(
                f"Reward function {name!r} returned {rewards!r}. It must return a list with one number, or None, for "
                "each completion."
            )
        rewards = list(rewards)  # a generator can be read only once
        for row, reward in enumerate(rewards):
            if reward is not None:
                check_number(reward, f"completion {row}")
                if math.isnan(reward):
                    warn_of_nan(f"completion {row}")
        return rewards

    if is_async_callable(func):

        @functools.wraps(func)
        async def checked(*args, **kwargs):
            return check(await func(*args, **kwargs), kwargs.get("completion_ids"))
    else:

        @functools.wraps(func)
        def checked(*args, **kwargs):
            return check(func(*args, **kwargs), kwargs.get("completion_ids"))

    return checked


def stop_token_ids(generation_kwargs: dict | None) -> list[int]:
    """Tokens at which `generation_kwargs` ends completions, by their names in transformers and in vLLM."""
    given = [(generation_kwargs or {}).get(name) for name in ("eos_token_id", "stop_token_ids")]
    return [token for tokens in given for token in ([tokens] if isinstance(tokens, int) else tokens or [])]


def checked_rollout_func(func):
    """`func`, with an error for a completion of no tokens, which has no last state to score."""

    @functools.wraps(func)
    def checked(prompts, trainer):
        output = func(prompts, trainer)
        if not isinstance(output, dict):
            raise TypeError(
                f"`rollout_func` returned {output!r}. It must return a dict of lists, `completion_ids` among them."
            )
        for row, ids in enumerate(output.get("completion_ids", ())):
            if len(ids) == 0:
                raise ValueError(
                    f"`rollout_func` returned an empty completion for prompt {row}. Each must have at least one token, "
                    "e.g. EOS alone."
                )
        return output

    return checked


# --- The command line
