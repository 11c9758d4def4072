"""What trainers add to a rollout, declared with shapes and checked."""

import re
from typing import Any


def declared_keys(trainer_class: type) -> dict[str, str]:
    """`rollout_keys` of a trainer's class and all its bases."""
    keys: dict[str, str] = {}
    for cls in reversed(trainer_class.__mro__):
        keys.update(vars(cls).get("rollout_keys", {}))
    return keys


def check_keys(rollout: dict, known: set[str], declared: dict[str, str], trainer: str) -> None:
    """
    Check what `assign_credit` returned.

    Args:
        rollout (`dict`):
            The rollout that it returned.
        known (`set[str]`):
            Keys of the rollout that it was given.
        declared (`dict[str, str]`):
            Further keys and their shapes, e.g. `"(B, T)"`: B completions, T tokens, any other letter for a size of its
            own; `"[B]"` for a list of B things.
        trainer (`str`):
            Whose they are, for the error.

    Raises:
        ValueError: If a key is not declared, or has another shape.
    """
    batch, tokens = rollout["completion_ids"].shape
    allowed = {**declared, "advantages": "(B,) or (B, T)"}
    for key in [*sorted(set(rollout) - known), "advantages"]:
        if key not in allowed:
            raise ValueError(
                f"{trainer}.assign_credit added {key!r} to the rollout, shape {_shape(rollout[key])}, which "
                f"`rollout_keys` does not declare. Declared are {declared}: add it there, with its shape."
            )
        shape = _shape(rollout[key])
        if not any(_fits(shape, wanted, {"B": batch, "T": tokens}) for wanted in allowed[key].split(" or ")):
            raise ValueError(
                f"{trainer}.assign_credit returned {key!r} of shape {shape}, and declared is {allowed[key]} with "
                f"B = {batch} completions and T = {tokens} tokens."
            )


def _shape(value: Any) -> str:
    """`(2, 3)` of a tensor, `[2]` of a list; else its type."""
    if isinstance(value, list):
        return f"[{len(value)}]"
    return str(tuple(value.shape)) if hasattr(value, "shape") else type(value).__name__


def _fits(shape: str, wanted: str, sizes: dict[str, int]) -> bool:
    sides = re.findall(r"\w+", wanted)
    numbers = re.findall(r"\w+", shape)
    return (
        shape[0] == wanted[0]
        and len(sides) == len(numbers)
        and all(str(sizes.get(side, number)) == number for side, number in zip(sides, numbers, strict=True))
    )
