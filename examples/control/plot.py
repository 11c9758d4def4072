"""Success against environment steps, mean and confidence band over runs, for a light and a dark page."""

from pathlib import Path

import matplotlib
import numpy as np
from tasks import TASKS


matplotlib.use("svg")
from matplotlib import pyplot as plt


LINES = {
    "SPPO": ("#d9641e", "-"),
    "PPO, λ = 1": ("#4f7fd9", "-"),
    "PPO, λ = 0.95": ("#4f7fd9", "--"),
    "GRPO": ("#3f9e73", "-."),
    "batch mean": ("#9a86b8", ":"),
}
WINDOW = 5


def smooth(success: np.ndarray) -> np.ndarray:
    """Mean of each update and the few before it, `(updates, runs)`."""
    sums = np.cumsum(np.concatenate([np.zeros((1, success.shape[1])), success]), 0)
    ends = np.arange(1, len(success) + 1)
    starts = np.maximum(ends - WINDOW, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)[:, None]


def curve(success: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps up to where the first run ends, the mean over runs there, and the bounds of its 95 % bootstrap interval."""
    before = np.cumsum(steps, 0) - steps
    grid = np.linspace(0, before[-1].min(), 80)
    runs = np.stack([np.interp(grid, x, y) for x, y in zip(before.T, smooth(success).T, strict=True)])
    picked = np.random.default_rng(0).integers(len(runs), size=(2000, len(runs)))
    return grid, runs.mean(0), np.percentile(runs[picked].mean(1), (2.5, 97.5), axis=0)


def plot(results: list[dict], folder: Path) -> None:
    """Write `control-light.svg` and `control-dark.svg`, a panel for each task."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trl_credit", "font.family": "sans-serif"})
    tasks = list(dict.fromkeys(result["task"] for result in results))
    for theme, ink in (("light", "#333333"), ("dark", "#c8ccd8")):
        figure, panels = plt.subplots(1, len(tasks), figsize=(9, 3.8), layout="constrained", squeeze=False)
        for task, axes in zip(tasks, panels[0], strict=True):
            for result in (result for result in results if result["task"] == task):
                color, line = LINES[result["method"]]
                grid, mean, bounds = curve(np.array(result["success"]), np.array(result["steps"]))
                axes.plot(grid / 1000, mean, line, color=color, label=result["method"], linewidth=1.6)
                axes.fill_between(grid / 1000, *bounds, color=color, alpha=0.13, linewidth=0)
            axes.set(title=TASKS[task].title, xlabel="environment steps of a run, thousands", ylim=(0, 1.02))
            axes.tick_params(colors=ink)
            axes.spines[:].set_visible(False)
            axes.grid(color=ink, alpha=0.15)
            axes.title.set(color=ink, fontsize=10)
            axes.xaxis.label.set_color(ink)
        panels[0][0].set_ylabel("success", color=ink)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, labelcolor=ink, frameon=False, fontsize=9)
        figure.savefig(folder / f"control-{theme}.svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
