"""
How far from the truth are the values of GenAC's critic? The quickstart's task and its frozen tiny model, several seeds.

    python benchmarks/genac_critic.py     # docs/results/genac_critic.md; goes on from genac_critic.json if that exists

The truth is the mean reward of independent continuations of states of held-out problems. On the way to it are the three
things that stage 1 and 2 of GenAC do: traces of an oracle, supervised fine-tuning, and REINFORCE on rollouts of the
frozen policy, with and without the hint in the critic's prompt. Next to them VAPO's token critic, on the same rollouts.
"""

import argparse
import json
import random
import shlex
import shutil
import sys
import textwrap
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from measuring import interval as over_seeds
from trl import SFTConfig, SFTTrainer

from trl_credit import GenACConfig, GenACTrainer, VAPOConfig, VAPOTrainer
from trl_credit.critic_report import Decoding, ProbeSettings, TransformersPolicy, draw_probes
from trl_credit.critics.generative.question import critic_query, parse_score
from trl_credit.critics.token import make_token_critic, read_values
from trl_credit.sampling import chunks_within, sample_continuations
from trl_credit.segmenting import segment_texts
from trl_credit.toy.chain_critic import TEMPLATE, TEMPLATE_WITHOUT_HINT, save_start, segment_lines, trace
from trl_credit.toy.quickstart import TINY
from trl_credit.toy.scoring import held_out_problems
from trl_credit.toy.task import ChainTask
from trl_credit.toy.tiny_model import TinyModelSettings, fitted, load
from trl_credit.trainers.genac.traces import GenACTracesConfig, TraceCollector
from trl_credit.trainers.genac.traces.oracle import State


TASK = ChainTask((4,))
ANSWER = 40  # tokens of the critic
COMMON = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False, "use_cpu": True}
COMMON |= {"lr_scheduler_type": "constant", "logging_steps": 10, "gradient_checkpointing": False}
# The baseline of the critic's REINFORCE and its learning rate, in a stage 2 with the hint from the same stage 1. With
# `args.critic_learning_rate`, "leave_one_out" is part of "hint".
RATES = (3e-5, 1e-4, 3e-4)
BASELINES = tuple(f"{baseline}, {rate:g}" for rate in RATES for baseline in ("none", "leave_one_out"))
TOKEN_CRITICS = ("token critic, from the policy, 0.001", "token critic, from the policy, 0.003")
TOKEN_CRITICS += ("token critic, from stage 1, 0.001",)


def correct(completions, problem, **kwargs):
    return [float(TASK.is_correct(p, text)) for p, text in zip(problem, completions, strict=True)]


def problems(name: str, number: int) -> datasets.Dataset:
    rng = random.Random(name)
    drawn = [TASK.draw(rng) for _ in range(number)]
    return datasets.Dataset.from_dict({"prompt": [TASK.prompt(problem) for problem in drawn], "problem": drawn})


class Rollouts:
    """The policy's completions, the same ones for the same seed, whichever trainer asks."""

    def __init__(self, start: Path, seed: int):
        self.model, self.tokenizer = load(start)
        self.policy, self.seed, self.calls = TransformersPolicy(self.model, self.tokenizer, batch_size=512), seed, 0

    def __call__(self, prompts, trainer):
        self.calls += 1
        starts = self.tokenizer(list(prompts))["input_ids"]
        room = [TASK.max_completion_length] * len(starts)
        ids = self.policy.sample(starts, room, Decoding(), 1000 * self.seed + self.calls)
        return {"prompt_ids": starts, "completion_ids": ids, "logprobs": [[0.0] * len(row) for row in ids]}


# --- Errors


