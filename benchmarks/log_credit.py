"""
What `log_credit` costs: the time of a run's steps with and without it.

    python benchmarks/log_credit.py --output docs/results/log_credit.md

All arms train the same model on the same data with the same seed, in one process, in turn, round after round; the arm
that comes first changes from round to round. Completions always have the full length. CPU time of the process is
measured next to wall time, which other work on the machine disturbs. What the log itself takes is also measured inside
the run, around each of its calls: the two others are differences of large and noisy numbers.
"""

import argparse
import platform
import statistics
import tempfile
import time
from functools import wraps
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer

from trl_credit import VAPOConfig, VAPOTrainer
from trl_credit.credit_log.log import CreditLog


ARMS = {
    "without": {},
    "`log_credit_steps=50`, between two tables": {"log_credit": True},
    "`log_credit_steps=1`, a table every step": {"log_credit": True, "log_credit_steps": 1},
}


def make_trainer(args, settings: dict, folder: str) -> VAPOTrainer:
    vocab = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    training_args = VAPOConfig(
        folder,
        max_steps=args.steps + 1,
        per_device_train_batch_size=args.batch,
        num_generations=args.batch,
        max_completion_length=args.length,
        generation_kwargs={"min_new_tokens": args.length},
        critic_pretraining_steps=0,
        gradient_checkpointing=False,
        bf16=cuda,
        logging_strategy="no",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    return VAPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(len(set(text)) % 2) for text in completions],
        args=training_args,
        train_dataset=Dataset.from_dict({"prompt": ["Once upon a time"] * 64}),
        processing_class=tokenizer,
        critic=model,
    )


def measure(args, settings: dict) -> dict[str, float]:
    """Wall and CPU seconds of a step, and CPU seconds that its credit log took, after a step that warms up."""
    logged = 0.0

    def timed(method):
        @wraps(method)
        def call(*a, **k):
            nonlocal logged
            started = time.process_time()
            result = method(*a, **k)
            logged += time.process_time() - started
            return result

        return call

    kept = {name: getattr(CreditLog, name) for name in ("begin_rollout", "add", "after_loss")}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, settings, folder)
        begun = []
        step = trainer.training_step

        def mark(*a, **k):
            if len(begun) < 2:  # the first step warms up
                begun.append((time.perf_counter(), time.process_time(), logged))
            return step(*a, **k)

        trainer.training_step = mark
        for name, method in kept.items():
            setattr(CreditLog, name, timed(method))
        try:
            trainer.train()
        finally:
            for name, method in kept.items():
                setattr(CreditLog, name, method)
        wall, cpu, log = begun[1]
        end = time.perf_counter(), time.process_time(), logged
        sizes = [path.stat().st_size / 1024 for path in Path(folder).rglob("*.parquet")]
    return {
        "wall": (end[0] - wall) / args.steps,
        "cpu": (end[1] - cpu) / args.steps,
        "log": (end[2] - log) / args.steps,
        "size": max(sizes, default=0.0),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    results = {arm: [] for arm in ARMS}
    for turn in range(args.rounds):
        arms = list(ARMS)
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
            results[arm].append(measure(args, ARMS[arm]))
            print(turn, arm, results[arm][-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    lines = [
        f"Measured by `python benchmarks/log_credit.py --rounds {args.rounds} --steps {args.steps}` on {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}: VAPO, policy and critic of {args.layers} "
        f"layers of {args.hidden}, vocabulary {args.vocab}, {args.batch} completions of {args.length} tokens, all "
        f"of them logged, {args.steps} steps a run, {args.rounds} rounds.",
        "",
        "| | CPU seconds a step, median [min, max] | over without, round by round | wall seconds a step | over without "
        "| the log's own CPU time, share of a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm, runs in results.items():
        cells = [arm]
        for kind in ("cpu", "wall"):
            times = sorted(run[kind] for run in runs)
            ratios = sorted(b[kind] / a[kind] for a, b in zip(results["without"], runs, strict=True))
            cells.append(f"{statistics.median(times):.3f} [{times[0]:.3f}, {times[-1]:.3f}]")
            cells.append(
                f"{statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]" if arm != "without" else ""
            )
        shares = sorted(100 * run["log"] / run["cpu"] for run in runs)
        share = f"**{statistics.median(shares):.2f} %** [{shares[0]:.2f}, {shares[-1]:.2f}]" if arm != "without" else ""
        lines.append(f"| {' | '.join(cells)} | {share} |")
    size = statistics.median(run["size"] for run in results["`log_credit_steps=1`, a table every step"])
    lines += ["", f"A table of {args.batch} completions of {args.length} tokens has {size:.0f} KiB."]
    print("\n".join(lines))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
