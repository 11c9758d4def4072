"""
Walks over symbols: tasks in which every step matters a little, and the exact value of every state is known.

There are N symbols and two fixed random permutations of them. The prompt ends in a symbol x; a completion is a walk of
K steps from it. A step from x is right if it goes to f(x); a slip goes to g(x). The reward is 1 if at least `need` of
the steps are right. The start policy imitates a teacher that is right with 0.9, but with 0.35 on half of the symbols.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Path(NamedTuple):
    """Where walks are before each token and after the last, each of shape `(B, T + 1)`."""

    symbol: torch.Tensor
    right: torch.Tensor  # steps that were right so far
    left: torch.Tensor  # steps that are left; 0 for good where a step went to no symbol


@dataclass(frozen=True)
class WalkTask:
    """
    A task of walks.

    Args:
        symbols (`int`):
            N.
        steps (`int`):
            K.
        marks (`tuple[int, ...]`):
            How many steps must be right. Of several, a token of the prompt tells which.
        counts (`bool`, *optional*, defaults to `False`):
            Whether the model writes before each step how many were right so far.
        seed (`int`, *optional*, defaults to `0`):
            Of the permutations and of the teacher's weak half.
    """

    symbols: int
    steps: int
    marks: tuple[int, ...]
    counts: bool = False
    seed: int = 0
    sure: float = 0.9
    unsure: float = 0.35

    # --- Tokens: symbols, counts, marks, the two special ones

    @property
    def words(self) -> list[str]:
        counts = [str(count) for count in range(self.steps + 1)] if self.counts else []
        marks = [f"m{mark}" for mark in self.marks] if len(self.marks) > 1 else []
        return [*(f"s{i}" for i in range(self.symbols)), *counts, *marks, "<eos>", "<pad>"]

    @property
    def completion_length(self) -> int:
        return self.steps * (1 + self.counts)

    def _first_mark(self) -> int:
        return self.symbols + (self.steps + 1 if self.counts else 0)

    def permutations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """f and g, each of shape `(N,)`; they nowhere agree."""
        generator = torch.Generator().manual_seed(self.seed)
        f = torch.randperm(self.symbols, generator=generator)
        while True:
            g = torch.randperm(self.symbols, generator=generator)
            if self.symbols < 3 or not (same := f == g).any():
                return f, g
            # Shift the symbols that agree among themselves and one more; a few tries at most.
            among = torch.cat([same.nonzero().squeeze(1), (~same).nonzero().squeeze(1)[:1]])
            g[among] = g[among.roll(1)]
            if not (f == g).any():
                return f, g

    def skill(self) -> torch.Tensor:
        """How often the teacher is right at each symbol, shape `(N,)`."""
        order = torch.randperm(self.symbols, generator=torch.Generator().manual_seed(self.seed + 1))
        skill = torch.full((self.symbols,), self.sure)
        skill[order[: self.symbols // 2]] = self.unsure
        return skill

    # --- Prompts and the teacher's walks

    def contexts(self) -> torch.Tensor:
        """For each symbol what a policy has read when it takes the first step from there, shape `(N, C)`."""
        symbols = torch.arange(self.symbols).unsqueeze(1)
        before, after = [], []
        if len(self.marks) > 1:
            before = [torch.full_like(symbols, self._first_mark() + len(self.marks) // 2)]
        if self.counts:
            after = [torch.full_like(symbols, self.symbols)]  # none was right so far
        return torch.cat([*before, symbols, *after], dim=1)

    def prompts(self, count: int, generator: torch.Generator, held_out: bool = False) -> torch.Tensor:
        """Prompts, shape `(count, P)`: a symbol, after a pass mark if there are several. None of them is held out."""
        symbols = torch.randint(self.symbols, (count, 1), generator=generator)
        if len(self.marks) == 1:
            return symbols
        marks = torch.randint(len(self.marks), (count, 1), generator=generator)
        return torch.cat([self._first_mark() + marks, symbols], dim=1)

    def teach(self, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The teacher's walks, shape `(B, T)`."""
        f, g = self.permutations()
        skill = self.skill()
        symbol, right = prompts[:, -1], torch.zeros(len(prompts), dtype=torch.long)
        tokens = []
        for _ in range(self.steps):
            if self.counts:
                tokens.append(self.symbols + right)
            is_right = torch.rand(len(prompts), generator=generator) < skill[symbol]
            symbol = torch.where(is_right, f[symbol], g[symbol])
            right = right + is_right
            tokens.append(symbol)
        return torch.stack(tokens, dim=1)

    def segment_ends(self, length: int) -> list[int]:
        """Exclusive ends of the segments of a completion of `length` tokens: before each step that is to be made."""
        return [*range(1, length, 1 + self.counts), length] if length else []

    # --- What walks are worth

    def follow(self, prompts: torch.Tensor, completions: torch.Tensor) -> Path:
        """
        Where walks are before each token.

        Args:
            prompts (`torch.Tensor`):
                Shape `(B, P)`.
            completions (`torch.Tensor`):
                Shape `(B, T)` with T up to `completion_length`; anything may follow an end of sequence.
        """
        f, _ = self.permutations()
        symbol = prompts[:, -1]
        right = torch.zeros_like(symbol)
        left = torch.full_like(symbol, self.steps)
        path = [(symbol, right, left)]
        for at, token in enumerate(completions.unbind(1)):
            if self.counts and at % 2 == 0:
                left = torch.where(token >= len(self.words) - 2, 0, left)  # the end
            else:
                steps = (token < self.symbols) & (left > 0)
                right = right + (steps & (f[symbol] == token))
                symbol = torch.where(steps, token, symbol)
                left = torch.where(steps, left - 1, 0)
            path.append((symbol, right, left))
        return Path(*(torch.stack(column, dim=1) for column in zip(*path, strict=True)))

    def need(self, prompts: torch.Tensor) -> torch.Tensor:
        """The pass mark of each prompt, shape `(B,)`."""
        marks = torch.tensor(self.marks)
        if len(self.marks) == 1:
            return marks.expand(len(prompts))
        return marks[prompts[:, 0] - self._first_mark()]

    def rewards(self, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
        """1 for each walk with enough right steps, else 0; shape `(B,)`."""
        return (self.follow(prompts, completions).right[:, -1] >= self.need(prompts)).float()

    def truth(self, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
        """For each count that a model wrote whether it is true, shape `(B, K)`; only with `counts`."""
        right = self.follow(prompts, completions).right[:, :-1:2]
        return completions[:, ::2] == self.symbols + right

    # --- Exact values

    def values_to_go(self, transitions: torch.Tensor) -> torch.Tensor:
        r"""
        \\( W_{k}(x, m) \\), the probability that of k steps from x at least m are right, by dynamic programming.

        Args:
            transitions (`torch.Tensor`):
                Probability of a step from x to y, shape `(N, N)`; what a row lacks to 1 ends the walk.

        Returns:
            `torch.Tensor`: Shape `(K + 1, N, K + 1)`.
        """
        f, _ = self.permutations()
        is_right = transitions.gather(1, f.unsqueeze(1))  # (N, 1)
        others = transitions.scatter(1, f.unsqueeze(1), 0)
        need = max(self.marks)
        go = transitions.new_zeros(self.symbols, need + 1)
        go[:, 0] = 1
        table = [go]
        for _ in range(self.steps):
            # A right step leaves one fewer to make, and at least none.
            fewer = torch.cat([go[:, :1], go[:, :-1]], dim=1)
            go = is_right * fewer[f] + others @ go
            go[:, 0] = 1
            table.append(go)
        return torch.stack(table)

    def values(self, transitions: torch.Tensor, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
        """Exact values of the states before each token and after the last, shape `(B, T + 1)`."""
        path = self.follow(prompts, completions)
        lacking = (self.need(prompts).unsqueeze(1) - path.right).clamp(min=0)
        return self.values_to_go(transitions)[path.left, path.symbol, lacking]


VOTE = WalkTask(symbols=400, steps=32, marks=(24,))
SCOREBOARD = WalkTask(symbols=1500, steps=24, marks=(18,), counts=True)
MARKS = WalkTask(symbols=400, steps=24, marks=(10, 13, 16, 19, 22))
