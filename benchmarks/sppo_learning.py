"""
What does a prompt critic do for learning? Reward against generated tokens on the quickstart's task, for SPPO with one
completion a prompt, SPPO without its critic, and TRL's GRPO and RLOO with eight.

    python benchmarks/sppo_learning.py --sweep   # how the learning rates were chosen: seeds of its own, fewer steps
    python benchmarks/sppo_learning.py           # the table of docs/results/sppo_learning.md and its figure

Every run starts from the same fitted model and samples 128 completions a step: of 128 problems, or of 16 with 8 each.
Each is used for one update. What is measured is fresh: problems held out from all training, other ones for each seed.
A run that is in the .json is not made again, so an interrupted benchmark goes on where it was; delete the file to begin
anew. A run takes one to two minutes.
"""

import argparse
import itertools
import json
import math
import os
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from learning import start_model
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

#X from trl_credit import SPPOConfig, SPPOTrainer
from trl_credit.quickstart.evaluation import evaluate, held_out_problems
from trl_credit.quickstart.program import TINY
from trl_credit.quickstart.task import ChainTask
from trl_credit.quickstart.tiny_model import load
from trl_credit.quickstart.training import Method, train
from trl_credit.trl_seam import CreditTrainer, single_generation_allowed


COMPLETIONS_PER_STEP = 128


@dataclass
class BatchMeanConfig(GRPOConfig):
    """GRPO's, with one completion a prompt allowed."""

    def __post_init__(self):
        with single_generation_allowed(self):
            super().__post_init__()


class BatchMeanTrainer(CreditTrainer):
    """SPPO without a critic: the baseline of all prompts is the mean reward of the batch."""

    _name = "BatchMean"
    config_class = BatchMeanConfig

    def assign_credit(self, rollout: dict, rewards: torch.Tensor) -> dict:
        return {**rollout, "advantages": rewards - rewards.mean()}

    def begin_step(self, micro_batches: list[dict], mode: str) -> None:
        self.token_mean_over_step(micro_batches, mode)


@dataclass(frozen=True)
class Arm:
    """A method, with the completions of a prompt, its own settings, the best of `SWEEP`, and how it is drawn."""

    method: Method
    generations: int
    settings: dict
    color: str


ARMS = {
    "no critic, N=1": Arm(
        Method("no critic", BatchMeanConfig, BatchMeanTrainer), 1, {"learning_rate": 3e-4}, "#7f7f7f"
    ),
    "GRPO, N=8": Arm(Method("GRPO", GRPOConfig, GRPOTrainer), 8, {"learning_rate": 3e-4}, "#d9641e"),
    # RLOO alone has a KL penalty by default.
    "RLOO, N=8": Arm(Method("RLOO", RLOOConfig, RLOOTrainer), 8, {"learning_rate": 3e-4, "beta": 0.0}, "#2a9d6f"),
}
SWEEP = {"learning_rate": (1.5e-4, 3e-4, 6e-4), "critic_learning_rate": (1e-4, 3e-4, 1e-3)}
SWEEP_SEEDS, SWEEP_STEPS = (100, 101), 60
# Half-widths of a 95 % interval in standard errors, by Student's t, for 2 to 10 seeds.
CRITIC_METRICS = ("critic/brier", "critic/explained_variance")
T95 = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=2))
# Keys of a run, shown as percentages.
RESULTS = {
    "sampled": "sampled",
    "greedy": "greedy",
    "training": "mean over training",
}


def measure(name: str, settings: dict, seed: int, steps: int, points: int, problems: int, start: Path) -> dict:
    """Train once, with evaluations at `points` places after the start, evenly spaced."""
    arm, task = ARMS[name], ChainTask(TINY.terms)
    model, tokenizer = load(start)
    held_out = held_out_problems(task, problems, seed=1 + seed)
    log: list[dict] = []
    curve: list[dict] = []
    seconds = 0.0

    def look(step: int, tokens: int) -> None:
        result = evaluate(model, tokenizer, task, held_out)
        shares = {key: sum(getattr(result, f"{key}_right")) / problems for key in ("sampled", "greedy")}
        curve.append({"step": step, "tokens": tokens, **shares})

    def on_step(metrics: dict) -> None:
        nonlocal seconds
        tokens = round(metrics["completions/mean_length"] * COMPLETIONS_PER_STEP)
        log.append({**metrics, "tokens": tokens + (log[-1]["tokens"] if log else 0)})
        seconds += metrics["step_time"]
        if metrics["step"] * points % steps < points:  # the first step at or behind a place
            look(metrics["step"], log[-1]["tokens"])

    look(0, 0)
    transformers.set_seed(seed)
    train(
        model,
        tokenizer,
        task,
        arm.method,
        steps=steps,
        prompts_per_step=COMPLETIONS_PER_STEP // arm.generations,
        num_generations=arm.generations,
        temperature=1.0,
        seed=seed,
        output_dir=Path("outputs/sppo_learning"),
        on_step=on_step,
        **settings,
    )
    critic = {key: [round(entry[key], 4) for entry in log] for key in log[-1] if key in CRITIC_METRICS}
    return {
        "method": name,
        "settings": settings,
        "seed": seed,
        "steps": steps,
        "problems": problems,
        "sampled": curve[-1]["sampled"],
        "greedy": curve[-1]["greedy"],
        "training": statistics.mean(entry["reward"] for entry in log),
        "seconds": seconds,
        "curve": curve,
        "tokens": [entry["tokens"] for entry in log],
        "rewards": [round(entry["reward"], 4) for entry in log],
        **critic,
    }


class Record:
    """The finished runs, in a .json that is written after each; several processes may add to one."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def runs(self) -> list[dict]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else []

    def has(self, **what) -> bool:
        return any(what.items() <= run.items() for run in self.runs)

    def add(self, run: dict) -> None:
        lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in [*self.runs, run])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        partial.replace(self.path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=ARMS, default=[*ARMS], metavar="NAME", help=f"of {[*ARMS]}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=TINY.steps)
    parser.add_argument("--points", type=int, default=5, help="evaluations of a run, besides the one before it")
    parser.add_argument("--problems", type=int, default=1024, help="held out, other ones for each seed")
    parser.add_argument("--sweep", action="store_true", help=f"the rates {SWEEP}, one evaluation, seeds {SWEEP_SEEDS}")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)

    if args.sweep:
        args.seeds, args.steps, args.points = SWEEP_SEEDS, SWEEP_STEPS, 1
    record = Record(args.output / f"sppo_learning{'_sweep' if args.sweep else ''}.json")
    start = start_model(Path("outputs/quickstart"))
    for seed, name in itertools.product(args.seeds, args.methods):
        for settings in swept(name) if args.sweep else [ARMS[name].settings]:
            if record.has(method=name, settings=settings, seed=seed, steps=args.steps):
                continue
            run = measure(name, settings, seed, args.steps, args.points, args.problems, start)
            record.add(run)
            shown = {key: value for key, value in run.items() if not isinstance(value, list)}
            print(json.dumps(shown, ensure_ascii=False), flush=True)


def swept(name: str) -> list[dict]:
    """One setting changed at a time."""
    settings = ARMS[name].settings
    changed = [settings | {key: value} for key in SWEEP if key in settings for value in SWEEP[key]]
    return [option for i, option in enumerate(changed) if option not in changed[:i]]


if __name__ == "__main__":
    main()
