"""What completions of the probes are worth: TRL's reward functions, summed as the trainers sum them."""

from collections.abc import Callable, Sequence

import torch

from ..credit.rewards import weighted_reward


class Scorer:
    """
    Reward functions and their weights.

    Args:
        funcs (`Callable` or a list of them):
            Reward functions as TRL's. One that returns `None` or NaN for a completion does not score it.
        weights (`list[float]`, *optional*):
            Weight of each function, as TRL's `reward_weights`. Default: 1 for each.

    Raises:
        ValueError: Weights that are not as many as the functions, or not finite.
    """

    def __init__(self, funcs: Callable | Sequence[Callable], weights: Sequence[float] | None = None):
        self.funcs = list(funcs) if isinstance(funcs, Sequence) else [funcs]
        self.names = [f"{f.__module__}.{getattr(f, '__qualname__', type(f).__qualname__)}" for f in self.funcs]
        self.weights = torch.tensor(
            [1.0] * len(self.funcs) if weights is None else [*map(float, weights)], dtype=torch.float64
        )
        if len(self.weights) != len(self.funcs):
            raise ValueError(f"`reward_weights` has {len(self.weights)} weights for {len(self.funcs)} functions.")
        if not self.weights.isfinite().all():
            raise ValueError(f"`reward_weights` must be finite, got {self.weights.tolist()}.")

    def __call__(self, rows: Sequence[dict], completion_ids: list[list[int]], tokenizer) -> list[float]:
        """
        Weighted sums of the rewards of completions, each of one of the rows; NaN where no function scored it.

        Raises:
            ValueError: A function returns as many rewards as there are completions, each finite or `None`, or is named.
        """
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        conversational = not isinstance(rows[0]["prompt"], str)
        arguments = {
            "prompts": [row["prompt"] for row in rows],
            "completions": [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts,
            "completion_ids": completion_ids,
            **{name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")},
        }
        scores = torch.full((len(rows), len(self.funcs)), torch.nan, dtype=torch.float64)
        for column, (func, name) in enumerate(zip(self.funcs, self.names, strict=True)):
            rewards = list(func(**arguments))
            if len(rewards) != len(rows):
                raise ValueError(f"{name} returned {len(rewards)} rewards for {len(rows)} completions.")
            scores[:, column] = torch.tensor(
                [torch.nan if x is None else float(x) for x in rewards], dtype=torch.float64
            )
            if len(infinite := scores[:, column].isinf().nonzero()):
                row = int(infinite[0])
                raise ValueError(
                    f"{name} returned {rewards[row]} for a completion of the prompt {str(rows[row]['prompt'])[:100]!r}."
                    " A reward is a finite number, or None where a completion cannot be scored."
                )
        return weighted_reward(scores, self.weights).tolist()
