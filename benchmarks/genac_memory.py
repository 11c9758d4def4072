"""
What a GenAC update needs in memory for the logits of the critic's answers: whole, as it was, and in tiles.

    python benchmarks/genac_memory.py --output docs/results/genac_memory.md

An update of the critic's engine on the answers about one completion, with a random Qwen2 that has the vocabulary of
Qwen2.5 and next to nothing below its head, in float32 on one core. Each is made in a process of its own, after a small
one, by which weights, gradients and the optimizer's state are in place. Memory is the most that the process has held
(`ru_maxrss`) over what it held before the update.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
from genac_packing import Shape, plan
from measuring import run_in_process


ARMS = {"whole": "whole logits", "tiles": "tiles"}
COMPLETIONS = (240, 480, 960)


def run_one(arm: str, completion: int, words: int) -> None:
    """One update in this process."""
    from accelerate import Accelerator
    from transformers import AutoConfig, AutoModelForCausalLM

    from trl_credit.critics.engine.engine import CriticEngine, CriticOptimization
    from trl_credit.critics.generative import packed

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=words,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    engine = CriticEngine(
        AutoModelForCausalLM.from_config(config), Accelerator(cpu=True), CriticOptimization(learning_rate=1e-5)
    )
    engine.begin(2)

    def count(rows) -> torch.Tensor:
        return torch.tensor(sum(row.answer_tokens for row in rows))

    def update(shape: Shape) -> tuple[int, dict]:
        batches = plan(shape, 10**6, True)
        result = engine.update(batches, lambda network, rows: -packed.answer_log_probs(network, rows)[0].sum(), count)
        return int(sum(map(count, batches))), result

    if arm == "whole":
        patch.object(packed, "why_not_tiled", lambda network: "as it was").start()
    update(Shape(16, 16, 16, 16, 4))
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    started = time.process_time()
    answers, result = update(Shape(completion))
    cpu = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - held
    print(
        json.dumps({"answers": answers, "peak": peak, "cpu": cpu, "loss": result["loss"], "norm": result["grad_norm"]})
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=151_936)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--completion", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        return run_one(args.arm, args.completion, args.words)
    lines = [
        f"Measured by `python benchmarks/genac_memory.py`: one update, {args.words} words, float32.",
        "",
        "| T | answer tokens | | memory, MiB | bytes per answer token and word | CPU seconds | gradient norm |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for completion in COMPLETIONS:
        for arm, name in ARMS.items():
            options = ("--arm", arm, "--completion", completion, "--words", args.words)
            found = run_in_process(__file__, *map(str, options))
            per_word = found["peak"] * 2**20 / found["answers"] / args.words
            lines.append(
                f"| {completion} | {found['answers']} | {name} | {found['peak']:.0f} | {per_word:.2f} | "
                f"{found['cpu']:.1f} | {found['norm']:.7g} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
