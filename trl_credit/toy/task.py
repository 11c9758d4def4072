"""
The quickstart's problems: digits, `+`, `-` and `*`, worked one operation at a time in arithmetic modulo 10.

A problem reads `3+4*2-1`, its solution `3+8-1=1-1=0`. The teacher whose solutions the tiny model imitates is good but
careless: it often forgets that `*` comes first, and now and then writes a wrong digit. What is right is left for
reinforcement learning to find, from nothing but the last digit.
"""

import math
import random
import re
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass


OPERATIONS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}
ALPHABET = "0123456789+-*="
_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:\.\d+)?")  # the minus of `8-3` is not a sign
_CHAIN = re.compile(r"(?:\d(?:[-+*]\d)*=)*\d")


def problem(rng: random.Random, terms: int) -> str:
    """An expression of `terms` digits, at least one `*` in it that does not come first by its place already."""
    while True:
        signs = rng.choices("+-*", k=terms - 1)
        if "*" in signs[next((i for i, sign in enumerate(signs) if sign != "*"), len(signs)) :]:
            return "".join(f"{rng.randrange(10)}{sign}" for sign in signs) + str(rng.randrange(10))


def step(expression: str, at: int, digit: int | None = None) -> str:
    """`expression` with its operation number `at` carried out, or replaced by `digit`."""
    left, sign, right = tuple(expression[2 * at : 2 * at + 3])
    if digit is None:
        digit = OPERATIONS[sign](int(left), int(right)) % 10
    return f"{expression[: 2 * at]}{digit}{expression[2 * at + 3 :]}"


def next_operation(expression: str) -> int:
    """Number of the operation that comes first: the leftmost `*`, or the leftmost of all."""
    return max(expression[1::2].find("*"), 0)


@dataclass(frozen=True)
class Teacher:
    """How often the teacher takes the leftmost operation although `*` comes first, and how often it slips."""

    forgets: float = 0.55
    slips: float = 0.03

    def solve(self, expression: str, rng: random.Random) -> str:
        lines = []
        while len(expression) > 1:
            at = 0 if rng.random() < self.forgets else next_operation(expression)
            digit = rng.randrange(10) if rng.random() < self.slips else None
            expression = step(expression, at, digit)
            lines.append(expression)
        return "=".join(lines)


def solve(expression: str) -> str:
    """The solution of a problem without a fault."""
    return Teacher(forgets=0.0, slips=0.0).solve(expression, random.Random())


def answer(expression: str) -> str:
    """The last digit of the value, which is the value modulo 10."""
    return solve(expression)[-1]


def value(expression: str) -> int:
    """The value in whole numbers."""
    products = [math.prod(map(int, product.split("*"))) for product in re.split(r"[-+]", expression)]
    signs = [1] + [1 if sign == "+" else -1 for sign in re.findall(r"[-+]", expression)]
    return sum(sign * product for sign, product in zip(signs, products, strict=True))


class Task(ABC):
    """
    Problems, how a model is asked to solve them, and a verifier.

    Args:
        terms (`tuple[int, ...]`):
            Numbers of digits that a problem can have.
    """

    max_completion_length: int

    def __init__(self, terms: tuple[int, ...]):
        self.terms = terms

    def draw(self, rng: random.Random, held_out: bool = False) -> str:
        """A problem to train on, or one that no training ever sees: a hash of the problem decides which it is."""
        while True:
            drawn = problem(rng, rng.choice(self.terms))
            if (zlib.crc32(drawn.encode()) % 4 == 0) == held_out:
                return drawn

    @abstractmethod
    def prompt(self, problem: str) -> str | list[dict[str, str]]:
        """The problem as the model is asked it."""

    @abstractmethod
    def is_correct(self, problem: str, completion: str) -> bool:
        """Whether the completion solves the problem."""


class ChainTask(Task):
    """The problems as the tiny model sees them: the prompt is `3+4*2-1=`, the completion `3+8-1=1-1=0`."""

    def __init__(self, terms: tuple[int, ...]):
        super().__init__(terms)
        self.max_completion_length = len(solve("1" + "*1" * (max(terms) - 1))) + 8

    def prompt(self, problem: str) -> str:
        return problem + "="

    def is_correct(self, problem: str, completion: str) -> bool:
        """Whether it is a chain of expressions that ends in the right digit. The steps between are not looked at."""
        return _CHAIN.fullmatch(completion) is not None and completion[-1] == answer(problem)


class ChatTask(Task):
    """The same expressions, in plain language and in whole numbers, for a model that follows instructions."""

    max_completion_length = 96

    def prompt(self, problem: str) -> list[dict[str, str]]:
        content = f"What is {' '.join(problem)}? Work step by step, and end with the answer."
        return [{"role": "user", "content": content}]

    def is_correct(self, problem: str, completion: str) -> bool:
        """Whether the last number in it is the value."""
        numbers = _NUMBER.findall(completion)
        return bool(numbers) and float(numbers[-1]) == value(problem)
