"""
Where does each method put the credit? Correlation of token credit with the true advantage, on the quickstart's task.

    python benchmarks/genac_critic.py           # leaves GenAC's critic in outputs/quickstart/genac/hint-0
    python benchmarks/credit_comparison.py      # writes docs/results/credit_comparison.md and critic_report.md

The policy is the quickstart's fitted model and does not move. Critics are fitted to its rollouts by the trainers' own
`pretrain_critic`; GenAC's has been through its stages before. Then held-out problems get groups of completions, every
token's state gets continuations, and what each method would tell a token is held against V*(after it) − V*(before it).
"""

import argparse
import json
import random
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers

from trl_credit import SPPOConfig, SPPOTrainer, VAPOConfig, VAPOTrainer, adjoint_trace
from trl_credit.credit.segment_gae import segment_advantages, segment_of_token
from trl_credit.critic_report import (
    ConstantCritic,
    GenerativeCritic,
    LeaveOneOutMean,
    ProbeSettings,
    PromptCritic,
    TokenCritic,
    draw_probes,
    evaluate_critic,
    load_policy,
)
from trl_credit.critic_report import statistics as st
from trl_credit.critic_report.layout import SECTIONS
from trl_credit.critic_report.report import Steps, gae_credit
from trl_credit.critic_report.report_page import show, write_json, write_page
from trl_credit.toy.chain_critic import TEMPLATE, segment_lines
from trl_credit.toy.quickstart import TINY
from trl_credit.toy.scoring import held_out_problems
from trl_credit.toy.task import ChainTask
from trl_credit.toy.tiny_model import TinyModelSettings, fit_and_save


TASK = ChainTask((4,))  # what GenAC's critic has been taught
LAMBDA = 0.99  # of GRPO-λ, the paper's
# Of a critic's training: updates on each rollout, and completions of an update.
UPDATES, BATCH = 8, 32


def correct(prompts, completions, **kwargs):
    return [float(TASK.is_correct(p.removesuffix("="), c)) for p, c in zip(prompts, completions, strict=True)]


def start_model(folder: Path) -> str:
    settings = TinyModelSettings(terms=TINY.terms)
    path = settings.folder(folder)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fit_and_save(settings, path)
    return str(path)


def fit_critic(trainer_class, config_class, policy: str, folder: Path, rollouts: int, **settings) -> str:
    """The trainer's own pretraining, one completion a prompt; returns the critic's folder, made once."""
    critic = folder / "critic"
    if not (critic / "config.json").exists():
        rng = random.Random("critic")
        prompts = [TASK.prompt(TASK.draw(rng)) for _ in range(rollouts * UPDATES * BATCH)]
        config = config_class(
            str(folder),
            num_generations=1,
            per_device_train_batch_size=BATCH,
            steps_per_generation=UPDATES,
            max_completion_length=TASK.max_completion_length,
            critic_pretraining_steps=rollouts * UPDATES,
            critic_lr_scheduler_type="linear",
            max_steps=1,
            seed=0,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10 * UPDATES,
            disable_tqdm=True,
            **settings,
        )
        trainer = trainer_class(policy, correct, config, datasets.Dataset.from_dict({"prompt": prompts}))
        trainer.pretrain_critic()
    return str(critic)


def broadcast(rollouts, numbers) -> list[np.ndarray]:
    return [np.full(len(r.completion_ids), number) for r, number in zip(rollouts, numbers, strict=True)]


def grpo_advantages(rollouts) -> np.ndarray:
    """As TRL scales them: by mean and standard deviation of the group."""
    groups = np.array([rollout.group for rollout in rollouts])
    rewards = np.array([rollout.reward for rollout in rollouts])
    advantages = np.zeros(len(rollouts))
    for group in np.unique(groups):
        rows = groups == group
        advantages[rows] = (rewards[rows] - rewards[rows].mean()) / (rewards[rows].std(ddof=1) + 1e-4)
    return advantages


