"""
What GRPO-λ costs over GRPO: step time and peak memory on the same model, data and seed.

    python benchmarks/overhead.py --output docs/results/overhead.md

Each pair runs `GRPOTrainer` and `GRPOLambdaTrainer` one after the other, in processes of their own and in alternating
order. Completions always have the full length, so that both do the same work.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import make_model, make_tokenizer, peak_memory, run_in_process


TRAINERS = ("GRPOTrainer", "GRPOLambdaTrainer")


def run_one(name: str, args) -> None:
    """Train in this process and print the step times in seconds and the peak memory in MiB."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer

    trainer_class, config_class, extra = {
        "GRPOTrainer": (GRPOTrainer, GRPOConfig, {}),
        "GRPOLambdaTrainer": (GRPOLambdaTrainer, GRPOLambdaConfig, {"trace_style": args.trace_style}),
    }[name]
    tokenizer = make_tokenizer()
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        dtype = torch.bfloat16 if cuda else torch.float32
        model = make_model(tokenizer, args.hidden, args.layers, args.vocab, dtype)
        config = config_class(
            folder,
            max_steps=args.steps + 1,
            per_device_train_batch_size=args.batch,
            num_generations=args.batch,
            max_completion_length=args.length,
            generation_kwargs={"min_new_tokens": args.length},
            num_iterations=args.num_iterations,
            bf16=cuda,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **extra,
        )
        trainer = trainer_class(
            model=model,
            reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["Once upon a time"] * 64}),
            processing_class=tokenizer,
        )
        trainer.train()
    times = [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry]
    print(json.dumps({"times": times[1:], "peak": peak_memory()}))  # the first step warms up


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--num_iterations", type=int, default=1)
    parser.add_argument("--trace_style", default="recent")
    parser.add_argument("--only", choices=TRAINERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return run_one(args.only, args)

    argv = sys.argv[1:]
    runs = {name: [] for name in TRAINERS}
    for pair in range(args.pairs):
        for name in TRAINERS if pair % 2 == 0 else TRAINERS[::-1]:
            runs[name].append(run_in_process(__file__, *argv, "--only", name))
            last = runs[name][-1]
            print(f"pair {pair}: {name} {statistics.median(last['times']):.4f} s, {last['peak']:.1f} MiB", flush=True)

    def ratios(value):
        return sorted(value(b) / value(a) for a, b in zip(*runs.values(), strict=True))

    time_ratios = ratios(lambda run: statistics.median(run["times"]))
    peak_ratios = ratios(lambda run: run["peak"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    lines = [
        f"Measured by `python {' '.join(['benchmarks/overhead.py', *argv])}` on {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}: "
        f"{args.layers} layers of {args.hidden}, vocabulary {args.vocab}, {args.batch} completions of {args.length} "
        f"tokens, {args.steps} steps a run, {args.pairs} pairs.",
        "",
        "| | step time (median of runs) | peak memory (median) |",
        "| --- | --- | --- |",
    ]
    for name in TRAINERS:
        step = statistics.median(statistics.median(run["times"]) for run in runs[name])
        lines.append(f"| `{name}` | {step:.3f} s | {statistics.median(run['peak'] for run in runs[name]):.0f} MiB |")
    cells = [f"**{statistics.median(r):.3f}** [{r[0]:.3f}, {r[-1]:.3f}]" for r in (time_ratios, peak_ratios)]
    lines.append(f"| ratio, pair by pair: median [min, max] | {cells[0]} | {cells[1]} |")
    print("\n".join(lines))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
