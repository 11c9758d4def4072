"""
What a step computes besides what it needs: operations around a loss, FLOPs of a critic's pretraining.

    python benchmarks/waste.py --output docs/results/waste.md

Counted, not timed, so that one run is enough and any machine will do. Operations are those that torch dispatches in the
forward and backward pass of a micro-batch, views left out: on a GPU nearly each is a kernel. FLOPs are those of matrix
products and attention in `pretrain_critic`, generation included.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from measuring import make_model, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from trl import GRPOConfig, GRPOTrainer

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer, VAPOConfig, VAPOTrainer


SHAPES = ((8, 256), (1, 2048), (1, 8192))  # completions of a micro-batch, tokens of each
ARMS = {
    "GRPO": (GRPOTrainer, GRPOConfig),
    "GRPO-λ": (GRPOLambdaTrainer, GRPOLambdaConfig),
    "GRPO-λ, no EOS diagnostic": (GRPOLambdaTrainer, GRPOLambdaConfig),
}
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views left out."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in func._schema.returns]
        self.number += not any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


def make_trainer(trainer_class, config_class, reward, folder, **settings):
    """A trainer of a small random model."""
    tokenizer, path = make_tokenizer(), f"{folder}/model"  # by path, as a reference policy is loaded from it
    make_model(tokenizer, 64, 2, vocab=512).save_pretrained(path)
    rollout = settings.pop("rollout", None)
    return trainer_class(
        model=path,
        reward_funcs=reward,
        args=config_class(folder, **COMMON, **settings),
        train_dataset=Dataset.from_dict({"prompt": ["Once upon a time"] * 64}),
        processing_class=tokenizer,
        rollout_func=rollout,
    )


def share_of_even(completion_ids, **kwargs):
    """A reward that differs between completions."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def operations(arm: str, completions: int, tokens: int) -> int:
    """Of the forward and backward pass of one micro-batch."""
    base, config_class = ARMS[arm]
    generator = torch.Generator().manual_seed(0)

    class Counted(base):
        operations = 0

        def _compute_loss(self, model, inputs):
            with Operations() as counted:
                loss = super()._compute_loss(model, inputs)
                torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            self.operations = counted.number
            return loss

    if arm.endswith("diagnostic"):
        Counted.eos_prob = lambda self, terms: None

    def rollout(prompts, trainer):
        ids = torch.randint(0, 250, (len(prompts), tokens), generator=generator).tolist()
        return {
            "prompt_ids": [[1, 2, 3]] * len(prompts),
            "completion_ids": ids,
            "logprobs": [[0.0] * tokens] * len(prompts),
        }

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            Counted,
            config_class,
            share_of_even,
            folder,
            rollout=rollout,
            per_device_train_batch_size=completions,
            gradient_accumulation_steps=2,
            num_generations=2,
            max_completion_length=tokens,
            max_steps=1,
        )
        trainer.train()
    return trainer.operations


class AsBefore(VAPOTrainer):
    """Computes log-probabilities of old and reference policy with every rollout, as TRL does."""

    def _generate_and_score(self, *args, policy_learns, **kwargs):
        return super()._generate_and_score(*args, policy_learns=True, **kwargs)


def flops(trainer_class, tokens: int, **settings) -> int:
    """Of a pretraining of two rollouts."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            trainer_class,
            VAPOConfig,
            share_of_even,
            folder,
            per_device_train_batch_size=8,
            num_generations=2,
            max_completion_length=tokens,
            generation_kwargs={"min_new_tokens": tokens},
            critic_pretraining_steps=2,
            max_steps=1,
            **settings,
        )
        with FlopCounterMode(display=False) as counted:
            trainer.pretrain_critic()
    return counted.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "Counted by `python benchmarks/waste.py`. Operations of a micro-batch, views left out, with 2 layers:",
        "",
        f"| completions × tokens | {' | '.join(ARMS)} | of which the diagnostic |",
        "| --- " * (len(ARMS) + 2) + "|",
    ]
    for shape in SHAPES:
        found = [operations(arm, *shape) for arm in ARMS]
        lines.append(f"| {shape[0]} × {shape[1]} | {' | '.join(map(str, found))} | {found[1] - found[2]} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "GFLOPs of a critic's pretraining (VAPO, two rollouts of 8 completions of 64 tokens, generation included):",
        "",
        "| | with old and reference policy | without | share |",
        "| --- | --- | --- | --- |",
    ]
    for name, settings in {
        "`num_iterations=2`": {"num_iterations": 2},
        "`num_iterations=2, beta=0.04`": {"num_iterations": 2, "beta": 0.04},
    }.items():
        before, after = (flops(trainer, 64, **settings) for trainer in (AsBefore, VAPOTrainer))
        lines.append(f"| {name} | {before / 1e9:.2f} | {after / 1e9:.2f} | {1 - after / before:.0%} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