def grpo_lambda_credit(rollouts, style: str, clamp: float | None) -> list[np.ndarray]:
    """The advantage times the effective weights of the traces: GRPO-λ's gradient where the ratio is 1."""
    advantages = grpo_advantages(rollouts).clip(min=clamp)
    weights = [adjoint_trace(torch.ones(1, n), torch.ones(1, n), LAMBDA, style)[0] for n in lengths(rollouts)]
    return [a * w.double().numpy() for a, w in zip(advantages, weights, strict=True)]


def lengths(rollouts) -> list[int]:
    return [len(rollout.completion_ids) for rollout in rollouts]


def all_credits(rollouts, token: TokenCritic, prompt: PromptCritic, others: int, read: int) -> list[tuple]:
    """Method, its credit, completions of a prompt that it needs beside the credited one, tokens read by a critic."""
    values, of_prompts = token.values(rollouts), prompt.values(rollouts)
    rewards = np.array([rollout.reward for rollout in rollouts])
    loo = LeaveOneOutMean().values(rollouts)
    found = [
        ("RLOO: R − mean of the others", broadcast(rollouts, rewards - [v[0] for v in loo]), others, 0),
        ("GRPO", broadcast(rollouts, grpo_advantages(rollouts)), others, 0),
    ]
    for style in ("recent", "both"):
        found.append((f"GRPO-λ, {style}", grpo_lambda_credit(rollouts, style, -0.1), others, 0))
        found.append((f"GRPO-λ, {style}, no clamp", grpo_lambda_credit(rollouts, style, None), others, 0))
    found.append(("SPPO: R − V(prompt)", broadcast(rollouts, rewards - [v[0] for v in of_prompts]), 0, read))
    for lam in (1.0, 0.99, 0.95, 0.9, 0.5, 0.0):
        found.append((f"VAPO's critic, λ = {lam:g}", gae_credit(rollouts, values, lam), 0, read))
    for alpha in (0.05, 0.5, 1.5):
        found.append((f"VAPO, α = {alpha:g}", gae_credit(rollouts, values, None, alpha), 0, read))
    return found


def genac_credits(rollouts, critic: GenerativeCritic) -> list[tuple]:
    """The same for GenAC, whose segments are the lines of a chain."""
    ends = [segment_lines(rollout.completion_ids, critic.question.policy_tokenizer) for rollout in rollouts]
    asked = [replace(rollout, cuts=[0, *row[:-1]]) for rollout, row in zip(rollouts, ends, strict=True)]
    values = torch.zeros(len(rollouts), max(map(len, ends)), dtype=torch.float64)
    for row, rollout, of_states in zip(values, asked, critic.values(asked), strict=True):
        row[: len(rollout.cuts)] = torch.from_numpy(of_states[rollout.cuts])
    values = values.nan_to_num(values.nanmean().item())  # as in training, where an answer could not be read
    mask = torch.arange(max(lengths(rollouts))) < torch.tensor(lengths(rollouts)).unsqueeze(1)
    segments = segment_of_token(ends, mask)
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    found = []
    for lam in (1.0, 0.95, 0.5, 0.0):
        advantages = segment_advantages(rewards, values, segments, lam).numpy()
        credit = [row[:n] for row, n in zip(advantages, lengths(rollouts), strict=True)]
        found.append((f"GenAC, λ = {lam:g}", credit, 0, round(critic.tokens / len(rollouts))))
    return found


