"""
How much a critic of prompts, SPPO's, knows by the learning rate below its head.

    python benchmarks/prompt_critic_rates.py     # docs/results/prompt_critic_rates.md; goes on from its .json

The quickstart's arithmetic with four to six digits. The tiny policy, which does not move, solves each problem once; the
critic starts from the policy's checkpoint, as by default, and is fitted by cross-entropy with the trainer's engine, one
update on each rollout. Its head has the default rate.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from critic_rates import GENERATIONS, as_tensors, solve_problems, split
from measuring import interval
from transformers import AutoModelForCausalLM

from trl_credit.credit.bounded_values import output_for
from trl_credit.credit.fit import explained_variance, fit_sums
from trl_credit.credit.value_loss import binary_cross_entropy
from trl_credit.critics.engine import CriticEngine, CriticOptimization
from trl_credit.critics.fresh_head import trained_head
from trl_credit.critics.prompt import read_prompts
from trl_credit.critics.prompt_tokens import PAD
from trl_credit.critics.token import make_token_critic
from trl_credit.toy.tiny_model import TinyModelSettings, fitted, load
from trl_credit.trainers.critic.critic_trainer import HIGHEST_RATE


RATES = {5e-6: "the paper's", 1e-4: "", HIGHEST_RATE: "the default"}
ROLLOUT, HELD_OUT = 128, 256  # problems, those held out with GENERATIONS completions each


def prompts_of(batch: dict) -> torch.Tensor:
    return batch["prompt_ids"].masked_fill(batch["prompt_mask"] == 0, PAD)


def loss_of(network, batch: dict) -> torch.Tensor:
    return binary_cross_entropy(read_prompts(network, prompts_of(batch)), batch["rewards"]).sum()


def explained(policy: Path, batches: list[dict], held_out: list[dict], rate: float) -> float:
    """Explained variance of held-out rewards, after an update on each batch."""
    start = output_for(batches[0]["rewards"].mean().item(), (0.0, 1.0))
    network = make_token_critic(AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32), start)
    settings = CriticOptimization(rate, frozenset(trained_head(network)), HIGHEST_RATE)
    engine = CriticEngine(network, Accelerator(cpu=True), settings)
    engine.begin(len(batches))
    for batch in batches:
        engine.update([batch], loss_of, lambda inputs: torch.tensor(len(inputs["rewards"])))
    sums = []
    for batch in held_out:
        values = engine.evaluate(partial(read_prompts, prompts=prompts_of(batch))).sigmoid().unsqueeze(1)
        sums.append(fit_sums(values, batch["rewards"].unsqueeze(1), torch.ones_like(values)))
    return explained_variance(torch.cat(sums))


def ceiling(held_out: list[dict]) -> float:
    """What the success rates of the problems explain; each is that of the others, which does not know the reward."""
    rewards = torch.cat([batch["rewards"] for batch in held_out]).view(-1, GENERATIONS)
    others = (rewards.sum(1, keepdim=True) - rewards) / (GENERATIONS - 1)
    return (torch.cov(torch.stack([others.flatten(), rewards.flatten()]))[0, 1] / rewards.var()).item()


def page(stored: dict, updates: int) -> str:
    seeds = len(stored)
    lines = [
        f"Explained variance of the rewards of {HELD_OUT} held-out problems after {updates} updates on {ROLLOUT} "
        f"problems each, by `python benchmarks/prompt_critic_rates.py` on one CPU core, torch {torch.__version__}; "
        f"mean and 95 % interval over {seeds} seeds.",
        "",
        f"| below the head, whose rate is {HIGHEST_RATE:g} | explained variance |",
        "| --- | --- |",
    ]
    for rate, whose in RATES.items():
        mean, half = interval([of_seed[str(rate)] for of_seed in stored.values()])
        lines.append(f"| {rate:g}{whose and f', {whose}'} | {mean:.3f} ± {half:.3f} |")
    mean, half = interval([of_seed["ceiling"] for of_seed in stored.values()])
    return "\n".join([*lines, f"| the true success rates | {mean:.3f} ± {half:.3f} |"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", type=Path, default=Path("outputs/quickstart"), help="where the tiny policy is kept")
    parser.add_argument("--output", type=Path, default=Path("docs/results/prompt_critic_rates"), help=".json and .md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = fitted(TinyModelSettings(), args.models)
    tokenizer = load(policy)[1]
    file = args.output.with_suffix(".json")
    stored = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(args.seeds):
        if str(seed) in stored:
            continue
        rows = solve_problems(policy, args.updates * ROLLOUT, seed, False, generations=1)
        held_out = split(as_tensors(solve_problems(policy, HELD_OUT, seed, True), tokenizer), ROLLOUT)
        batches = [as_tensors(rows[first : first + ROLLOUT], tokenizer) for first in range(0, len(rows), ROLLOUT)]
        found = {str(rate): explained(policy, batches, held_out, rate) for rate in RATES}
        stored[str(seed)] = {**found, "ceiling": ceiling(held_out)}
        print(seed, json.dumps(stored[str(seed)]), flush=True)
        file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(page(stored, args.updates), encoding="utf-8")


if __name__ == "__main__":
    main()
