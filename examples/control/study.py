"""
SPPO's prompt value against a critic at every step, on control tasks with one verdict at the end of an episode.

    python examples/control/study.py                          # minutes on one core, into outputs/control
    python examples/control/study.py --sweep --seed 100 --runs 4 --updates 30    # how the learning rates were chosen

After the control experiments of arXiv:2604.08865, section 5.3. Needs `pip install "trl-credit[control]"`, no GPU.
"""

import argparse
import json
import math
import shlex
import sys
from functools import partial
from itertools import product
from pathlib import Path

import gymnasium
import numpy as np
import torch
from plot import plot, smooth
from tasks import TASKS
from training import BatchBaseline, GroupBaseline, PromptCritic, TokenCritic, imitate, train


METHODS = {
    "SPPO": PromptCritic,
    "PPO, λ = 1": partial(TokenCritic, lam=1.0),
    "PPO, λ = 0.95": partial(TokenCritic, lam=0.95),
    "GRPO": GroupBaseline,
    "batch mean": BatchBaseline,
}
# Learning rates of the policy and of the critic, those with the most success in the sweep.
RATES = {
    "cartpole": {
        "SPPO": (1e-3, 1e-3),
        "PPO, λ = 1": (1e-3, 1e-3),
        "PPO, λ = 0.95": (1e-3, 1e-3),
        "GRPO": (1e-3, None),
        "batch mean": (1e-3, None),
    },
    "mountaincar": {
        "SPPO": (1e-3, 1e-3),
        "PPO, λ = 1": (1e-3, 1e-3),
        "PPO, λ = 0.95": (1e-3, 1e-3),
        "GRPO": (1e-3, None),
        "batch mean": (1e-3, None),
    },
}
SWEEP = {"policy": (3e-4, 1e-3, 3e-3), "critic": (1e-3, 1e-2)}
GOAL = 0.9


def measure(task: str, start, method: str, rates: tuple, arguments: argparse.Namespace) -> dict:
    """One method on one task, from the same fitted policies as the others."""
    rate, critic_rate = rates
    make_credit = METHODS[method] if critic_rate is None else partial(METHODS[method], learning_rate=critic_rate)
    log = train(TASKS[task], start, make_credit, rate, arguments.updates, arguments.seed)
    print(f"{task:12} {method:14} {rate:<6g} {critic_rate or '–':<6} {np.mean(log['success']):.3f}", flush=True)
    return {"task": task, "method": method, "rates": rates, **log}


def study(arguments: argparse.Namespace) -> list[dict]:
    results = []
    for task in arguments.tasks:
        torch.manual_seed(arguments.seed)
        start = imitate(TASKS[task], arguments.runs, arguments.seed)
        for method in METHODS:
            choices = [RATES[task][method]]
            if arguments.sweep:
                has_critic = choices[0][1] is not None
                choices = list(product(SWEEP["policy"], SWEEP["critic"] if has_critic else [None]))
            results += [measure(task, start, method, rates, arguments) for rates in choices]
    return results


def interval(values: np.ndarray, digits: int = 1) -> str:
    """Mean over runs in percent and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return f"{100 * values.mean():.{digits}f} ({100 * low:.{digits}f} to {100 * high:.{digits}f})"


def steps_to_goal(success: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Environment steps of each run until its smoothed success first reaches the goal; infinity if it never does."""
    reached = smooth(success) >= GOAL
    before = np.cumsum(steps, 0) - steps
    return np.where(reached.any(0), np.take_along_axis(before, reached.argmax(0)[None], 0)[0], math.inf)


def table(results: list[dict]) -> str:
    lines = []
    for task in dict.fromkeys(result["task"] for result in results):
        lines += [
            f"\n**{TASKS[task].title}**\n",
            "| | learning rates | success over the training, % | minus SPPO's | in its last tenth, % "
            f"| steps to {GOAL:.0%} | V explains |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        group = [result for result in results if result["task"] == task]
        reference = np.mean(group[0]["success"], 0)
        for result in group:
            success, steps = np.array(result["success"]), np.array(result["steps"])
            mean, last = success.mean(0), success[-max(len(success) // 10, 1) :].mean(0)
            reached = steps_to_goal(success, steps)
            median = np.median(reached)
            explained = np.array(result["explained"], dtype=float)  # None becomes NaN
            cells = [
                result["method"],
                " / ".join(f"{rate:g}" for rate in result["rates"] if rate),
                interval(mean),
                "–" if result is group[0] else interval(mean - reference),
                interval(last),
                (f"{median / 1000:,.0f} k" if math.isfinite(median) else "never")
                + f", {np.isfinite(reached).sum()} of {len(reached)} runs",
                f"{np.nanmedian(explained):+.2f}" if explained.size else "–",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).lstrip() + "\n"


def page(results: list[dict], arguments: argparse.Namespace) -> str:
    command = shlex.join(["python", "examples/control/study.py", *sys.argv[1:]])
    return f"""Measured by `{command}` with torch {torch.__version__} and gymnasium {gymnasium.__version__}:
{arguments.runs} runs of {arguments.updates} updates each.

{table(results)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--runs", type=int, default=8, help="seeds; they train side by side")
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0, help="of the first fit; the same for all methods")
    parser.add_argument("--sweep", action="store_true", help="try the grid of learning rates; write nothing")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/control"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = study(arguments)
    if not arguments.sweep:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
        (arguments.output_dir / "control.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        (arguments.output_dir / "control.md").write_text(page(results, arguments), encoding="utf-8")
        plot(results, arguments.output_dir)
        print(table(results))


if __name__ == "__main__":
    main()
