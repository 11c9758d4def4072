"""
What does a critic lack on the quickstart's arithmetic: updates, or rollouts, and of how many problems, how long?

    python benchmarks/critic_data.py     # docs/results/critic_data.md; goes on from critic_data.json if that exists

Fresh critics from a tiny policy's checkpoint, at VAPO's default rates, are fitted to rollouts of the policy, which does
not move, of 128 completions each, and explain the same held-out rollouts of other problems. Beside them what the true
values explain there, by one continuation from every state.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from critic_rates import (
    as_tensors,
    ceiling,
    measure,
    outcomes_from_every_state,
    solve_problems,
    split,
)
from transformers import AutoModelForCausalLM

from trl_credit.toy.tiny_model import TinyModelSettings, fitted, load
from trl_credit.trainers.critic.critic_trainer import HIGHEST_RATE


COMPLETIONS = 128  # of a rollout
HELD_OUT = 128  # problems, with GENERATIONS completions each


@dataclass(frozen=True)
class Fit:
    """
    What a critic is fitted to: rollouts, how many completions a problem has in them, those of an update, and how many
    digits the problems have, those that the policy was fitted to.
    """

    rollouts: int
    generations: int
    update: int = COMPLETIONS
    passes: int = 1
    terms: tuple[int, ...] = TinyModelSettings().terms

    @property
    def digits(self) -> str:
        return ", ".join(map(str, self.terms))

    def __str__(self) -> str:
        problems = self.rollouts * COMPLETIONS // self.generations
        updates = self.rollouts * COMPLETIONS // self.update * self.passes
        return f"{self.digits} | {self.rollouts * COMPLETIONS:,} | {problems:,} | {self.passes} | {updates:,}"


SHORT = tuple(Fit(50, 8, terms=terms) for terms in ((3,), (3, 4), (4,)))
FITS = (
    *SHORT,
    Fit(50, 8),
    Fit(100, 1),
    Fit(250, 1),
    Fit(50, 8, update=16),
    Fit(50, 2, update=16, passes=4),
    Fit(250, 8),
)


def run(fit: Fit, policy: Path, held_out: list[dict]) -> dict:
    tokenizer = load(policy)[1]
    problems = fit.rollouts * COMPLETIONS // fit.generations
    rows = solve_problems(policy, problems, 0, False, fit.generations, fit.terms)
    rollouts = [as_tensors(rows[first : first + COMPLETIONS], tokenizer) for first in range(0, len(rows), COMPLETIONS)]
    start = rollouts[0]["rewards"].mean().item()
    batches = [batch for rollout in rollouts for batch in split(rollout, fit.update)] * fit.passes
    make_network = partial(AutoModelForCausalLM.from_pretrained, policy, dtype=torch.float32)
    return measure(make_network, batches, held_out, HIGHEST_RATE, HIGHEST_RATE, start)


def table(stored: dict) -> str:
    names = ("digits", "completions", "problems", "passes", "updates", "explained variance", "within prompts")
    lines = [f"| {' | '.join(names)} | the true values |", "| --- " * (len(names) + 1) + "|"]
    for fit in FITS:
        if found := stored["fits"].get(str(fit)):
            known, ceilings = (found["explained_variance"], found["within_prompt"]), stored["ceilings"][fit.digits]
            cells = (f"{known[0]:.3f}", f"{known[1]:.3f}", " / ".join(f"{of:.2f}" for of in ceilings))
            lines.append(f"| {fit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=len(FITS), help="the first so many")
    parser.add_argument("--models", type=Path, default=Path("outputs/quickstart"), help="where tiny policies are kept")
    parser.add_argument("--output", type=Path, default=Path("docs/results/critic_data"), help="writes .json and .md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.output.with_suffix(".json")
    stored = json.loads(file.read_text()) if file.exists() else {"fits": {}, "ceilings": {}}

    def save():
        file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        page = (
            f"Explained variance of the returns of {HELD_OUT} held-out problems, by `python benchmarks/critic_data.py "
            f"--fits {len(stored['fits'])}` on one CPU core, torch {torch.__version__}, one seed.\n\n"
        )
        args.output.with_suffix(".md").write_text(page + table(stored) + "\n", encoding="utf-8")

    for fit in FITS[: args.fits]:
        if str(fit) in stored["fits"]:
            continue
        policy = fitted(TinyModelSettings(terms=fit.terms), args.models)
        unseen = solve_problems(policy, HELD_OUT, 0, True, terms=fit.terms)
        if fit.digits not in stored["ceilings"]:
            for row, outcomes in zip(unseen, outcomes_from_every_state(policy, unseen, fit.terms), strict=True):
                row["values"] = outcomes
            stored["ceilings"][fit.digits] = ceiling(unseen)
        stored["fits"][str(fit)] = run(fit, policy, split(as_tensors(unseen, load(policy)[1]), 64))
        print(fit, json.dumps(stored["fits"][str(fit)]), flush=True)
        save()
    save()
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    sys.exit(main())
