"""
What it takes to train a generative critic on all states of a completion: in rows that share it, and naively.

    python benchmarks/genac_packing.py --output docs/results/genac_packing.md

The first table, all that `--count` prints, counts tokens, for the shapes of the paper (arXiv:2604.10701): segments of
120 tokens, answers of 300, completions of 8192; its default is that of `GenACConfig`, with a mask in bfloat16. The
others are measured: log-probabilities, a loss and the backward pass over all answers about one completion, with a
random Qwen2 on one core, each arm in a process of its own, the arms in turn. CPU time is that of the process, which
other work on the machine disturbs less than the time on the clock. Memory is the most that the process has held so
far, over what it held before its first update.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from trl_credit import GenACConfig
from trl_credit.critics.generative.packed import CriticQuery, Row, answer_log_probs, plan_rows


class Shape(NamedTuple):
    """Tokens of a completion, a segment, an answer, and of what comes before and behind the partial solution."""

    completion: int
    segment: int = 120
    answer: int = 300
    head: int = 300
    tail: int = 40


# The limit on tokens of a micro-batch, which is one on the length of rows that share, and whether they do.
ARMS = {"naive": (8192, False), "one row": (10**6, True), "rows of 4096": (4096, True)}
COUNTED = {
    "naive": (10**6, False),
    "one row": (10**6, True),
    "default": (GenACConfig.critic_update_batch_tokens, True, int(GenACConfig.critic_mask_memory * 2**30)),
    **{f"rows of {limit}": (limit, True) for limit in (16384, 8192)},
}
# T = 8192 at width 4096, all divided by 16: the same share of attention in the work at width 256.
SCALED = Shape(512, 8, 19, 19, 3)
MEASURED = [SCALED, *(Shape(tokens) for tokens in (240, 480, 960, 1920))]


def plan(shape: Shape, limit: int, packed: bool, mask_bytes: int | None = None) -> list[list[Row]]:
    """The micro-batches of one completion of random tokens. A mask is in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def ids(number):
        return torch.randint(0, 4096, (number,), generator=generator).tolist()

    cuts = list(range(shape.head, shape.head + shape.completion, shape.segment))
    query = CriticQuery(ids(cuts[-1]), cuts, ids(shape.tail))
    return plan_rows([query], [[ids(shape.answer) for _ in cuts]], limit, packed, mask_bytes, itemsize=2)


def tokens_read(batches: list[list[Row]]) -> int:
    """By the network in an update."""
    return sum(len(row) for rows in batches for row in rows)


