"""
A process whose values are known at every step, in enough samples to measure critics by, and whole, with the probability
of each path, for an oracle.

The value of a state goes up or down by a part of what is left of it, the same way up as down: a martingale, as values
are. Step 6 is a cliff: to 40 % nearly everything is lost. The last step draws the reward.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np

from trl_credit.critic_report import Probes, Rollout


PROMPTS = (0.3, 0.5, 0.7)  # values of the three prompts there are
MOVES, CLIFF = 9, 6
COMPLETIONS, CONTINUATIONS = 4, 200
CANDIDATES = np.array([0.05, 0.35, 0.65, 0.95])


@dataclass
class Known(Rollout):
    """A rollout and the true values of its states, at its end the reward."""

    truth: np.ndarray = field(default_factory=lambda: np.zeros(0))
    probability: float = 1.0


def move(value, step: int, up):
    """The value after a step, and the probability of going that way."""
    if step == CLIFF:
        fall = 0.4
        lost = 0.95 * np.minimum(value, (1 - value) * (1 - fall) / fall)
        return np.where(up, value + lost * fall / (1 - fall), value - lost), np.where(up, 1 - fall, fall)
    change = 0.15 * np.minimum(value, 1 - value)
    return np.where(up, value + change, value - change), 0.5


def whole_process() -> list[Known]:
    """Every path with its probability."""
    paths = []
    for prompt, start in enumerate(PROMPTS):
        for moves in itertools.product((0, 1), repeat=MOVES):
            truth, probability = [start], 1 / len(PROMPTS)
            for step, up in enumerate(moves):
                value, chance = move(truth[-1], step, up)
                truth.append(float(value))
                probability *= float(chance)
            for reward in (0.0, 1.0):
                last = truth[-1] if reward else 1 - truth[-1]
                paths.append(make(prompt, prompt, moves, [*truth, reward], probability * last))
    return paths


def make(prompt: int, group: int, moves, truth, probability: float = 1.0, returns=None, others=()) -> Known:
    return Known(
        prompt=str(prompt),
        prompt_ids=[10 + prompt],
        completion_ids=[*map(int, moves), 2],
        cuts=list(range(MOVES + 1)),
        returns=returns if returns is not None else np.zeros((MOVES + 1, 2)),
        group=group,
        reward=truth[-1],
        other_rewards=list(others),
        truth=np.array(truth),
        probability=probability,
    )


def samples(prompts: int, seed: int = 0) -> Probes:
    """Rollouts of the process, with continuations of each state, and next steps to rank."""
    rng = np.random.default_rng(seed)
    rollouts, candidates = [], []
    for group in range(prompts):
        prompt = rng.integers(len(PROMPTS))
        drawn = []
        for _ in range(COMPLETIONS):
            truth, moves = [PROMPTS[prompt]], []
            for step in range(MOVES):
                _, chance = move(truth[-1], step, True)
                moves.append(int(rng.random() < chance))
                truth.append(float(move(truth[-1], step, moves[-1])[0]))
            drawn.append((moves, [*truth, float(rng.random() < truth[-1])]))
        for sample, (moves, truth) in enumerate(drawn):
            returns = rng.random((MOVES + 1, CONTINUATIONS)) < np.array(truth[:-1])[:, None]
            others = [t[-1] for i, (_, t) in enumerate(drawn) if i != sample]
            rollouts.append(make(prompt, group, moves, truth, returns=returns.astype(float), others=others))
            values = rng.permutation(CANDIDATES)
            returns = (rng.random((len(values), 1, CONTINUATIONS)) < values[:, None, None]).astype(float)
            candidates.append(
                [
                    Known("", [10 + prompt], [i], [1], returns[i], group, other_rewards=others, truth=truth)
                    for i, truth in enumerate(np.stack([values, values], axis=1))
                ]
            )
    return Probes(rollouts, candidates, {"policy": "a known process"}, 0)
