"""
What does a prompt critic do for learning? Reward against generated tokens on the quickstart's task, for SPPO with one
completion a prompt, SPPO without its critic, and TRL's GRPO and RLOO with eight.

    python benchmarks/sppo_learning.py --sweep   # how the learning rates were chosen: seeds of its own
    python benchmarks/sppo_learning.py           # the table of docs/results/sppo_learning.md and its figure

Every run starts from the same fitted model and samples 128 completions a step: of 128 problems, or of 16 with 8 each.
Each is used for one update. What is measured is fresh: problems held out from all training, other ones for each seed.
A run that is in the .json is not made again, so an interrupted benchmark goes on where it was; delete the file to begin
anew. A run takes about half a minute.
"""

import argparse
import functools
import itertools
import json
import math
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from learning import start_model
from measuring import interval
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_credit import SPPOConfig, SPPOTrainer
from trl_credit.seam import CreditConfig, CreditTrainer
from trl_credit.toy.quickstart import TINY
from trl_credit.toy.runs import Method, train
from trl_credit.toy.scoring import evaluate, held_out_problems
from trl_credit.toy.task import ChainTask
from trl_credit.toy.tiny_model import load


COMPLETIONS_PER_STEP = 128


@dataclass
class BatchMeanConfig(CreditConfig):
    """GRPO's, with one completion a prompt allowed."""


class BatchMeanTrainer(CreditTrainer):
    """SPPO without a critic: the baseline of all prompts is the mean reward of the batch."""

    _name = "BatchMean"
    config_class = BatchMeanConfig

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        return {**rollout, "advantages": rewards - rewards.mean()}


@dataclass(frozen=True)
class Arm:
    """A method, with its completions of a prompt, and its settings: the best of `SWEEP` and those it needs."""

    method: Method
    generations: int
    settings: dict


ARMS = {
    "SPPO, N=1": Arm(Method("SPPO", SPPOConfig, SPPOTrainer), 1, {"learning_rate": 3e-4, "critic_learning_rate": 3e-4}),
    "no critic, N=1": Arm(Method("no critic", BatchMeanConfig, BatchMeanTrainer), 1, {"learning_rate": 3e-4}),
    "GRPO, N=8": Arm(Method("GRPO", GRPOConfig, GRPOTrainer), 8, {"learning_rate": 3e-4}),
    # RLOO alone has a KL penalty by default.
    "RLOO, N=8": Arm(Method("RLOO", RLOOConfig, RLOOTrainer), 8, {"learning_rate": 3e-4, "beta": 0.0}),
}
SWEEP = {"learning_rate": (1.5e-4, 3e-4, 6e-4), "critic_learning_rate": (1e-4, 3e-4, 1e-3)}
CRITIC_METRICS = ("critic/brier", "critic/ece", "critic/explained_variance")


def shares_right(model, tokenizer, seed: int, problems: int) -> dict[str, float]:
    """Of the problems that are held out for a seed."""
    task = ChainTask(TINY.terms)
    result = evaluate(model, tokenizer, task, held_out_problems(task, problems, seed=1 + seed))
    return {key: sum(getattr(result, f"{key}_right")) / problems for key in ("sampled", "greedy")}


@functools.cache
def before(start: Path, seed: int, problems: int) -> dict:
    """The first point of every run of a seed."""
    return {"step": 0, "tokens": 0, **shares_right(*load(start), seed, problems)}


