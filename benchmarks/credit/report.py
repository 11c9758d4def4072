"""Tables from the results of a grid."""

import json

import numpy as np
import pyarrow as pa

from .statistics import Interval, interquartile_mean, probability_of_improvement, stratified_bootstrap, times_fewer
from .statistics import tokens_to as first_tokens


def curves(results: pa.Table) -> dict[str, dict[str, list[dict]]]:
    """Rows of each run in the order of steps, by method and cell."""
    by_method: dict[str, dict[str, list[dict]]] = {}
    for row in sorted(results.to_pylist(), key=lambda row: row["step"]):
        by_method.setdefault(row["method"], {}).setdefault(row["cell"], []).append(row)
    return by_method


def tokens_to(runs: dict[str, list[dict]], threshold: float) -> np.ndarray:
    """Tokens that each run generated until the threshold, continuations and pretraining among them."""
    return np.array(
        [
            first_tokens([row["tokens_generated"] for row in rows], [row["reward"] for row in rows], threshold)
            for rows in runs.values()
        ]
    )


def thousands(value: float) -> str:
    return "not reached" if np.isinf(value) else f"{value / 1000:.1f}k"


def table(results: pa.Table, thresholds=(0.4, 0.6, 0.8), against: str | None = None) -> str:
    """
    Markdown: tokens to each threshold by method, and how many times fewer than the method `against` has at the last.

    A column shows the interquartile mean over the runs, and in brackets the ends of its 95 % interval; if a quarter of
    the runs does not reach a threshold, the mean is "not reached".
    """
    by_method = curves(results)
    head = ["method", "runs", *(f"tokens to {threshold}" for threshold in thresholds), "reached", "CPU s a step"]
    last = thresholds[-1]
    if against is not None:
        head += [f"times fewer than {against}", "probability of improvement"]
    lines = [head, ["---"] * len(head)]
    for method, runs in by_method.items():
        line = [method, str(len(runs))]
        for threshold in thresholds:
            interval = stratified_bootstrap(interquartile_mean, tokens_to(runs, threshold))
            line.append(_bracketed(interval, thousands))
        ends = [rows[-1] for rows in runs.values()]
        line.append(f"{sum(np.isfinite(tokens_to(runs, last)))} of {len(runs)}")
        line.append(f"{np.mean([row['cpu_seconds'] / max(row['step'], 1) for row in ends]):.2f}")
        if against is not None:
            line += _compared(runs, by_method[against], last) if method != against else ["", ""]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _compared(ours: dict, theirs: dict, threshold: float) -> list[str]:
    ours, theirs = tokens_to(ours, threshold), tokens_to(theirs, threshold)
    fewer = stratified_bootstrap(times_fewer, ours, theirs)
    better = stratified_bootstrap(probability_of_improvement, -ours, -theirs)
    return [_bracketed(fewer, "{:.1f}".format), _bracketed(better, "{:.2f}".format)]


def _bracketed(interval: Interval, shown) -> str:
    if interval.low == interval.high:
        return shown(interval.value)
    return f"{shown(interval.value)} ({shown(interval.low)}, {shown(interval.high)})"


def ends(results: pa.Table) -> str:
    """Markdown: what each method had at the end of its runs, means over them."""
    names = ("reward", "kl", "truth", "ceiling")
    metrics = ("critic/explained_variance", "critic/trust")
    lines = [["method", "tokens generated", "tokens read", *names, *(name.split("/")[1] for name in metrics)]]
    lines.append(["---"] * len(lines[0]))
    for method, runs in curves(results).items():
        last = [rows[-1] for rows in runs.values()]
        logged = [json.loads(row["metrics"]) for row in last]
        values = [[row[name] for row in last] for name in ("tokens_generated", "tokens_read")]
        line = [method, *(f"{np.mean(value) / 1000:.1f}k" for value in values)]
        line += [_mean(row.get(name) for row in last) for name in names]
        line += [_mean(row.get(name) for row in logged) for name in metrics]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(values) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2f}" if known else ""
