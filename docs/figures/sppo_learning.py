"""Draws `sppo_learning-light.svg` and `sppo_learning-dark.svg`, of `docs/results/sppo_learning.json`."""

import json
import math
import statistics
import sys

from matplotlib import pyplot as plt
from theme import FOLDER, save, tone


sys.path.insert(0, str(FOLDER.parents[1] / "benchmarks"))
from measuring import interval


RUNS = json.loads((FOLDER.parent / "results/sppo_learning.json").read_text(encoding="utf-8"))
COLORS = {"SPPO, N=1": "#4f7fd9", "no critic, N=1": "#8a8f9c", "GRPO, N=8": "#e07b39", "RLOO, N=8": "#2a9d6f"}
LINES = {"SPPO, N=1": "-", "no critic, N=1": ":", "GRPO, N=8": "--", "RLOO, N=8": "-."}
WINDOW = 10


def at(tokens: list[float], values: list[float], grid: list[float]) -> list[float]:
    """`values` at the places of `grid` by linear interpolation."""
    found = []
    for place in grid:
        right = next((i for i, x in enumerate(tokens) if x >= place), len(tokens) - 1)
        left = max(right - 1, 0)
        share = 1.0 if right == left else min((place - tokens[left]) / (tokens[right] - tokens[left]), 1.0)
        found.append(values[left] + share * (values[right] - values[left]))
    return found


def draw(ink: str) -> plt.Figure:
    fig, (training, held_out) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    end = min(run["tokens"][-1] for run in RUNS)
    for name, color in COLORS.items():
        runs = [run for run in RUNS if run["method"] == name]
        smooth = [
            [statistics.mean(run["rewards"][max(i - WINDOW, 0) : i]) for i in range(1, run["steps"] + 1)]
            for run in runs
        ]
        curves = [[point[key] for point in run["curve"]] for key in ("tokens", "sampled") for run in runs]
        for axes, tokens, values, places in (
            (training, [run["tokens"] for run in runs], smooth, 80),
            (held_out, curves[: len(runs)], curves[len(runs) :], len(curves[0]) - 1),
        ):
            first = max(x[0] for x in tokens)
            grid = [first + (end - first) * i / places for i in range(places + 1)]
            means, halves = zip(
                *(interval(list(column)) for column in zip(*map(at, tokens, values, [grid] * len(runs)), strict=True)),
                strict=True,
            )
            thousands = [x / 1000 for x in grid]
            axes.plot(thousands, means, LINES[name], color=color, label=name, linewidth=1.6)
            if math.isfinite(halves[0]):
                low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
                axes.fill_between(thousands, low, high, color=color, alpha=0.15, linewidth=0)
    training.set(title=f"Training rollouts, mean of {WINDOW} steps", ylabel="share of right answers")
    held_out.set(title="Held-out problems, sampled")
    for axes in (training, held_out):
        axes.set(xlabel="generated tokens, thousands", ylim=(0, 1))
        tone(axes, ink)
    training.legend(loc="lower right", labelcolor=ink, frameon=False, fontsize=8)
    return fig


if __name__ == "__main__":
    save("sppo_learning", draw)
