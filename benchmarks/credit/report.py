"""Tables from the results of a grid."""

import json
from collections.abc import Sequence

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
    """
    Tokens that each run generated until the threshold, continuations and pretraining among them: of shape `(runs, start
    models)` if each start model has as many runs and more than one, else `(runs,)`.
    """
    by_fit: dict[int, list[float]] = {}
    for rows in runs.values():
        tokens, rewards = ([row[name] for row in rows] for name in ("tokens_generated", "reward"))
        by_fit.setdefault(rows[0]["fit"], []).append(first_tokens(tokens, rewards, threshold))
    counts = {len(tokens) for tokens in by_fit.values()}
    if len(counts) == 1 and counts != {1}:
        return np.array(list(by_fit.values())).T
    return np.concatenate(list(by_fit.values()))


def thousands(value: float) -> str:
    return "not reached" if np.isinf(value) else f"{value / 1000:.1f}k"


def table(results: pa.Table, thresholds=(0.4, 0.6, 0.8), against: Sequence[str] = ()) -> str:
    """
    Markdown: tokens to each threshold by method, and how many times fewer than the methods `against` at the last.

    A column shows the interquartile mean over the runs, and in brackets the ends of its 95 % interval; if a quarter of
    the runs does not reach a threshold, the mean is "not reached".
    """
    by_method = curves(results)
    head = ["method", "runs", *(f"tokens to {threshold}" for threshold in thresholds), "reached", "CPU s a step"]
    last = thresholds[-1]
    for other in against:
        head += [f"times fewer than {other}", "probability of improvement"]
    lines = [head, ["---"] * len(head)]
    for method, runs in by_method.items():
        line = [method, str(len(runs))]
        for threshold in thresholds:
            interval = stratified_bootstrap(interquartile_mean, tokens_to(runs, threshold))
            line.append(_bracketed(interval, thousands))
        ends = [rows[-1] for rows in runs.values()]
        line.append(f"{np.isfinite(tokens_to(runs, last)).sum()} of {len(runs)}")
        line.append(f"{np.mean([row['cpu_seconds'] / max(row['step'], 1) for row in ends]):.2f}")
        for other in against:
            line += _compared(runs, by_method[other], last) if method != other else ["", ""]
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
