"""
Time and peak memory of an optimizer step of a trainer with random weights, and the planner's figure for it.

Completions are given, all of one length but one: nothing is generated but the answers of GenAC's critic. So a step is
the updates of policy and critic, and the critic's values.
"""

import itertools
import statistics
import tempfile
import time
from unittest.mock import patch

import torch
from datasets import Dataset
from measuring import make_tokenizer
from shapes import SHAPES, TOY, arguments, device_of, qwen, random_model, report
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_credit.methods import METHODS
from trl_credit.planner import GIB, Setup, critics, make_plan, shape_of
from trl_credit.planner.memory import ANSWERS, GENERATION, PROCESS


PROMPT, ANSWER, STEPS, ACCUMULATION = 32, 64, 3, 2


def settings_of(trainer: str) -> dict:
    """Options of the trainer that matter here."""
    if trainer in ("grpo", "grpo-lambda"):
        return {}
    if trainer == "genac":
        return {
            "critic_pretraining_steps": 0,
            "critic_max_completion_length": ANSWER,
            "critic_template": "{problem}{partial_solution}=",
            "hint_momentum": None,
        }
    return {"critic_pretraining_steps": 0}


def planned(trainer: str, config, length: int, toy: bool) -> float:
    """GiB by the planner, without the guess for what is not tensors."""
    setup = Setup(
        trainer,
        shape_of(config),
        prompt=PROMPT,
        completion=length,
        accumulation=ACCUMULATION,
        generations=1 if trainer == "sppo" else 2,
        compute="float32" if toy else "bfloat16",
        answer=ANSWER,
        on_cpu=toy,
    )
    with patch.multiple(critics, QUESTION=0, TAIL=1):  # of the short template
        plan = make_plan(setup)
    updates = [phase for phase in plan.phases if phase not in (GENERATION, ANSWERS)]
    return (max(map(plan.total, updates)) - (0 if toy else PROCESS)) / GIB


def main():
    args = arguments(__doc__, "shape", "length", "trainer")
    device, length = device_of(args.toy), 160 if args.toy else int(args.length)
    tokenizer = make_tokenizer()
    config = qwen(TOY if args.toy else SHAPES[args.shape], tokenizer)
    base, config_class = GRPOTrainer, GRPOConfig
    if args.trainer != "grpo":
        config_class, base = METHODS[args.trainer].load()
    times, critic_times = [], []

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Timed(base):
        def update_critic(self, *args):
            started = now()
            result = super().update_critic(*args)
            critic_times.append(now() - started)
            return result

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            times.append(now())

        def on_train_end(self, args, state, control, **kwargs):
            times.append(now())

    def rollout(prompts, trainer):
        lengths = [length - (i == 0) for i in range(len(prompts))]  # so that attention has a mask
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [torch.randint(33, 126, (n,)).tolist() for n in lengths],
            "logprobs": [[0.0] * n for n in lengths],
        }

    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=random_model(config, device),
            reward_funcs=lambda completion_ids, **_: [sum(ids) % 7 / 7 for ids in completion_ids],
            args=config_class(
                folder,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=ACCUMULATION,
                num_generations=1 if args.trainer == "sppo" else 2,
                max_completion_length=length,
                max_steps=STEPS,
                use_cpu=args.toy,
                bf16=not args.toy,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                **settings_of(args.trainer),
            ),
            train_dataset=Dataset.from_dict({"prompt": [f"{i:0{PROMPT}}" for i in range(64)]}),
            processing_class=tokenizer,
            rollout_func=rollout,
            callbacks=[Clock()],
        )
        trainer.train()
    steps = [end - begin for begin, end in itertools.pairwise(times)]
    report(
        {
            "shape": args.shape,
            "tokens": length,
            "trainer": args.trainer,
            "step_s": statistics.median(steps[1:]),
            "critic_update_s": statistics.median(critic_times[1:]) if critic_times else 0.0,
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None,
            "planned_gib": planned(args.trainer, config, length, args.toy),
        }
    )


if __name__ == "__main__":
    main()
