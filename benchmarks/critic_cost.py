"""
What a critic costs: step time and peak memory of VAPO next to GRPO, on the same model, data, seed and samples.

    python benchmarks/critic_cost.py --output docs/results/critic_cost.md

Each arm runs in a process of its own, the arms in turn, several times over. Completions always have the full length,
so that all do the same work. Per token of prompt and completion a policy of P parameters takes 2P operations to
generate it, 2P for its old log-probability and 6P to train: 10P. A critic of the same size adds 2P for values and 6P to
train: the floor of a step with a full critic is 18/10 of one without, if generation cost what its operations do.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import make_model, make_tokenizer, peak_memory, run_in_process


ARMS = ("GRPO", "full critic", "LoRA critic", "GRPO, LoRA policy", "LoRA policy, shared-base critic")
LORA = {"r": 16, "target_modules": "all-linear"}


def run_one(arm: str, args) -> None:
    """Train in this process and print the step times in seconds and the peak memory in MiB."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from trl_credit import VAPOConfig, VAPOTrainer

    tokenizer = make_tokenizer()
    cuda = torch.cuda.is_available()
    # On the CPU: what the run adds to the libraries.
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
            "max_steps": args.steps + 2,
            "num_iterations": 2,  # so that old log-probabilities are computed
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
        data = Dataset.from_dict({"prompt": ["What is the answer, and why?"] * 64})

        def reward(completion_ids, **kwargs):
            return [sum(ids) % 7 / 7 for ids in completion_ids]

        policy_peft = LoraConfig(**LORA) if "LoRA policy" in arm else None
        if arm.startswith("GRPO"):
            trainer_class, training_args = GRPOTrainer, GRPOConfig(**settings)
        else:
            peft = LORA if arm == "LoRA critic" else None
            trainer_class = VAPOTrainer
            training_args = VAPOConfig(
                **settings, critic_pretraining_steps=0, critic_peft_config=peft, critic_share_base="shared" in arm
            )
        trainer = trainer_class(f"{folder}/model", reward, training_args, train_dataset=data, peft_config=policy_peft)
        times = []
        step = trainer.training_step

        def timed(*a, **k):
            started = time.perf_counter()
            result = step(*a, **k)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
            return result

        trainer.training_step = timed
        trainer.train()
    # A rollout serves two steps: the time of a pair, the first of which warms up.
    pairs = [sum(times[i : i + 2]) for i in range(2, len(times), 2)]
    print(json.dumps({"times": pairs, "peak": peak_memory() - libraries, "parameters": parameters}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="Optimizer steps measured in a run, an even number.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        return run_one(args.arm, args)
    results = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            results[arm].append(run_in_process(__file__, *sys.argv[1:], "--arm", arm))
    base = statistics.median(t for result in results["GRPO"] for t in result["times"])
    base_peak = statistics.median(result["peak"] for result in results["GRPO"])
    parameters = results["GRPO"][0]["parameters"] / 1e6
    lines = [
        f"{parameters:.1f} M parameters, {args.batch} completions of {args.length} tokens, two updates on each "
        f"rollout, {args.rounds} rounds, {'one GPU, bf16' if torch.cuda.is_available() else 'CPU, float32'}.",
        "",
        "| | seconds a rollout with its updates | × GRPO | peak memory, MiB | × GRPO |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, runs in results.items():
        seconds = statistics.median(t for result in runs for t in result["times"])
        peak = statistics.median(result["peak"] for result in runs)
        lines.append(f"| {arm} | {seconds:.3f} | {seconds / base:.2f} | {peak:.0f} | {peak / base_peak:.2f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(table)


if __name__ == "__main__":
    main()
