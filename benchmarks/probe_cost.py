"""
What a probe critic costs: time of a step and peak memory of VAPO with one, next to the same step of GRPO.

    python benchmarks/probe_cost.py --output docs/results/probe_cost.md

Same model, data, seed, samples, KL penalty and number of tokens. Each arm trains in a process of its own, and they take
turns, step by step: while one works the others wait, so that what the machine does meanwhile falls on all alike. A time
is divided by GRPO's of the same turn; on a CPU it is the processor's. The first `--warmup` steps are not counted. The
replay buffer is not full after a few steps: what it lacks is added to the peak.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import make_model, make_tokenizer, peak_memory


ARMS = {
    "GRPO": None,
    "probe critic": {},
    "probe critic, three layers, log-probability and entropy": {"probe_layers": [0, 1, -1], "probe_uncertainty": True},
}


def buffer_in_full(trainer, rollouts: int) -> float:
    """What the replay buffer still lacks when it is full, in MiB."""
    kept = trainer.engine.learner.buffer.state_dict()["rollouts"]
    size = sum(x.nbytes for pair in kept for x in pair) / 2**20
    return size * trainer.args.probe_buffer_rollouts / len(kept) - size


def clock() -> float:
    """On a CPU the time of this process alone, whatever else the machine does."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def run_one(arm: str, args) -> None:
    """Train in this process, a step for every line that comes in; print its seconds, and the peak in MiB at the end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from trl_credit import VAPOConfig, VAPOTrainer

    tokenizer, cuda = make_tokenizer(), torch.cuda.is_available()
    libraries = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(tokenizer, args.hidden, args.layers, args.vocab)
        parameters = sum(p.numel() for p in model.parameters())
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        del model
        settings = {
            "output_dir": f"{folder}/out",
            "per_device_train_batch_size": args.batch,
            "num_generations": 4,
            "max_completion_length": args.length,
            "max_steps": args.warmup + args.steps,
            "beta": 0.03,
            "generation_kwargs": {"min_new_tokens": args.length},
            "bf16": cuda,
            "use_cpu": not cuda,
            "model_init_kwargs": {"dtype": "bfloat16" if cuda else "float32"},
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
        }

        def reward(completion_ids, **kwargs):
            return [sum(ids) % 7 / 7 for ids in completion_ids]

        own = ARMS[arm]
        if own is None:
            trainer_class, config = GRPOTrainer, GRPOConfig(**settings)
        else:
            own = {"critic_model_name_or_path": "probe", "policy_lambda": 0.5, "positive_lm_coef": 0.0, **own}
            trainer_class, config = VAPOTrainer, VAPOConfig(**settings, **own)
        data = Dataset.from_dict({"prompt": ["What is the answer, and why?"] * 64})
        trainer = trainer_class(f"{folder}/model", reward, config, train_dataset=data)
        step, spent = trainer.training_step, []

        def timed(function):
            def call(*args, **kwargs):
                started = clock()
                result = function(*args, **kwargs)
                if cuda:
                    torch.cuda.synchronize()
                spent.append(clock() - started)
                return result

            return call

        def in_turn(*a, **k):
            sys.stdin.readline()
            spent.clear()
            started = clock()
            result = step(*a, **k)
            if cuda:
                torch.cuda.synchronize()
            line = {"seconds": clock() - started, "credit": sum(spent)}
            print(json.dumps(line), file=answers, flush=True)
            return result

        if own is not None:
            trainer.assign_credit = timed(trainer.assign_credit)
        trainer.training_step = in_turn
        trainer.train()
        peak = peak_memory() - libraries
        lacks = 0.0 if own is None else buffer_in_full(trainer, args.warmup + args.steps)
    print(json.dumps({"peak": peak + lacks, "parameters": parameters}), file=answers, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="Steps of each arm that count.")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, help="Its table is appended.")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        return run_one(args.arm, args)
    command = [sys.executable, __file__, *sys.argv[1:], "--arm"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    workers = {arm: subprocess.Popen([*command, arm], **pipes) for arm in args.arms}
    turns = []
    for number in range(args.warmup + args.steps):
        turn = {}
        for arm, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            turn[arm] = json.loads(worker.stdout.readline())
        if number >= args.warmup:
            turns.append(turn)
    ends = {arm: json.loads(worker.stdout.readline()) for arm, worker in workers.items()}
    for worker in workers.values():
        worker.wait()

    base = ends["GRPO"]
    lines = [
        f"{base['parameters'] / 1e6:.0f} M parameters, {args.layers} layers of width {args.hidden}, {args.vocab:,} "
        f"words, {args.batch} completions of {args.length} tokens, {args.steps} steps of each arm in turn, "
        f"{'one GPU, bf16' if torch.cuda.is_available() else 'CPU, float32'}.",
        "",
        f"| | seconds a step{'' if torch.cuda.is_available() else ' of the processor'} | × GRPO of the same turn, "
        "median (quartiles) | of it in the credit | peak memory, MiB | × GRPO |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm, end in ends.items():
        seconds = statistics.median(turn[arm]["seconds"] for turn in turns)
        ratios = [turn[arm]["seconds"] / turn["GRPO"]["seconds"] for turn in turns]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        credit = statistics.median(turn[arm]["credit"] / turn[arm]["seconds"] for turn in turns)
        lines.append(
            f"| {arm} | {seconds:.2f} | {middle:.3f} ({low:.3f}, {high:.3f}) | {credit:.2%} | {end['peak']:.0f} | "
            f"{end['peak'] / base['peak']:.3f} |"
        )
    table = "\n".join(lines) + "\n"
    print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("a") as file:
            file.write(table + "\n")


if __name__ == "__main__":
    main()
