"""
How many of the tokens that a critic reads are real, how evenly processes share them, how often it reads each, and what
is in memory when it is updated.

    python benchmarks/real_tokens.py --output docs/results/real_tokens.md

Lengths are drawn from a log-normal distribution and cut at the longest, as skewed as those of reasoning models.
"Padded" is what was read before: each micro-batch of the policy, every row as wide as the longest prompt and the
longest completion of the rollout. What is read now is counted by a hook on the critic's embeddings, in real runs of
small models. Each peak is that of a process of its own.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from string import ascii_letters

import torch
from measuring import make_model, make_tokenizer, peak_memory, run_in_process


LONGEST, PROMPT = 512, 64  # tokens of a completion and of a prompt
MEMORY = {"hidden": 512, "layers": 8, "vocab": 512}
READING = {"hidden": 64, "layers": 2, "vocab": 512}
ROWS, MICRO_BATCH = 64, 4
ARMS = {
    "valued, then two updates": {"num_iterations": 2},
    "valued and updated at once": {},
}
MOMENTS = {
    "on top of the policy's gradient, as before": "with the gradient",
    "after the policy's step": "after the step",
    "on arrival of the rollout": "on arrival",
}


def skewed(count: int, longest: int, rng: random.Random) -> list[int]:
    """Lengths whose median is 0.4 of the longest."""
    return [max(1, min(round(0.4 * longest * rng.lognormvariate(0, 0.7)), longest)) for _ in range(count)]


def make_trainer(kind, config, folder: str, sizes: dict, critic_sizes: dict | None = None, **settings):
    """A run on completions of skewed lengths, of random tokens."""
    from datasets import Dataset

    tokenizer = make_tokenizer()
    rng = random.Random(0)
    prompts = ["".join(rng.choices(ascii_letters, k=length)) for length in skewed(ROWS, PROMPT, rng)]

    def rollout(prompts, trainer):
        lengths = skewed(len(prompts), trainer.max_completion_length, rng)
        return {
            "prompt_ids": tokenizer(list(prompts))["input_ids"],
            "completion_ids": [[rng.randrange(200) for _ in range(length)] for length in lengths],
            "logprobs": [[0.0] * length for length in lengths],
        }

    return kind(
        model=make_model(tokenizer, **sizes),
        critic=make_model(tokenizer, **(critic_sizes or sizes)),
        reward_funcs=lambda completion_ids, **kwargs: [sum(ids) % 7 / 7 for ids in completion_ids],
        args=config(
            folder,
            num_generations=1,
            critic_pretraining_steps=0,
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        rollout_func=rollout,
    )


# --- What is read


def count_tokens(method: str, arm: str) -> dict:
    """Tokens of one rollout: real, padded as before, and read without and with gradients."""
    from trl_credit import SPPOConfig, SPPOTrainer, VAPOConfig, VAPOTrainer

    kind, config = {"vapo": (VAPOTrainer, VAPOConfig), "sppo": (SPPOTrainer, SPPOConfig)}[method]
    read, found = {False: [], True: []}, {}

    class Counting(kind):
        def assign_credit(self, rollout, rewards, mode):
            found["prompts"] = rollout["prompt_mask"].sum().item()
            found["real"] = found["prompts"] + rollout["completion_mask"].sum().item()
            width = rollout["prompt_ids"].shape[1]
            found["padded prompts"] = ROWS * width
            found["padded"] = ROWS * (width + rollout["completion_ids"].shape[1])
            return super().assign_credit(rollout, rewards, mode)

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "max_completion_length": LONGEST,
            "per_device_train_batch_size": MICRO_BATCH if method == "vapo" else 1,
            "max_steps": 1 + (arm == "valued, then two updates"),
            **ARMS[arm],
        }
        settings["gradient_accumulation_steps"] = ROWS // settings["per_device_train_batch_size"]
        trainer = make_trainer(Counting, config, folder, READING, **settings)
        trainer.critic.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: read[torch.is_grad_enabled()].append(inputs[0].numel())
        )
        trainer.train()
    updates = settings["max_steps"]
    return {
        **found,
        "values": sum(read[False]),
        "values passes": len(read[False]),
        "update": sum(read[True]) / updates,
        "update passes": len(read[True]) / updates,
    }


def reading_table() -> str:
    lines = [
        "| | real | padded | padded / real | read for values | / real | read in an update | / real | "
        "forward passes of an update, before and now |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, arm in (("vapo", "valued, then two updates"), ("vapo", "valued and updated at once"), ("sppo", "")):
        name = f"{method.upper()}, {arm}" if arm else "SPPO, prompts"
        found = run_in_process(__file__, "--count", method, arm or "valued, then two updates")
        prompts = "prompts" if method == "sppo" else "real"
        real, padded = found[prompts], found["padded prompts" if method == "sppo" else "padded"]
        before = ROWS // (1 if method == "sppo" else MICRO_BATCH)
        values = f"{found['values']:,} | {found['values'] / real:.2f}" if found["values"] else "– | –"
        lines.append(
            f"| {name} | {real:,} | {padded:,} | {padded / real:.2f} | {values} | {found['update']:,.0f} | "
            f"{found['update'] / real:.2f} | {before}, {found['update passes']:.0f} |"
        )
    return "\n".join(lines)


def sharing_table() -> str:
    """By the plan alone: completions of up to 8192 tokens on one and on 8 processes, 10 rollouts."""
    from trl_credit.critics.batches import shares_of_batches

    lines = [
        "| processes | completions of each | tokens of a batch | padded / real | read / real | "
        "batches, before and now | busiest process / mean, rows where they are | divided anew |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for processes, rows, micro_batch in ((1, 64, 4), (8, 16, 1), (8, 16, 4), (8, 64, 4)):
        ratios = []
        for seed in range(10):
            rng = random.Random(seed)
            lengths = skewed(processes * rows, 8192, rng)
            shares = shares_of_batches(lengths, micro_batch * max(lengths), processes)
            read = [sum(len(part) * max(lengths[i] for i in part) for part in share) for share in shares]
            where_they_are = [sum(lengths[p * rows : (p + 1) * rows]) for p in range(processes)]
            mean = sum(lengths) / processes
            ratios.append(
                (
                    len(lengths) * max(lengths) / sum(lengths),
                    sum(read) / sum(lengths),
                    len(shares[0]),
                    max(where_they_are) / mean,
                    max(read) / statistics.mean(read),
                )
            )
        padded, now, batches, uneven, even = map(statistics.mean, zip(*ratios, strict=True))
        lines.append(
            f"| {processes} | {rows} | {micro_batch} · longest | {padded:.2f} | {now:.2f} | {rows // micro_batch}, "
            f"{batches:.1f} | {uneven:.2f} | {even:.2f} |"
        )
    return "\n".join(lines)


# --- What is in memory


def measure_memory(moment: str) -> dict:
    """Peak of a run in MiB, what the libraries take left out, and the parameters of each network in millions."""
    from transformers import TrainerCallback

    from trl_credit import VAPOConfig, VAPOTrainer

    class Later(VAPOTrainer):
        learns_on_arrival = False

    class WithTheGradient(Later):
        def finish_step(self, micro_batches):
            """It is done already."""

    class BeforeTheStep(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            trainer.update_critic(trainer._step_inputs)

    kinds = {"with the gradient": WithTheGradient, "after the step": Later, "on arrival": VAPOTrainer}
    libraries = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_completion_length": 16, "per_device_train_batch_size": 1, "max_steps": 3}
        trainer = make_trainer(kinds[moment], VAPOConfig, folder, MEMORY, **settings)
        if moment == "with the gradient":
            trainer.add_callback(BeforeTheStep())
        trainer.train()
    parameters = trainer.critic.num_parameters() / 1e6
    assert trainer.engine.steps == 3
    return {"peak": peak_memory() - libraries, "parameters": parameters}


def memory_table(rounds: int) -> str:
    found = {
        moment: [run_in_process(__file__, "--moment", name) for _ in range(rounds)] for moment, name in MOMENTS.items()
    }
    peaks = {moment: statistics.median(run["peak"] for run in runs) for moment, runs in found.items()}
    first = next(iter(peaks.values()))
    parameters = next(iter(found.values()))[0]["parameters"]
    lines = [
        f"Policy and critic have {parameters:.1f} M parameters each in float32: a gradient is "
        f"{parameters * 4e6 / 2**20:.0f} MiB.",
        "",
        "| the critic is updated | peak, MiB | less than before |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {moment} | {peak:.0f} | {first - peak:.0f} |" for moment, peak in peaks.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="of the measurement of memory")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--count", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--moment", choices=MOMENTS.values(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        print(json.dumps(count_tokens(*args.count)))
        return
    if args.moment:
        print(json.dumps(measure_memory(args.moment)))
        return
    page = f"""Counted and measured by `python benchmarks/real_tokens.py`. Tokens of a rollout of {ROWS} completions of
up to {LONGEST} tokens, prompts of up to {PROMPT}; the policy trains on {MICRO_BATCH} completions at a time, with SPPO
on one:

{reading_table()}

By the plan alone, completions of up to 8192 tokens, means of 10 rollouts:

{sharing_table()}

{memory_table(args.rounds)}
"""
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