def measure(name: str, settings: dict, seed: int, steps: int, points: int, problems: int, start: Path) -> dict:
    """Train once, with evaluations at `points` places after the start, evenly spaced."""
    arm = ARMS[name]
    curve = [before(start, seed, problems)]
    model, tokenizer = load(start)
    log: list[dict] = []
    seconds = 0.0

    def on_step(metrics: dict) -> None:
        nonlocal seconds
        tokens = round(metrics["completions/mean_length"] * COMPLETIONS_PER_STEP)
        log.append({**metrics, "tokens": tokens + (log[-1]["tokens"] if log else 0)})
        seconds += metrics["step_time"]
        if metrics["step"] * points % steps < points:  # the first step at or behind a place
            shares = shares_right(model, tokenizer, seed, problems)
            curve.append({"step": metrics["step"], "tokens": log[-1]["tokens"], **shares})

    transformers.set_seed(seed)
    train(
        model,
        tokenizer,
        ChainTask(TINY.terms),
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
    return {
        "method": name,
        "settings": settings,
        "seed": seed,
        "steps": steps,
        "problems": problems,
        "seconds": seconds,
        "curve": curve,
        "tokens": [entry["tokens"] for entry in log],
        "rewards": [round(entry["reward"], 4) for entry in log],
        # None, not NaN: of rewards that are all the same.
        **{key: [entry[key] and round(entry[key], 4) for entry in log] for key in CRITIC_METRICS if key in log[-1]},
    }


def swept(name: str) -> list[dict]:
    """One setting changed at a time."""
    settings = ARMS[name].settings
    changed = [settings | {key: value} for key in SWEEP if key in settings for value in SWEEP[key]]
    return [option for i, option in enumerate(changed) if option not in changed[:i]]


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


# --- The page


def shown(values: list[float], sign: str = "") -> str:
    mean, half = interval(values)
    text = f"{mean:{sign}.1f}" + (f" ± {half:.1f}" if math.isfinite(half) else "")
    return f"**{text}**" if sign and abs(mean) > half else text


def tokens_until(run: dict, level: float, window: int = 10) -> float:
    """Generated tokens until `level` of the rollouts of the last steps are right; infinite if they never are."""
    for end in range(window, len(run["rewards"]) + 1):
        if statistics.mean(run["rewards"][end - window : end]) >= level:
            return run["tokens"][end - 1]
    return math.inf


def results(runs: list[dict]) -> dict[str, list[float]]:
    """What the tables show of the runs of a method, a number for each run."""
    first = runs[0]["curve"][1]["step"]
    early = {f"sampled, {first} steps": [100 * run["curve"][1]["sampled"] for run in runs]}
    return {
        **(early if first < runs[0]["steps"] else {}),
        "sampled, end": [100 * run["curve"][-1]["sampled"] for run in runs],
        "greedy, end": [100 * run["curve"][-1]["greedy"] for run in runs],
        "mean over training": [100 * statistics.mean(run["rewards"]) for run in runs],
    }


def table(groups: dict[str, list[dict]]) -> str:
    """A line for each method and settings."""
    columns = results(next(iter(groups.values())))
    lines = [
        f"| | learning rate | seeds | {' | '.join(columns)} | tokens until 60 % | tokens of a run |",
        f"| --- | --- | --- | {' | '.join('---' for _ in columns)} | --- | --- |",
    ]
    for runs in groups.values():
        until = [tokens_until(run, 0.6) / 1000 for run in runs]
        cells = [shown(values) for values in results(runs).values()]
        cells += [
            shown(until) if max(until) < math.inf else "not by all",
            shown([r["tokens"][-1] / 1000 for r in runs]),
        ]
        settings = runs[0]["settings"]
        rate = f"{settings['learning_rate']:g}"
        if "critic_learning_rate" in settings:
            rate += f", critic {settings['critic_learning_rate']:g}"
        lines.append(f"| {runs[0]['method']} | {rate} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def comparison(groups: dict[str, list[dict]]) -> str:
    """Each method less each behind it in the list, seed by seed, and in words which are told apart."""
    columns = [*results(next(iter(groups.values())))]
    lines = [f"| | seeds | {' | '.join(columns)} |", f"| --- | --- | {' | '.join('---' for _ in columns)} |"]
    wins: dict[str, list[str]] = {what: [] for what in columns}
    for (name, these), (other, those) in itertools.combinations(groups.items(), 2):
        pairs = [(a, b) for a in these for b in those if a["seed"] == b["seed"]]
        ours, theirs = (results([pair[i] for pair in pairs]) for i in (0, 1))
        cells = []
        for what in columns:
            differences = [a - b for a, b in zip(ours[what], theirs[what], strict=True)]
            mean, half = interval(differences)
            if abs(mean) > half:
                wins[what].append(f"{name} over {other}" if mean > 0 else f"{other} over {name}")
            cells.append(shown(differences, "+"))
        lines.append(f"| {name} − {other} | {len(pairs)} | {' | '.join(cells)} |")
    sentences = [f"- {what}: {'; '.join(won) or 'none is told apart from another'}" for what, won in wins.items()]
    return "\n".join(lines) + "\n\nWho wins, where the interval leaves out 0:\n\n" + "\n".join(sentences) + "\n"


def page(record: Record, args) -> str:
    groups: dict[str, list[dict]] = {}
    records = [run for run in record.runs if run["steps"] == args.steps]
    for run in records:
        name = f"{run['method']} {run['settings']}" if args.sweep else run["method"]
        groups.setdefault(name, []).append(run)
    groups = dict(sorted(groups.items(), key=lambda group: [*ARMS].index(group[1][0]["method"])))
    run = records[0]
    command = shlex.join(["python", "benchmarks/sppo_learning.py", *sys.argv[1:]])
    text = f"""Measured by `{command}` with torch {torch.__version__}, one CPU thread:
{run["steps"]} steps of {COMPLETIONS_PER_STEP} completions, one update for each, the same start for all.

- sampled, greedy: percentage of {run["problems"]:,} fresh held-out problems solved
- mean over training: percentage of the rollouts that were right, over all steps
- tokens: generated ones, in thousands; "until 60 %": until so many of the rollouts of the last ten steps were right
- ±: half of the 95 % interval of the mean over the seeds, by Student's t

{table(groups)}"""
    if args.sweep:
        return text
    if len(groups) > 1:
        text += "\nThe same seeds against each other, in points, with the 95 % interval of the mean:\n\n"
        text += comparison(groups)
    with_critic = [run for run in records if "critic/brier" in run]
    if with_critic:
        text += "\n" + calibration(with_critic)
    return text


def calibration(runs: list[dict]) -> str:
    """Whether the critic knows more than the rate of the step, which a constant could."""

    def late(values: list[float | None]) -> float:
        known = [value for value in values[2 * len(values) // 3 :] if value is not None]
        return statistics.mean(known) if known else math.nan

    brier = [late(run["critic/brier"]) for run in runs]
    constant = [late([rate * (1 - rate) for rate in run["rewards"]]) for run in runs]
    explained = [100 * late(run["critic/explained_variance"]) for run in runs]
    return (
        f"The critic of SPPO, mean over the last third of the steps: Brier score {statistics.mean(brier):.3f}, where "
        f"the rate of each step, known in advance, would have {statistics.mean(constant):.3f}; explained variance of "
        f"the rewards {shown(explained)} %.\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=ARMS, default=[*ARMS], metavar="NAME", help=f"of {[*ARMS]}")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 4, for the sweep 100")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--points", type=int, help="evaluations after the start; default: 4, for the sweep 1")
    parser.add_argument("--problems", type=int, default=1024, help="held out, other ones for each seed")
    parser.add_argument("--sweep", action="store_true", help=f"each method at {SWEEP}")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)

    args.seeds = args.seeds or ([100] if args.sweep else [0, 1, 2, 3, 4])
    args.points = args.points or (1 if args.sweep else 4)
    record = Record(args.output / f"sppo_learning{'_sweep' if args.sweep else ''}.json")
    start = start_model(Path("outputs/quickstart"))
    for seed, name in itertools.product(args.seeds, args.methods):
        for settings in swept(name) if args.sweep else [ARMS[name].settings]:
            if record.has(method=name, settings=settings, seed=seed, steps=args.steps):
                continue
            run = measure(name, settings, seed, args.steps, args.points, args.problems, start)
            record.add(run)
            short = {key: value for key, value in run.items() if not isinstance(value, list)}
            print(json.dumps(short, ensure_ascii=False), flush=True)
    record.path.with_suffix(".md").write_text(page(record, args), encoding="utf-8")


if __name__ == "__main__":
    main()