def run_one(args) -> None:
    """Measure one arm in this process, the shapes that take more memory last."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        max_position_embeddings=2**17,
    )
    model = AutoModelForCausalLM.from_config(config)

    def update(batches):
        for rows in batches:
            answer_log_probs(model, rows)[0].sum().backward()

    update(plan(Shape(256, 128, 16, 16, 4), 1000, True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = []
    for shape in MEASURED:
        batches = plan(shape, *ARMS[args.arm])
        cpu, wall = time.process_time(), time.perf_counter()
        update(batches)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
        results.append({"cpu": cpu, "wall": wall, "peak": peak, "tokens": tokens_read(batches)})
    print(json.dumps(results))


def measure(args) -> dict[str, list[list[dict]]]:
    """For each arm and round the results of all shapes."""
    results: dict = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[arm].append(json.loads(output.splitlines()[-1]))
            print(arm, output.splitlines()[-1], file=sys.stderr, flush=True)
    return results


def measured_table(results: dict, shapes: list[Shape]) -> list[str]:
    """Each arm at each shape."""
    lines = [
        "| T | states | | tokens read | CPU seconds (least to most) | × naive | seconds on the clock | memory, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape in shapes:
        place = MEASURED.index(shape)
        naive = statistics.median(run[place]["cpu"] for run in results["naive"])
        for arm, runs in results.items():
            cpu, wall, peak = ([run[place][name] for run in runs] for name in ("cpu", "wall", "peak"))
            tokens = runs[0][place]["tokens"]
            earlier = statistics.median(run[place - 1]["peak"] for run in runs) if place else 0
            bound = "≤ " if statistics.median(peak) <= earlier + 1 else ""  # set by a shape before
            lines.append(
                f"| {shape.completion} | {-(-shape.completion // shape.segment)} | {arm} | "
                f"{tokens} ({tokens / shape.completion:.1f} T) | {statistics.median(cpu):.2f} ({min(cpu):.2f} to "
                f"{max(cpu):.2f}) | {statistics.median(cpu) / naive:.2f} | {statistics.median(wall):.2f} | "
                f"{bound}{statistics.median(peak):.0f} |"
            )
    return lines


def count_table() -> list[str]:
    """Tokens per token of a completion."""
    lines = [
        f"| T | {' | '.join(COUNTED)} | T²/2L₁ + 2.5 T of the paper, naive |",
        "| --- " * (len(COUNTED) + 2) + "|",
    ]
    for tokens in (120, 240, 480, 1024, 2048, 4096, 8192, 16384):
        read = (f"{tokens_read(plan(Shape(tokens), *limits)) / tokens:.2f} T" for limits in COUNTED.values())
        lines.append(f"| {tokens} | {' | '.join(read)} | {tokens / 240 + 2.5:.1f} T |")
    return lines


def notes(results: dict) -> list[str]:
    """What the tables say about where sharing pays."""
    longest = MEASURED[-1]

    def against_naive(arm: str, shape: Shape, name: str) -> str:
        arms = ([run[MEASURED.index(shape)][name] for run in results[which]] for which in (arm, "naive"))
        share, whole = map(statistics.median, arms)
        return f"{share / whole:.2f}"

    tight = tokens_read(plan(Shape(8192), 8192, True)) / 8192
    return [
        "Where sharing stops paying:",
        "",
        "- With one state there is nothing to share. From two on fewer tokens are read, and the gain grows with T.",
        "- The gain in time is smaller than that in tokens. A dense mask saves no work, and attention "
        f"grows with the square of the row. At width 256 and T = {longest.completion} one row has "
        f"{against_naive('one row', longest, 'tokens')} of naive's tokens and takes "
        f"{against_naive('one row', longest, 'cpu')} of its time; rows of 4096 read more and take "
        f"{against_naive('rows of 4096', longest, 'cpu')}. In the scaled shape, where attention has the share that it "
        f"has in a wide network, one row takes {against_naive('one row', SCALED, 'cpu')}. FlexAttention skips what the "
        "mask hides; it was not measured, for want of a GPU.",
        "- Each row repeats the completion up to its last state, so a limit near the length of that undoes the "
        f"sharing: rows of at most 8192 tokens read {tight:.1f} T at T = 8192. Less than 4 T takes rows of 4 T.",
        "- Memory follows the limit on a micro-batch. One row adds its dense mask: 4 bytes times its length squared "
        "in float32, 2 in bfloat16.",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--count", action="store_true", help="count tokens and measure nothing")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        return run_one(args)
    if args.count:
        return print(*count_table(), sep="\n")
    usual = Shape(0)
    results = measure(args)
    lines = [
        "Counted and measured by `python benchmarks/genac_packing.py`. "
        f"Segments of {usual.segment} tokens, answers of {usual.answer}, {usual.head} tokens before the partial "
        f"solution and {usual.tail} behind it. Tokens that the critic reads in an update:",
        "",
        *count_table(),
        "",
        f"Measured with {args.layers} layers of width {args.hidden}, float32, one core, {args.rounds} rounds, medians; "
        "naive in micro-batches of 8192 tokens:",
        "",
        *measured_table(results, [shape for shape in MEASURED if shape != SCALED]),
        "",
        f"A completion of 8192 tokens at width 4096, all divided by 16, which keeps the share of attention in the work "
        f"(segments of {SCALED.segment} tokens, answers of {SCALED.answer}, {SCALED.head} and {SCALED.tail} around the "
        "partial solution, width 256):",
        "",
        *measured_table(results, [SCALED]),
        "",
        *notes(results),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