def comparison(rollouts, credits) -> tuple[str, list[dict]]:
    steps = Steps.of(rollouts, [np.zeros(n + 1) for n in lengths(rollouts)])
    within = partial(st.correlation, groups=steps.rollout)
    mean_length = np.mean(lengths(rollouts))
    lines = [
        "| method | correlation, all tokens | within completions | tokens sampled | tokens read by the critic |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = []
    for name, credit, others, read in credits:
        overall = steps.correlation(credit)
        inner = steps.correlation(credit, statistic=within)
        sampled = mean_length * (1 + others)
        rows.append(
            {"method": name, "all": overall._asdict(), "within": inner._asdict(), "sampled": sampled, "read": read}
        )
        lines.append(f"| {name} | {show(overall, 2)} | {show(inner, 2)} | {sampled:.0f} | {read} |")
    return "\n".join(lines) + "\n", rows


def report_table(reports) -> str:
    names = [report.critic for report in reports]
    lines = [f"| | {' | '.join(names)} | ideal |", "| --- |" + " --- |" * (len(names) + 1)]
    for section in SECTIONS:
        for row in section.rows:
            cells = " | ".join(show(report.rows.get(row.name), 2) for report in reports)
            lines.append(f"| {row.label} | {cells} | {row.ideal} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="held-out problems")
    parser.add_argument("--completions", type=int, default=8, help="of each, GRPO's group")
    parser.add_argument("--continuations", type=int, default=16, help="of each state")
    parser.add_argument("--rollouts", type=int, default=80, help="that each critic is fitted to, before it is measured")
    parser.add_argument(
        "--generative", default="outputs/quickstart/genac/hint-0/pretrain/critic", help="GenAC's critic, after stage 2"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/credit_comparison"), help="models and samples")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)

    start = start_model(Path("outputs/quickstart"))
    fit = {"policy": start, "rollouts": args.rollouts, "critic_learning_rate": 1e-3}
    token = TokenCritic.from_pretrained(fit_critic(VAPOTrainer, VAPOConfig, folder=args.work / "vapo", **fit))
    prompt = PromptCritic.from_pretrained(fit_critic(SPPOTrainer, SPPOConfig, folder=args.work / "sppo", **fit))
    token.name, prompt.name = "VAPO's critic", "SPPO's critic"
    settings = ProbeSettings(
        completions=args.completions,
        continuations=args.continuations,
        cuts="1",
        max_completion_length=TASK.max_completion_length,
    )
    rows = [{"prompt": TASK.prompt(problem)} for problem in held_out_problems(TASK, args.prompts, seed=2)]
    policy = load_policy(start, batch_size=1024)
    probes = draw_probes(args.work / "probes", policy, rows, correct, settings)
    rollouts = probes.rollouts

    generative = GenerativeCritic.from_pretrained(
        args.generative,
        policy.tokenizer,
        template=TEMPLATE,
        max_completion_length=48,
        segmenter=segment_lines,
    )

    read = round(np.mean(lengths(rollouts)) + np.mean([len(rollout.prompt_ids) for rollout in rollouts]))
    credits = all_credits(rollouts, token, prompt, args.completions - 1, read) + genac_credits(rollouts, generative)
    table, results = comparison(rollouts, credits)
    reports = [evaluate_critic(critic, probes) for critic in (token, prompt, ConstantCritic(), LeaveOneOutMean())]
    command = shlex.join(["python", "benchmarks/credit_comparison.py", *sys.argv[1:]])
    reward = np.mean([rollout.reward for rollout in rollouts])
    states = sum(len(rollout.cuts) for rollout in rollouts)
    tokens = probes.sampled_tokens / 1e6
    made = f"""Measured by `{command}` with torch {torch.__version__}, one CPU thread.
{args.prompts} held-out problems, {args.completions} completions of each, {100 * reward:.0f} % of them right; a state
before every token, {states:,} in all, {args.continuations} continuations of each ({tokens:.1f} M tokens). Before, each
critic had {args.rollouts * UPDATES} updates on {BATCH} fresh completions each, GenAC's its stages. Brackets: 95 %,
problems resampled.
"""
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "credit_comparison.md").write_text(f"{made}\n{table}", encoding="utf-8")
    (args.output / "credit_comparison.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (args.output / "critic_report.md").write_text(f"{made}\n{report_table(reports)}", encoding="utf-8")
    write_json(args.work / "report.json", reports)
    write_page(args.work / "report.html", reports)
    print(table)


if __name__ == "__main__":
    main()
