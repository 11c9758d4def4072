"""What the quickstart shows: progress bars, the table, two completions, and the learning curve."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .scoring import Estimate, Evaluation


@contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int, str], Callable[[float], None]]]:
    """
    Adds bars by title, total and unit. Each moves by one whenever it is given a number, and shows the running mean of
    these. The clock of a second one starts when it first moves.
    """
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]} {task.fields[value]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def add(title: str, total: int, unit: str) -> Callable[[float], None]:
            bar = progress.add_task(title, start=not progress.tasks, total=total, unit=unit, value="")
            mean = None

            def advance(value: float):
                nonlocal mean
                mean = value if mean is None else 0.9 * mean + 0.1 * value
                progress.start_task(bar)
                progress.update(bar, advance=1, value=f"{mean:.2f}")

            return advance

        yield add


def show_table(console: Console, before: Evaluation, after: Evaluation) -> None:
    """The share of problems solved before and after, and the gain."""
    number = len(before.problems)
    table = Table(title=f"Solved, of {number} held-out problems (95 % confidence)", title_justify="left")
    table.add_column("decoding")
    for name in ("before", "after", "gain"):
        table.add_column(name, justify="right")
    for name in ("sampled", "greedy"):
        first, second = getattr(before, name + "_right"), getattr(after, name + "_right")
        # Paired, since the problems are the same.
        gain = Estimate.of([b - a for a, b in zip(first, second, strict=True)])
        table.add_row(name, f"{Estimate.of(first)}", f"{Estimate.of(second)}", f"{gain:+}")
    console.print(table)


def show_completions(console: Console, before: Evaluation, after: Evaluation) -> None:
    """The first problem that was wrong before and is right after, in both versions; else the first of all."""
    learned = [not a and b for a, b in zip(before.greedy_right, after.greedy_right, strict=True)]
    row = learned.index(True) if any(learned) else 0
    console.print(f"\nOne of them, greedy: {before.problems[row]}", markup=False)
    for name, evaluation in (("before", before), ("after", after)):
        verdict = "right" if evaluation.greedy_right[row] else "wrong"
        console.print(f"  {name:<7}{evaluation.greedy[row].strip()}   ({verdict})", markup=False)


def show_critic(console: Console, explained: Estimate) -> None:
    """What the critic knows of steps at the end."""
    if math.isnan(explained.mean):
        console.print("\nNo problem is solved now and then: what the critic knows of steps cannot be told.")
        return
    console.print(
        f"\nOf the variance of the reward within a problem, the critic's values explain {explained} "
        "(95 % confidence; 0: it knows nothing about steps)."
    )


def plot_learning_curve(path: Path, title: str, rewards: list[float], before: Evaluation, after: Evaluation) -> None:
    """Share of right completions in the training rollouts, step by step, and of held-out problems at both ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blue, orange, grey = "#1f6fb4", "#d9641e", "#555555"
    steps = range(1, len(rewards) + 1)
    window = max(len(rewards) // 15, 1)
    smooth = [sum(part) / len(part) for end in steps for part in [rewards[max(end - window, 0) : end]]]
    figure, axes = plt.subplots(figsize=(7.5, 4.4), dpi=160, layout="constrained")
    axes.plot(steps, rewards, color=blue, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth, color=blue, linewidth=2.2, label=f"training rollouts, sampled (mean of {window} steps)")
    for name, color, marker in (("sampled", blue, "o"), ("greedy", orange, "s")):
        estimates = [Estimate.of(getattr(evaluation, name + "_right")) for evaluation in (before, after)]
        axes.errorbar(
            [0, len(rewards)],
            [estimate.mean for estimate in estimates],
            yerr=[estimate.half_width for estimate in estimates],
            fmt=marker,
            color=color,
            markeredgecolor="white",
            markersize=9,
            capsize=4,
            zorder=5,
            label=f"{len(before.problems)} held-out problems, {name}",
        )
        for x, estimate, side in zip((0, len(rewards)), estimates, (-1, 1), strict=True):
            axes.annotate(
                f"{estimate.mean:.0%}",
                (x, estimate.mean),
                xytext=(11 * side, 0),
                textcoords="offset points",
                color=color,
                ha="left" if side > 0 else "right",
                va="center",
                fontweight="bold",
            )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("training step", color=grey)
    axes.set_ylabel("share of right answers", color=grey)
    axes.set_ylim(0, 1.02)
    margin = 0.09 * len(rewards)
    axes.set_xlim(-margin, len(rewards) + margin)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path)
    plt.close(figure)