def generative_values(network, tokenizer, template: str, rate: float, probes, seed: int) -> tuple[np.ndarray, float]:
    """Value of each probed state, one sampled answer each as in training, and the parse rate."""
    prompts = []
    for rollout in probes.rollouts:
        ends = segment_lines(rollout.completion_ids, probes.tokenizer)
        assert [0, *ends[:-1]] == rollout.cuts
        texts = segment_texts(rollout.completion_ids, ends, probes.tokenizer)
        prompts += critic_query(tokenizer, template, rollout.prompt, texts, "", rate).prompts()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        answers = sample_continuations(
            network.eval(),
            prompts,
            [ANSWER] * len(prompts),
            [tokenizer.eos_token_id],
            tokenizer.pad_token_id,
            chunks=chunks_within(list(map(len, prompts)), 16384),
        )
    scores = [parse_score(text) for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    values = np.array([np.nan if score is None else score for score in scores])
    parsed = ~np.isnan(values)
    return np.where(parsed, values, values[parsed].mean() if parsed.any() else rate), parsed.mean()


@torch.no_grad()
def token_values(network, probes) -> np.ndarray:
    """Value of each probed state by a token critic."""
    network.eval()
    values = []
    for rollout in probes.rollouts:
        batch = {"prompt_ids": rollout.prompt_ids, "completion_ids": rollout.completion_ids}
        batch = {name: torch.tensor([ids]) for name, ids in batch.items()}
        batch |= {name.replace("ids", "mask"): torch.ones_like(ids) for name, ids in batch.items()}
        values += [read_values(network, batch)[0, cut].item() for cut in rollout.cuts]
    return np.array(values)


# --- The stages


def asking(args, seed: int, hint: bool) -> dict:
    """What the configs of both stages share."""
    return {
        "critic_template": TEMPLATE if hint else TEMPLATE_WITHOUT_HINT,
        "hint_momentum": 0.9 if hint else None,
        "critic_max_completion_length": ANSWER,
        "max_completion_length": TASK.max_completion_length,
        "num_generations": 1,
        "seed": seed,
        **COMMON,
    }


def stage_1(args, folder: Path, start: Path, probes, seed: int, hint: bool) -> dict[str, list]:
    """Traces of the oracle and supervised fine-tuning, to `folder / "sft"`; the values of the probed states."""
    shared = asking(args, seed, hint)
    shutil.rmtree(folder, ignore_errors=True)
    save_start(start, folder / "start")
    collector = TraceCollector(
        model=str(start),
        reward_funcs=correct,
        args=GenACTracesConfig(str(folder / "traces"), per_device_train_batch_size=500, **shared),
        train_dataset=problems(f"traces {seed}", args.trace_problems),
        critic=str(folder / "start"),
        segmenter=segment_lines,
        oracle=trace,
    )
    collector.train()
    rate = collector.states()[0].success_rate
    sft = SFTTrainer(
        model=str(folder / "start"),
        args=SFTConfig(
            str(folder / "sft"),
            completion_only_loss=True,
            max_length=None,
            max_steps=args.sft_steps,
            per_device_train_batch_size=64,
            learning_rate=2e-3,
            seed=seed,
            **{**COMMON, "lr_scheduler_type": "cosine"},
            warmup_steps=30,
        ),
        train_dataset=datasets.load_dataset("json", data_files=str(folder / "traces/dataset/train.jsonl"))["train"],
    )
    sft.train()
    sft.save_model()
    values, parsed = generative_values(sft.model, sft.processing_class, shared["critic_template"], rate, probes, seed)
    return {"stage 1": values, "stage 1 parse rate": parsed}


def stage_2(
    args, folder: Path, to: str, start: Path, probes, seed: int, hint: bool, baseline: str, critic_rate: float
) -> dict[str, list]:
    """REINFORCE on rollouts of the frozen policy, from where stage 1 ended, to `folder / to`; values as above."""
    shared = asking(args, seed, hint)
    trainer = GenACTrainer(
        model=str(start),
        reward_funcs=correct,
        args=GenACConfig(
            str(folder / to),
            per_device_train_batch_size=args.completions,
            critic_pretraining_steps=args.rollouts,
            critic_learning_rate=critic_rate,
            critic_baseline=baseline,
            **shared,
        ),
        train_dataset=problems(f"rollouts {seed}", args.completions * args.rollouts),
        critic=str(folder / "sft"),
        segmenter=segment_lines,
        rollout_func=Rollouts(start, seed),
    )
    trainer.pretrain_critic()
    errors = [
        round(entry["critic_pretraining/mse"], 4)
        for entry in trainer.state.log_history
        if "critic_pretraining/mse" in entry
    ]
    values, parsed = generative_values(
        trainer.critic,
        trainer.critic_processing_class,
        shared["critic_template"],
        trainer.success_rate.value,
        probes,
        seed,
    )
    return {"training error": errors, "stage 2": values, "stage 2 parse rate": parsed}


def token_critic(args, work: Path, start: Path, probes, seed: int, source: Path, rate: float) -> np.ndarray:
    """VAPO's critic on the rollouts of stage 2."""
    trainer = VAPOTrainer(
        model=str(start),
        reward_funcs=correct,
        args=VAPOConfig(
            str(work / "vapo"),
            per_device_train_batch_size=args.completions,
            critic_pretraining_steps=args.rollouts,
            critic_learning_rate=rate,
            critic_initial_value=args.mean_reward,
            max_completion_length=TASK.max_completion_length,
            num_generations=1,
            seed=seed,
            **COMMON,
        ),
        train_dataset=problems(f"rollouts {seed}", args.completions * args.rollouts),
        critic=make_token_critic(str(source), args.mean_reward),
        rollout_func=Rollouts(start, seed),
    )
    trainer.pretrain_critic()
    return token_values(trainer.critic, probes)


# --- What is written


def measure(args, work: Path, start: Path, probes, seed: int, name: str) -> dict:
    began = time.process_time()
    transformers.set_seed(seed)
    if name in ("hint", "no hint"):
        folder, hint = work / f"{name.replace(' ', '-')}-{seed}", name == "hint"
        values = stage_1(args, folder, start, probes, seed, hint)
        rate = args.critic_learning_rate
        values |= stage_2(args, folder, "pretrain", start, probes, seed, hint, "leave_one_out", rate)
    elif name in BASELINES:
        baseline, rate = name.split(", ")
        folder = work / f"hint-{args.seeds[0] if args.one_stage_1 else seed}"
        values = stage_2(args, folder, "other", start, probes, seed, True, baseline, float(rate))
    else:
        _, origin, rate = name.split(", ")
        source = start if origin == "from the policy" else work / f"hint-{seed}" / "sft"
        values = {"values": token_critic(args, work, start, probes, seed, source, float(rate))}
    plain = {key: np.round(value, 4).tolist() for key, value in values.items()}
    return {"name": name, "seed": seed, "cpu_seconds": round(time.process_time() - began), **plain}


def interval(squares: np.ndarray, groups: np.ndarray, number: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over states, problems drawn anew; `squares` has a row for each seed."""
    rng = np.random.default_rng(0)
    per_state = squares.mean(0)
    sums, counts = np.bincount(groups, per_state), np.bincount(groups)
    draws = rng.integers(len(sums), size=(number, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def report(args, runs: list[dict], probes, oracle: np.ndarray) -> str:
    truth = np.concatenate([rollout.true_values for rollout in probes.rollouts])
    returns = np.concatenate([rollout.returns for rollout in probes.rollouts])
    groups = np.concatenate([[i] * len(rollout.cuts) for i, rollout in enumerate(probes.rollouts)])
    noise = (truth * (1 - truth)).mean() / (returns.shape[1] - 1)
    lines: list[tuple[str, list]] = [
        ("mean reward, for every state", [np.full(len(truth), args.mean_reward)]),
        ("the oracle", [oracle]),
    ]
    for label, name, key in (
        ("generative, stage 1", "hint", "stage 1"),
        ("generative, stage 1 + 2", "hint", "stage 2"),
        ("generative without the hint, stage 1", "no hint", "stage 1"),
        ("generative without the hint, stage 1 + 2", "no hint", "stage 2"),
    ):
        lines.append((label, [np.array(run[key]) for run in runs if run["name"] == name]))
    for name in dict.fromkeys(run["name"] for run in runs if run["name"].startswith("token")):
        lines.append((name, [np.array(run["values"]) for run in runs if run["name"] == name]))
    table = "| critic | error | 95 % | seeds | correlation with the truth |\n| --- | --- | --- | --- | --- |\n"
    for label, columns in lines:
        if columns:
            squares = np.array([(column - truth) ** 2 for column in columns])
            low, high = interval(squares, groups)
            seeds = ", ".join(f"{error:.4f}" for error in squares.mean(1))
            spread = [np.corrcoef(column, truth)[0, 1] for column in columns if np.std(column) > 0]
            correlation = f"{np.mean(spread):.2f}" if spread else "–"
            table += f"| {label} | {squares.mean():.4f} | {low:.4f} to {high:.4f} | {seeds} | {correlation} |\n"
    text_of_baselines = baselines(args, runs, truth)
    command = shlex.join(["python", "benchmarks/genac_critic.py", *sys.argv[1:]])
    seconds = sum(run["cpu_seconds"] for run in runs)
    rates = [run[key] for run in runs for key in ("stage 1 parse rate", "stage 2 parse rate") if key in run]
    text = (
        f"Measured by `{command}` with torch {torch.__version__}, one CPU thread, "
        f"{seconds / 60:.0f} minutes: the quickstart's model, which solves {args.mean_reward:.0%} of problems with "
        f"four digits, frozen; {len(truth)} states of {len(probes.rollouts)} held-out problems with {returns.shape[1]} "
        f"continuations each, which alone are worth an error of {noise:.4f}. Stage 1 is {args.sft_steps} steps of 64 "
        f"traces, drawn from those about {args.trace_problems:,} solutions; stage 2 and the token critics see the same "
        f"{args.rollouts} rollouts of {args.completions} completions, with an update for each. Of a generative critic "
        f"one answer a state is sampled, as in training; {min(rates, default=0):.1%} of them or more had a score."
    )
    return f"""{textwrap.fill(text, 120)}

- error: mean squared, against the share of right continuations; mean over the seeds
- 95 %: bootstrap over the problems, seeds as they are
- token critic: VAPO's, from the policy's weights or from those that stage 1 ends with, and its learning rate

{table}{text_of_baselines}"""


def baselines(args, runs: list[dict], truth: np.ndarray) -> str:
    """Stage 2 with and without a baseline, by learning rate, always from the same stage 1 and on the same rollouts."""

    def error(values: list[float]) -> float:
        return float(((np.array(values) - truth) ** 2).mean())

    before = {run["seed"]: error(run["stage 1"]) for run in runs if run["name"] == "hint"}
    if args.one_stage_1:
        before = dict.fromkeys(args.seeds, before[args.seeds[0]])
    gains: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        if run["name"] in ("hint", *BASELINES) and run["seed"] in before:
            is_hint = run["name"] == "hint"
            name = f"leave_one_out, {args.critic_learning_rate:g}" if is_hint else run["name"]
            gains.setdefault(tuple(name.split(", ")), {})[run["seed"]] = before[run["seed"]] - error(run["stage 2"])
    if {baseline for baseline, _ in gains} != {"none", "leave_one_out"} or min(map(len, gains.values())) < 2:
        return ""
    rows = []
    for (baseline, rate), gain in sorted(gains.items()):
        each = ", ".join(f"{gain[seed]:+.4f}" for seed in sorted(gain))
        rows.append(f"| `{baseline}` | {rate} | {each} | {spread(gain.values())} |")
    none, other = (
        max((gain for (name, _), gain in gains.items() if name == baseline), key=lambda gain: sum(gain.values()))
        for baseline in ("none", "leave_one_out")
    )
    ahead = spread([other[seed] - none[seed] for seed in sorted(none.keys() & other.keys())])
    text = (
        "`critic_baseline` in stage 2: by how much the error of the generative critic with the hint fell, from the "
        f"same stage 1{' for all seeds' if args.one_stage_1 else ''} and on the same rollouts, by the critic's "
        "learning rate; 95 % intervals by Student's t over the seeds. With the better rate of each, `leave_one_out` "
        f"gains more than `none` by {ahead}."
    )
    return f"""
{textwrap.fill(text, 120, break_on_hyphens=False)}

| baseline | rate | for each seed | mean |
| --- | --- | --- | --- |
{chr(10).join(rows)}
"""


def spread(numbers) -> str:
    mean, half = over_seeds(list(numbers))
    return f"{mean:+.4f} ± {half:.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--one_stage_1", action="store_true", help="stage 2 of all seeds from that of the first")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs to make, by name, of all that there are")
    parser.add_argument("--trace_problems", type=int, default=4000)
    parser.add_argument("--sft_steps", type=int, default=600)
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--completions", type=int, default=128)
    parser.add_argument("--critic_learning_rate", type=float, default=1e-4)
    parser.add_argument("--probe_problems", type=int, default=120)
    parser.add_argument("--output", type=Path, default=Path("docs/results/genac_critic"), help="writes .json and .md")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)

    work = Path("outputs/quickstart/genac")
    work.mkdir(parents=True, exist_ok=True)
    start = fitted(TinyModelSettings(terms=TINY.terms), work.parent)
    held_out = held_out_problems(TASK, args.probe_problems)
    rows = [{"prompt": TASK.prompt(problem), "problem": problem} for problem in held_out]
    model, tokenizer = load(start)
    settings = ProbeSettings(
        completions=1,
        continuations=32,
        cuts="after:=",
        candidates=0,
        max_completion_length=TASK.max_completion_length,
    )
    policy = TransformersPolicy(model, tokenizer, batch_size=512)
    probes = draw_probes(work / f"probes-{args.probe_problems}", policy, rows, correct, settings)
    probes.tokenizer = tokenizer
    args.mean_reward = float(np.mean([rollout.returns[0].mean() for rollout in probes.rollouts]))
    oracle = []
    for rollout in probes.rollouts:
        for cut in rollout.cuts:
            partial = tokenizer.decode(rollout.completion_ids[:cut])
            query = f"{args.mean_reward:.2f}|{rollout.prompt}{partial}|"
            oracle.append(parse_score(trace(State(query, rollout.prompt, partial))))

    # What is compared comes first, the ablation of the hint last.
    plan = [(seed, name) for seed in args.seeds for name in ("hint", *TOKEN_CRITICS, *BASELINES)]
    plan += [(seed, "no hint") for seed in args.seeds]
    file = args.output.with_suffix(".json")
    asked = {key: value for key, value in vars(args).items() if key not in ("output", "seeds", "only")}
    kept = json.loads(file.read_text()) if file.exists() else {}
    runs = kept["runs"] if kept.get("settings") == asked else []
    for seed, name in plan:
        has_own_stage_1 = seed == args.seeds[0] or not args.one_stage_1
        is_in_hint = has_own_stage_1 and name == f"leave_one_out, {args.critic_learning_rate:g}"
        if is_in_hint or (name not in BASELINES and not has_own_stage_1) or (args.only and name not in args.only):
            continue
        if not any(run["name"] == name and run["seed"] == seed for run in runs):
            runs.append(measure(args, work, start, probes, seed, name))
            # After each run, so that an interrupted study goes on from there.
            body = ",\n".join(json.dumps(run) for run in runs)
            file.write_text(f'{{"settings": {json.dumps(asked)}, "runs": [\n{body}\n]}}\n')
        args.output.with_suffix(".md").write_text(report(args, runs, probes, np.array(oracle)), encoding="utf-8")
        print(seed, name, flush=True)
    print(report(args, runs, probes, np.array(oracle)))


if __name__ == "__main__":
    main()
