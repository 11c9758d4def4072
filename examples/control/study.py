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
        "SPPO": (3e-3, 1e-2),
        "PPO, λ = 1": (3e-3, 1e-2),
        "PPO, λ = 0.95": (3e-3, 1e-2),
        "GRPO": (3e-3, None),
        "batch mean": (3e-3, None),
    },
    "mountaincar": {
        "SPPO": (3e-3, 1e-2),
        "PPO, λ = 1": (3e-3, 1e-2),
        "PPO, λ = 0.95": (3e-3, 1e-3),
        "GRPO": (3e-3, None),
        "batch mean": (3e-3, None),
    },
}
SWEEP = {"policy": (1e-3, 3e-3), "critic": (1e-3, 1e-2)}
GOAL = 0.8


def measure(task: str, start, method: str, rates: tuple, arguments: argparse.Namespace) -> dict:
    """One method on one task, from the same fitted policies as the others."""
    rate, critic_rate = rates
    make_credit = METHODS[method] if critic_rate is None else partial(METHODS[method], learning_rate=critic_rate)
    updates = arguments.updates or TASKS[task].updates
    log = train(TASKS[task], start, make_credit, rate, updates, arguments.seed)
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


def sweep_table(results: list[dict]) -> str:
    """Success over the training for each rate of the policy (columns) and of the critic (parts of a cell)."""
    cells: dict[tuple[str, str], dict[float, list[str]]] = {}
    for result in results:
        row = cells.setdefault((TASKS[result["task"]].title, result["method"]), {rate: [] for rate in SWEEP["policy"]})
        row[result["rates"][0]].append(f"{np.mean(result['success']):.3f}")
    lines = [
        f"| task | method | {' | '.join(f'policy {rate:g}' for rate in SWEEP['policy'])} |",
        "| --- | --- |" + " --- |" * len(SWEEP["policy"]),
    ]
    lines += [f"| {' | '.join(key)} | {' | '.join(map(' / '.join, row.values()))} |" for key, row in cells.items()]
    return "\n".join(lines) + "\n"


def page(results: list[dict], arguments: argparse.Namespace) -> str:
    command = shlex.join(["python", "examples/control/study.py", *sys.argv[1:]])
    return f"""Measured by `{command}` with torch {torch.__version__} and gymnasium {gymnasium.__version__}:
{arguments.runs} runs of each method.

{table(results)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--runs", type=int, default=5, help="seeds; they train side by side")
    parser.add_argument("--updates", type=int, help="by default 20 for CartPole, 40 for MountainCar")
    parser.add_argument("--seed", type=int, default=0, help="of the first fit; the same for all methods")
    parser.add_argument("--sweep", action="store_true", help="try a grid of learning rates instead")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/control"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = study(arguments)
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.sweep:
        (folder / "control_sweep.md").write_text(sweep_table(results), encoding="utf-8")
        return
    lines = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
    (folder / "control.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (folder / "control.md").write_text(page(results, arguments), encoding="utf-8")
    plot(results, folder)
    print(table(results))


if __name__ == "__main__":
    main()
