"""Which traces the critic learns from, and in what form."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ....critics.generative.question import parse_score
from ....journal import write_rows


def reason_to_drop(row: dict, tokens: int, shortest: int, longest: int, max_disagreement: float | None) -> str | None:
    """
    Why a trace is not one to learn from.

    Args:
        row (`dict`):
            `trace`; `cut_off`, whether the oracle ran out of room; and `reward`, if known.
        tokens (`int`):
            Its length in tokens of the critic.
        shortest, longest (`int`):
            Least and most tokens.
        max_disagreement (`float`, *optional*):
            How far the value may be from the reward.

    Returns:
        `str` or `None`: The reason, or `None` if it is kept.
    """
    trace = row["trace"].rstrip()
    value = parse_score(trace)
    if row.get("cut_off"):
        return "cut off"
    if value is None:
        return "no score"
    if not trace.endswith("</score>"):
        return "text after the score"
    if tokens < shortest:
        return "too short"
    if tokens > longest:
        return "too long"
    reward = row.get("reward")
    limit = math.inf if max_disagreement is None else max_disagreement + 1e-9  # tenths are not exact in binary
    if reward is not None and abs(value - reward) > limit:
        return "far from the outcome"
    return None


def write_dataset(rows: Iterable[dict], folder: Path, tokenizer, shortest: int, longest: int, max_disagreement=None):
    """
    Write `train.jsonl`, prompts and completions as [`~trl.SFTTrainer`] takes them: messages if the critic's tokenizer
    has a chat template, else text.

    Args:
        rows (`Iterable[dict]`):
            `query`, `trace`, and if known `cut_off` and `reward`.
        folder (`Path`):
            For `load_dataset` or `--dataset_name`.
        tokenizer:
            The critic's.
        shortest, longest (`int`):
            Least and most tokens of a trace.
        max_disagreement (`float`, *optional*):
            How far a value may be from the reward.

    Returns:
        `dict`: Numbers: `traces`, `kept`, `dropped` for each reason, `value_mean` and, of those with a reward,
        `reward_mean` and `mse`.

    Raises:
        ValueError: If a row has no query or trace, or no trace is kept.
    """
    kept: list[tuple[dict, float]] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row, dict) and isinstance(row.get("query"), str) and isinstance(row.get("trace"), str)):
            raise ValueError(f"Trace {number} must have the texts `query` and `trace`, got {str(row)[:200]}.")
        tokens = len(tokenizer(row["trace"], add_special_tokens=False)["input_ids"])
        if reason := reason_to_drop(row, tokens, shortest, longest, max_disagreement):
            dropped[reason] += 1
        else:
            kept.append((row, parse_score(row["trace"]) or 0.0))
    if not kept:
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.most_common()) or "there are none"
        raise ValueError(f"No trace is left to learn from: {reasons}.")
    write_rows(folder / "train.jsonl", [_example(row, tokenizer.chat_template is not None) for row, _ in kept])
    summary = {
        "traces": len(kept) + dropped.total(),
        "kept": len(kept),
        "dropped": dict(dropped.most_common()),
        "value_mean": sum(value for _, value in kept) / len(kept),
    }
    pairs = [(value, row["reward"]) for row, value in kept if row.get("reward") is not None]
    if pairs:
        summary["reward_mean"] = sum(reward for _, reward in pairs) / len(pairs)
        summary["mse"] = sum((value - reward) ** 2 for value, reward in pairs) / len(pairs)
    return summary


def _example(row: dict, is_chat: bool) -> dict:
    prompt, completion = row["query"], row["trace"].rstrip()
    if is_chat:
        prompt = [{"role": "user", "content": prompt}]
        completion = [{"role": "assistant", "content": completion}]
    return {"prompt": prompt, "completion": completion}
