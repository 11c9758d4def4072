"""
What SPPO costs next to GRPO at the same number of prompts a step: one completion a prompt and a critic that reads the
prompt, against eight completions.

    python benchmarks/sppo_cost.py --output docs/results/sppo_cost.md

Each arm runs in a process of its own, the arms in turn, several times over and every other time backwards. All train on
micro-batches of the same size, and completions always have the full length. CPU seconds are those of the process: what
else the machine does lengthens the wall's more than them.

Of P prompts with p tokens and N completions of T, a policy of A parameters takes 2A·P(p + NT) operations to generate
and 6A·PN(p + T) to train. A critic of C parameters adds 2C·Pp for values and 6C·Pp to train.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import make_model, make_tokenizer, peak_memory, run_in_process
from transformers import TrainerCallback


PROMPT = "What is {:03}?\nA:"
# Name: completions a prompt, and hidden size and layers of the critic as multiples of the policy's.
ARMS = {
    "GRPO, N=8": (8, None),
    "SPPO, N=1, critic 1×": (1, (1, 1)),
    "SPPO, N=1, critic 1/4×": (1, (1 / 2, 5 / 6)),
    "SPPO, N=1, critic 1/16×": (1, (1 / 4, 1 / 2)),
}


def now() -> torch.Tensor:
    """Seconds of the CPU in this process, and on the wall."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return torch.tensor([time.process_time(), time.perf_counter()], dtype=torch.float64)


class StepClock(TrainerCallback):
    """Seconds of each step, all of them and those of the critic."""

    def __init__(self):
        self.steps: list[dict] = []
        self.critic = torch.zeros(2, dtype=torch.float64)

    def on_step_begin(self, args, state, control, **kwargs):
        self.critic.zero_()
        self.began = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append({"whole": (now() - self.began).tolist(), "critic": self.critic.tolist()})

    def of_critic(self, call):
        """`call`, which is the critic's."""

        def timed(*args, **kwargs):
            began = now()
            result = call(*args, **kwargs)
            self.critic += now() - began
            return result

        return timed


def run_one(arm: str, args) -> None:
    """Train in this process and print the seconds of each step, all of them and the critic's, and the peak memory."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from trl_credit import SPPOConfig, SPPOTrainer

    generations, critic_size = ARMS[arm]
    tokenizer = make_tokenizer()
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    libraries = peak_memory()
    model = make_model(tokenizer, args.hidden, args.layers, args.vocab, dtype)
    parameters = {"policy": model.num_parameters(), "critic": 0}
    rows = [{"prompt": PROMPT.format(i)} for i in range(args.prompts * (args.steps + 1))]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": args.prompts,
            "gradient_accumulation_steps": generations,
            "num_generations": generations,
            "max_completion_length": args.length,
            "generation_kwargs": {"min_new_tokens": args.length},
            "max_steps": args.steps + 1,
            "gradient_checkpointing": False,
            "bf16": cuda,
            "use_cpu": not cuda,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        clock = StepClock()
        shared = {
            "model": model,
            "reward_funcs": lambda completion_ids, **kwargs: [sum(ids) % 7 / 7 for ids in completion_ids],
            "train_dataset": Dataset.from_list(rows),
            "processing_class": tokenizer,
            "callbacks": [clock],
        }

        class TimedSPPO(SPPOTrainer):
            def make_critic_reader(self, runner):
                reader = super().make_critic_reader(runner)
                reader.prompt_values = clock.of_critic(reader.prompt_values)
                return reader

        if critic_size is None:
            trainer = GRPOTrainer(args=GRPOConfig(**settings), **shared)
        else:
            width, depth = critic_size
            critic = make_model(tokenizer, int(args.hidden * width), int(args.layers * depth), args.vocab, dtype)
            trainer = TimedSPPO(args=SPPOConfig(**settings), critic=critic, **shared)
            parameters["critic"] = sum(p.numel() for p in trainer.critic.parameters())
            trainer.update_critic = clock.of_critic(trainer.update_critic)
            del critic
        del model, shared["model"]
        trainer.train()
    completions = args.prompts * generations
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log]
    print(
        json.dumps(
            {
                "steps": clock.steps[1:],  # the first one warms up
                "peak": peak_memory() - libraries,
                "tokens": statistics.mean(lengths) * completions,
                **parameters,
            }
        )
    )


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def table(runs: dict[str, list[dict]]) -> str:
    """Medians of the rounds, and the least and most of them."""

    def seconds(run: dict, part: str, clock: int) -> float:
        return statistics.median(step[part][clock] for step in run["steps"])

    lines = [
        "| | generated tokens a step | CPU seconds a step | wall seconds a step | × GRPO, CPU | peak memory, MiB | "
        "× GRPO | critic's share of the step, CPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = runs["GRPO, N=8"]
    for arm, of_arm in runs.items():
        pairs = list(zip(of_arm, base, strict=True))
        cells = [
            f"{of_arm[0]['tokens']:,.0f}",
            spread([seconds(run, "whole", 0) for run in of_arm]),
            spread([seconds(run, "whole", 1) for run in of_arm]),
            spread([seconds(run, "whole", 0) / seconds(other, "whole", 0) for run, other in pairs]),
            spread([run["peak"] for run in of_arm], 0),
            spread([run["peak"] / other["peak"] for run, other in pairs]),
            spread([100 * seconds(run, "critic", 0) / seconds(run, "whole", 0) for run in of_arm], 1) + " %"
            if of_arm[0]["critic"]
            else "–",
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 256, for the critics to be one of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--steps", type=int, default=3, help="measured in a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        return run_one(args.arm, args)
    runs = {arm: [] for arm in ARMS}
    for number in range(args.rounds):
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            runs[arm].append(run_in_process(__file__, *sys.argv[1:], "--arm", arm))
            print(f"round {number}: {arm} {json.dumps(runs[arm][-1])}", flush=True)
    policy = runs["GRPO, N=8"][0]["policy"]
    critics = ", ".join(f"{of_arm[0]['critic'] / 1e6:.2f} M" for of_arm in runs.values() if of_arm[0]["critic"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    command = shlex.join(["python", "benchmarks/sppo_cost.py", *sys.argv[1:]])
    prompt = len(PROMPT.format(0))
    page = f"""Measured by `{command}` on {device}, {torch.get_num_threads()} thread, torch {torch.__version__}:
a policy of {policy / 1e6:.2f} M parameters, critics of {critics}; {args.prompts} prompts of {prompt} tokens a step and
completions of {args.length}; {args.steps} steps in each of {args.rounds} rounds. Median of the rounds [least, most].

{table(runs)}
By operations alone a critic of the policy's size, with prompts of p tokens and completions of T, takes p / (2p + T) of
a step: here {prompt / (2 * prompt + args.length):.0%}, less in time because generation takes more than its operations.
"""
    print(page)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
