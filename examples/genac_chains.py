"""
GenAC's three stages from Python, on the quickstart's tiny model: minutes on a CPU core.

    python examples/genac_chains.py
    python examples/genac_chains.py --pretraining_rollouts 60 --steps 100    # longer stages

The oracle is a function that can do the arithmetic. It shows the critic how to check a chain; how often this very
policy gets from there to the right digit is for the critic to find out.
"""

import argparse
import random
from pathlib import Path

from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer

from trl_credit import GenACConfig, GenACTrainer
from trl_credit.toy.chain_critic import TEMPLATE, save_start, segment_lines, trace
from trl_credit.toy.scoring import Estimate, evaluate, held_out_problems
from trl_credit.toy.task import ChainTask
from trl_credit.toy.tiny_model import TinyModelSettings, fit_and_save, load
from trl_credit.trainers.genac.traces import GenACTracesConfig, TraceCollector


TASK = ChainTask((4,))


def correct(completions, problem, **kwargs):
    return [float(TASK.is_correct(p, completion)) for p, completion in zip(problem, completions, strict=True)]


def problems(seed: str, number: int) -> Dataset:
    rng = random.Random(seed)
    drawn = [TASK.draw(rng) for _ in range(number)]
    return Dataset.from_dict({"prompt": [TASK.prompt(problem) for problem in drawn], "problem": drawn})


def solved(model) -> Estimate:
    model, tokenizer = load(model)
    return Estimate.of(evaluate(model, tokenizer, TASK, held_out_problems(TASK, 1024)).sampled_right)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/genac"))
    parser.add_argument("--trace_problems", type=int, default=4000)
    parser.add_argument("--sft_steps", type=int, default=400)
    parser.add_argument("--pretraining_rollouts", type=int, default=40)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    out = args.output_dir

    policy, critic = TinyModelSettings().folder(out), out / "critic-start"
    if not policy.exists():
        fit_and_save(TinyModelSettings(), policy)
    save_start(policy, critic)
    # What the critic is asked, the same in all stages, and how all of them run.
    common = {
        "critic_template": TEMPLATE,
        "critic_max_completion_length": 40,
        "max_completion_length": TASK.max_completion_length,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
    }

    # Stage 1: traces of the oracle, and a critic that has learned their form.
    TraceCollector(
        model=str(policy),
        reward_funcs=correct,
        args=GenACTracesConfig(str(out / "traces"), per_device_train_batch_size=500, **common),
        train_dataset=problems("held out for the traces", args.trace_problems),
        critic=str(critic),
        segmenter=segment_lines,
        oracle=trace,
    ).train()
    sft = SFTTrainer(
        model=str(critic),
        args=SFTConfig(
            str(out / "sft"),
            completion_only_loss=True,
            max_length=None,
            max_steps=args.sft_steps,
            per_device_train_batch_size=64,
            learning_rate=2e-3,
            warmup_steps=30,
            lr_scheduler_type="cosine",
            logging_steps=50,
            report_to="none",
            bf16=False,
            use_cpu=True,
        ),
        train_dataset=load_dataset("json", data_files=str(out / "traces/dataset/train.jsonl"), split="train"),
    )
    sft.train()
    sft.save_model()

    # Stage 2: the critic finds out how good this policy is.
    pretraining = GenACTrainer(
        model=str(policy),
        reward_funcs=correct,
        args=GenACConfig(
            str(out / "pretraining"),
            num_generations=1,
            per_device_train_batch_size=128,
            critic_pretraining_steps=args.pretraining_rollouts,
            critic_learning_rate=2e-4,
            critic_baseline="leave_one_out",
            **common,
        ),
        train_dataset=problems("pretraining", 128 * args.pretraining_rollouts),
        critic=str(out / "sft"),
        segmenter=segment_lines,
    )
    pretraining.pretrain_critic()

    # Stage 3: both learn.
    joint = GenACTrainer(
        model=str(policy),
        reward_funcs=correct,
        args=GenACConfig(
            str(out / "joint"),
            num_generations=8,
            per_device_train_batch_size=128,
            max_steps=args.steps,
            learning_rate=3e-4,
            critic_learning_rate=2e-4,
            critic_baseline="leave_one_out",
            **common,
        ),
        train_dataset=problems("joint", 16 * args.steps),
        critic=str(out / "pretraining/critic"),
        segmenter=segment_lines,
    )
    joint.train()
    joint.save_model()

    errors = [log["critic_pretraining/mse"] for log in pretraining.state.log_history if "critic_pretraining/mse" in log]
    first, last = (sum(part) / len(part) for part in (errors[:5], errors[-5:]))
    print(f"Critic's error on single outcomes, first and last rollouts of the pretraining: {first:.3f}, {last:.3f}")
    print(f"Held-out problems solved, before: {solved(policy)}, after: {solved(out / 'joint')}")
