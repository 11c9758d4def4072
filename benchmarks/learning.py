"""
Does the credit of GRPO-λ help? The quickstart's task, GRPO and variants of GRPO-λ, several seeds.

    python benchmarks/learning.py                                  # the table of docs/results/learning.md
    python benchmarks/learning.py --sweep --seeds 100 --steps 60   # how the learning rates were chosen

Every run starts from the same fitted model and sees the same number of samples; problems, sampling and batches follow
the seed. What is measured is fresh: problems held out from all training, drawn anew for each seed.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import datasets
import torch
import transformers

from trl_credit.toy.quickstart import TINY
from trl_credit.toy.runs import train
from trl_credit.toy.scoring import Estimate, evaluate, held_out_problems
from trl_credit.toy.task import ChainTask
from trl_credit.toy.tiny_model import TinyModelSettings, fit_and_save, load


# Name: trainer, settings. 3e-4 was the best rate for GRPO and for GRPO-λ: docs/results/learning_sweep.md.
METHODS = {
    "GRPO": ("grpo", {"learning_rate": 3e-4}),
    "GRPO, advantages clamped at -0.1": ("grpo-lambda", {"learning_rate": 3e-4, "trace_lambda": 0.0}),
    "GRPO-λ, recent": ("grpo-lambda", {"learning_rate": 3e-4}),
    "GRPO-λ, recent, no clamp": ("grpo-lambda", {"learning_rate": 3e-4, "min_advantage": None}),
    "GRPO-λ, both, no clamp": (
        "grpo-lambda",
        {"learning_rate": 3e-4, "min_advantage": None, "trace_style": "both"},
    ),
    "GRPO-λ, weight, no clamp": (
        "grpo-lambda",
        {"learning_rate": 3e-4, "min_advantage": None, "trace_update": "weight"},
    ),
}
DEFAULT = ["GRPO", "GRPO, advantages clamped at -0.1", "GRPO-λ, recent", "GRPO-λ, recent, no clamp"]
SWEEP = (1e-4, 3e-4, 5e-4, 1e-3)


def start_model(folder: Path) -> Path:
    settings = TinyModelSettings(terms=TINY.terms)
    path = settings.folder(folder)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fit_and_save(settings, path)
    return path


@torch.no_grad()
def kl_to_start(model, start, tokenizer, task: ChainTask, problems: list[str], completions: list[str]) -> float:
    """Mean over the model's own samples of log π - log π_start, in nats per completion."""
    model.eval(), start.eval()
    total = 0.0
    for at in range(0, len(problems), 256):
        prompts = [task.prompt(problem) for problem in problems[at : at + 256]]
        texts = [
            prompt + completion + tokenizer.eos_token
            for prompt, completion in zip(prompts, completions[at : at + 256], strict=True)
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(model.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device).unsqueeze(1)
        columns = torch.arange(1, batch.input_ids.shape[1], device=model.device)
        mask = (columns >= lengths) & (batch.attention_mask[:, 1:] == 1)
        logps = [
            policy(**batch).logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
            for policy in (model, start)
        ]
        total += ((logps[0] - logps[1]) * mask).sum().item()
    return total / len(problems)


def measure(name: str, seed: int, steps: int, problems: int, start: Path, output: Path, **changes) -> dict:
    method, settings = METHODS[name]
    settings = settings | changes
    task = ChainTask(TINY.terms)
    model, tokenizer = load(start)
    began = time.perf_counter()
    rewards = []
    transformers.set_seed(seed)
    train(
        model,
        tokenizer,
        task,
        method,
        steps=steps,
        prompts_per_step=TINY.prompts_per_step,
        seed=seed,
        output_dir=output,
        on_step=lambda metrics: rewards.append(metrics["reward"]),
        **settings,
    )
    seconds = time.perf_counter() - began
    result = evaluate(model, tokenizer, task, held_out_problems(task, problems, seed=1 + seed))
    original, _ = load(start)
    return {
        "method": name,
        "trainer": method,
        "settings": settings,
        "seed": seed,
        "steps": steps,
        "problems": problems,
        "sampled": sum(result.sampled_right) / problems,
        "greedy": sum(result.greedy_right) / problems,
        "training": statistics.mean(rewards),
        "kl": kl_to_start(model, original, tokenizer, task, result.problems, result.sampled),
        "seconds": seconds,
        "rewards": [round(reward, 4) for reward in rewards],
    }


def table(runs: list[dict], before: dict) -> str:
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["settings"]["learning_rate"]), []).append(run)
    lines = [
        "| method | learning rate | seeds | sampled | greedy | mean over training | KL to the start |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| before training | – | – | {before['sampled']:.1%} | {before['greedy']:.1%} | – | 0 |",
    ]
    for (name, rate), group in groups.items():
        cells = []
        for key in ("sampled", "greedy", "training"):
            values = [100 * run[key] for run in group]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread} %")
        kl = statistics.mean(run["kl"] for run in group)
        lines.append(f"| {name} | {rate:g} | {len(group)} | {' | '.join(cells)} | {kl:.2f} |")
    return "\n".join(lines) + "\n"


def as_json(runs: list[dict], before: dict) -> str:
    """One run a line."""
    lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)
    return f'{{"before": {json.dumps(before)}, "runs": [\n{lines}\n]}}\n'


def page(runs: list[dict], before: dict) -> str:
    steps, problems = runs[0]["steps"], runs[0]["problems"]
    command = shlex.join(["python", "benchmarks/learning.py", *sys.argv[1:]])
    return f"""Measured by `{command}` with torch {torch.__version__}, one CPU thread: {steps} steps of
{TINY.prompts_per_step} prompts with 8 completions each, the same start and number of samples for all.

- sampled, greedy: share of {problems:,} fresh held-out problems solved after the training; mean over the seeds and
  standard deviation between them (the 95 % interval of one run is at most ± {196 * (0.25 / problems) ** 0.5:.1f})
- mean over training: share solved in the rollouts, over all steps: how fast it learns
- KL to the start: nats per completion, trained policy against the one before training

{table(runs, before)}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=DEFAULT, metavar="NAME", help=f"of {[*METHODS]}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=TINY.steps)
    parser.add_argument("--problems", type=int, default=2048, help="held out, other ones for each seed")
    parser.add_argument("--sweep", action="store_true", help=f"each method at the learning rates {SWEEP}")
    parser.add_argument("--output", type=Path, default=Path("docs/results/learning"), help="writes .json and .md")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)

    work = Path("outputs/quickstart")
    start = start_model(work)
    task = ChainTask(TINY.terms)
    result = evaluate(*load(start), task, held_out_problems(task, args.problems, seed=0))
    before = {key: Estimate.of(getattr(result, f"{key}_right")).mean for key in ("sampled", "greedy")}
    runs = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.methods:
            for rate in SWEEP if args.sweep else [METHODS[name][1]["learning_rate"]]:
                run = measure(name, seed, args.steps, args.problems, start, work / "benchmark", learning_rate=rate)
                runs.append(run)
                shown = {key: value for key, value in run.items() if key not in ("rewards", "trainer", "problems")}
                print(json.dumps(shown, ensure_ascii=False), flush=True)
                # After each run, so that an interrupted benchmark keeps what it has.
                args.output.with_suffix(".json").write_text(as_json(runs, before), encoding="utf-8")
                args.output.with_suffix(".md").write_text(page(runs, before), encoding="utf-8")
    print(table(runs, before))


if __name__ == "__main__":
    main()
