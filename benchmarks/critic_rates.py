"""
How much a critic knows after its default pretraining, by the learning rates of its head and of what is below.

    python benchmarks/critic_rates.py --output docs/results/critic_rates [--arms toy letters smollm --smollm FOLDER]

A policy that does not move writes the rollouts once, with rewards of 0 and 1. Every pair of rates trains the same fresh
critic on them, one update each, with the trainer's engine and loss, and explains rollouts of other prompts or samples.

- `toy`: the arithmetic of the quickstart with a critic, and one from the checkpoint of its tiny policy, as by default.
- `letters`: the Markov chain of `tests/chain_policy.py`, whose values can be computed, and a critic of width 896 with
  random weights.
- `smollm`: the same rollouts, read by a language model from a folder, e.g. SmolLM2-135M, in its own tokens.

`--vapo` makes runs of `VAPOTrainer` with its defaults. Runs that the JSON file holds already are not made again.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from accelerate import Accelerator
from chain_policy import LENGTH, LETTERS, chain, chain_policy_dir, no_x, true_values
from measuring import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_credit.credit.fit import explained_variance, fit_sums
from trl_credit.credit.value_loss import squared_error
from trl_credit.critic_report import Decoding, TransformersPolicy
from trl_credit.critics.engine import CriticEngine, CriticOptimization
from trl_credit.critics.fresh_head import trained_head
from trl_credit.critics.token import make_token_critic, read_values
from trl_credit.toy.quickstart import TINY_WITH_CRITIC
from trl_credit.toy.scoring import complete
from trl_credit.toy.task import ChainTask
from trl_credit.toy.tiny_model import TinyModelSettings, fitted, load


GENERATIONS = 8
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
BEFORE = (2e-6, 2e-6, 0.0)  # rates and start of the defaults of 0.2


@dataclass(frozen=True)
class Arm:
    """A critic, what an update of it reads, and the rates to try."""

    title: str
    width: int
    prompts: int  # of an update, with GENERATIONS completions each
    held_out: int
    seeds: int
    head_rates: tuple[float, ...]
    rates: tuple[float, ...]


ARMS = {
    "toy": Arm(
        "Arithmetic of three and four digits; a critic from the tiny policy's checkpoint, width 64, 3 layers",
        *(64, 16, 128, 1, (1e-4, 1e-3, 1e-2), (2e-6, 1e-5, 1e-4, 1e-3)),
    ),
    "letters": Arm(
        "Letters; a critic with random weights, width 896, 2 layers",
        *(896, 4, 48, 1, (1e-4, 1e-3), (1e-5, 1e-4, 1e-3)),
    ),
    "smollm": Arm(
        "Letters; a critic from SmolLM2-135M-Instruct, width 576, 30 layers",
        *(576, 4, 32, 1, (1.7e-4, 1e-3), (1e-5, 5e-5, 1.7e-4)),  # the default is 0.1 / 576 for both
    ),
}


TERMS = TINY_WITH_CRITIC.terms


def solve_problems(
    policy: Path, number: int, seed: int, held_out: bool, generations: int = GENERATIONS, terms: tuple[int, ...] = TERMS
) -> list[dict]:
    """Arithmetic: problems with the policy's completions, those of a problem next to each other."""
    model, tokenizer = load(policy)
    task = ChainTask(terms)
    rng = random.Random(f"rates {seed} {held_out}")
    problems = [problem for _ in range(number) for problem in [task.draw(rng, held_out)] * generations]
    texts = complete(model, tokenizer, task, problems, SAMPLED, batch_size=256)
    return [
        {"prompt": task.prompt(problem), "completion": text, "reward": float(task.is_correct(problem, text))}
        for problem, text in zip(problems, texts, strict=True)
    ]


def write_letters(number: int, seed: int, held_out: bool) -> list[dict]:
    """Letters: samples of the chain, those of a prompt next to each other, with the true value of every state."""
    rng = random.Random(f"letters {seed} {held_out}")
    probabilities, table = chain().softmax(-1).tolist(), true_values()
    rows = []
    for _ in range(number):
        prompt = rng.choice(LETTERS[:-1])
        for _ in range(GENERATIONS):
            text, values = "", []
            while len(text) < LENGTH:
                state = LETTERS.index((prompt + text)[-1])
                values.append(table[LENGTH - len(text), state].item() * ("x" not in text))
                letter = rng.choices([*LETTERS, ""], probabilities[state])[0]
                if not letter:
                    break
                text += letter
            else:
                values.append(float("x" not in text))
            rows.append({"prompt": prompt, "completion": text, "reward": float("x" not in text), "values": values})
    return rows


def outcomes_from_every_state(policy: Path, rows: list[dict], terms: tuple[int, ...] = TERMS) -> list[list[float]]:
    """Arithmetic: whether one more completion that goes on from each state of a completion is right."""
    model, tokenizer = load(policy)
    task = ChainTask(terms)
    states = [
        (row, tokenizer(row["prompt"] + row["completion"][:t]).input_ids, t)
        for row in rows
        for t in range(len(row["completion"]) + 1)
    ]
    room = [task.max_completion_length - t for _, _, t in states]
    # Another seed than that of `complete`: the rewards must not share the noise.
    continuations = TransformersPolicy(model, tokenizer, batch_size=512).sample(
        [ids for _, ids, _ in states], room, Decoding(), seed=1
    )
    outcomes: dict[int, list[float]] = {id(row): [] for row in rows}
    for (row, _, t), text in zip(states, tokenizer.batch_decode(continuations, skip_special_tokens=True), strict=True):
        right = task.is_correct(row["prompt"].removesuffix("="), row["completion"][:t] + text)
        outcomes[id(row)].append(float(right))
    return [outcomes[id(row)] for row in rows]


def ceiling(rows: list[dict]) -> tuple[float, float]:
    """
    What the true values explain, of all returns and within prompts: Cov(V, R) / Var(R), because Cov(V, R) = Var(V). In
    it the values may be estimates, as noise that R does not share leaves a covariance as it is.
    """
    lines = []
    for row in rows:
        values = torch.tensor([row["values"]])
        lines.append([fit_sums(v, torch.full_like(v, row["reward"]), torch.ones_like(v)) for v in (values, -values)])
    plus, minus = map(torch.cat, zip(*lines, strict=True))
    prompts = torch.arange(len(rows)) // GENERATIONS
    # Of Var(R ∓ V) = Var(R) + Var(V) ∓ 2 Cov(V, R) the difference.
    of_all, within = (explained_variance(plus, by) - explained_variance(minus, by) for by in (None, prompts))
    return of_all / 4, within / 4


def random_model(tokenizer, width: int):
    """Two layers of a width, with random weights, the same ones every time."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    set_seed(0)
    return AutoModelForCausalLM.from_config(config)


def as_tensors(rows: list[dict], tokenizer) -> dict[str, torch.Tensor]:
    """What the trainer gives a critic: prompts padded on the left, completions on the right, and rewards."""
    tensors = {"rewards": torch.tensor([row["reward"] for row in rows])}
    ends = {"prompt": ("left", ""), "completion": ("right", tokenizer.eos_token)}
    for name, (side, end) in ends.items():
        texts = [row[name] + end for row in rows]
        batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt", add_special_tokens=False)
        tensors |= {f"{name}_ids": batch.input_ids, f"{name}_mask": batch.attention_mask}
    return tensors


def split(tensors: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    parts = zip(*(tensor.split(size) for tensor in tensors.values()), strict=True)
    return [dict(zip(tensors, part, strict=True)) for part in parts]


def loss_of(network, inputs) -> torch.Tensor:
    loss = squared_error(read_values(network, inputs)[:, :-1], inputs["rewards"].unsqueeze(1))
    return (loss * inputs["completion_mask"]).sum()


def measure(make_network, batches: list[dict], held_out: list[dict], rate: float, head_rate: float, start=None) -> dict:
    """Train a fresh critic on the batches, one update each, and let it explain the held-out rollouts."""
    network = make_token_critic(make_network(), start if start is not None else batches[0]["rewards"].mean().item())
    settings = CriticOptimization(rate, frozenset(trained_head(network)), head_rate)
    engine = CriticEngine(network, Accelerator(cpu=True), settings)
    engine.begin(len(batches))
    began = time.process_time()
    for batch in batches:
        engine.update([batch], loss_of, lambda inputs: inputs["completion_mask"].sum())
    seconds = time.process_time() - began
    sums, values = [], []
    for batch in held_out:
        read = engine.evaluate(partial(_read, batch))
        mask = batch["completion_mask"].bool()
        sums.append(fit_sums(read, batch["rewards"].unsqueeze(1).expand(read.shape), mask))
        values.append(read[mask])
    sums = torch.cat(sums)
    groups = torch.arange(len(sums)) // GENERATIONS
    return {
        "explained_variance": explained_variance(sums),
        "within_prompt": explained_variance(sums, groups),
        "value_mean": torch.cat(values).mean().item(),
        "reward_mean": torch.cat([batch["rewards"] for batch in held_out]).mean().item(),
        "cpu_seconds": seconds,
    }


def _read(batch: dict, network) -> torch.Tensor:
    return read_values(network, batch)[:, :-1]


def run_arm(name: str, args, policy: Path, stored: dict, save) -> None:
    arm, results = ARMS[name], stored["rates"]
    tokenizer = make_tokenizer()
    if name == "toy":
        make_network = partial(AutoModelForCausalLM.from_pretrained, policy, dtype=torch.float32)
        tokenizer, write = load(policy)[1], partial(solve_problems, policy)
    elif name == "letters":
        make_network, write = partial(random_model, tokenizer, arm.width), write_letters
    else:
        make_network = partial(AutoModelForCausalLM.from_pretrained, args.smollm, dtype=torch.float32)
        tokenizer, write = AutoTokenizer.from_pretrained(args.smollm), write_letters
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        assert tokenizer.decode(tokenizer(LETTERS).input_ids) == LETTERS
    for seed in range(arm.seeds):
        pairs = [(rate, head_rate, None) for head_rate in arm.head_rates for rate in arm.rates] + [BEFORE]
        keys = [pair_key(name, seed, *pair) for pair in pairs]
        size = arm.prompts * GENERATIONS
        unseen = write(arm.held_out, seed, True)
        # Values are those of letters, several of which may be one token of a language model.
        if f"{name} {seed}" not in stored["ceilings"] and name != "smollm":
            if name == "toy":
                for row, outcomes in zip(unseen, outcomes_from_every_state(policy, unseen), strict=True):
                    row["values"] = outcomes
            stored["ceilings"][f"{name} {seed}"] = ceiling(unseen)
        if all(key in results for key in keys):
            continue
        rows = write(args.updates * arm.prompts, seed, False)
        batches = [as_tensors(rows[first : first + size], tokenizer) for first in range(0, len(rows), size)]
        held_out = split(as_tensors(unseen, tokenizer), 64)
        for key, (rate, head_rate, start) in zip(keys, pairs, strict=True):
            if key not in results:
                results[key] = measure(make_network, batches, held_out, rate, head_rate, start)
                print(key, json.dumps(results[key]), flush=True)
                save()


def run_vapo(task: str, args, policy: Path, seed: int) -> dict:
    """`VAPOTrainer` with its defaults: what its critic explains of new rollouts, before and while the policy moves."""
    from datasets import Dataset

    from trl_credit import VAPOConfig, VAPOTrainer
    from trl_credit.toy.runs import Method, train

    set_seed(seed)
    short = {"length_adaptive_alpha": 1.5}  # completions are
    with tempfile.TemporaryDirectory() as folder:
        if task == "toy":
            model, tokenizer = load(policy)
            chains, vapo = ChainTask(TERMS), Method("VAPO", VAPOConfig, VAPOTrainer)
            settings = {"steps": args.vapo_steps, "prompts_per_step": 16, "seed": seed, "output_dir": Path(folder)}
            trainer = train(model, tokenizer, chains, vapo, **settings, **short)
        else:
            trainer = VAPOTrainer(
                model=str(chain_policy_dir(Path(folder) / "policy")),
                reward_funcs=no_x,
                args=VAPOConfig(
                    folder,
                    **short,
                    per_device_train_batch_size=16 * GENERATIONS,
                    num_generations=GENERATIONS,
                    max_completion_length=LENGTH,
                    max_steps=args.vapo_steps,
                    seed=seed,
                    bf16=False,
                    logging_steps=1,
                    report_to="none",
                    save_strategy="no",
                    disable_tqdm=True,
                ),
                train_dataset=Dataset.from_dict({"prompt": [*LETTERS[:-1]] * 16}),
            )
            trainer.train()
    history = trainer.state.log_history
    name = "explained_variance_within_prompt"
    return {
        "pretraining": [entry[f"critic_pretraining/{name}"] for entry in history if "critic_pretraining/loss" in entry],
        "training": [entry[f"critic/{name}"] for entry in history if f"critic/{name}" in entry][: args.vapo_steps],
        "reward": [entry["reward"] for entry in history if "reward" in entry][: args.vapo_steps],
    }


def pair_key(name: str, seed: int, rate: float, head_rate: float, start: float | None = None) -> str:
    return f"{name} {seed} {rate:g} {head_rate:g} {start}"


def mean(results: dict, name: str, pair: tuple, of: str) -> str:
    """A number of a pair of rates, over its seeds."""
    runs = [run[of] for seed in range(ARMS[name].seeds) if (run := results.get(pair_key(name, seed, *pair)))]
    return f"{statistics.mean(runs):.2f}" if runs else "–"


def cell(results: dict, name: str, *pair) -> str:
    return " / ".join(mean(results, name, pair, of) for of in ("explained_variance", "within_prompt"))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    return statistics.mean(values), 1.96 * statistics.stdev(values) / len(values) ** 0.5


def table(stored: dict) -> str:
    results, vapo, lines = stored["rates"], stored["vapo"], []
    for name, arm in ARMS.items():
        if not any(key.startswith(f"{name} ") for key in results):
            continue
        rows = (
            " | ".join([f"head {head:g}", *(cell(results, name, rate, head) for rate in arm.rates)])
            for head in arm.head_rates
        )
        value, reward = (mean(results, name, BEFORE, of) for of in ("value_mean", "reward_mean"))
        lines += [
            f"**{arm.title}** ({arm.prompts * GENERATIONS} completions an update, seeds: {arm.seeds})",
            "",
            f"| | {' | '.join(f'below {rate:g}' for rate in arm.rates)} |",
            "| --- |" + " --- |" * len(arm.rates),
            *(f"| {row} |" for row in rows),
            "",
            f"All weights at 2e-6 and a start at 0, as it was up to 0.2: {cell(results, name, *BEFORE)}, a mean value "
            f"of {value} at a mean reward of {reward}."
            + "".join(
                f" The true values explain {of_all:.2f} / {within:.2f}."
                for key, (of_all, within) in stored["ceilings"].items()
                if key == f"{name} 0"
            ),
            "",
        ]
    for task, title in (("letters", "letters"), ("toy", "arithmetic")):
        runs = [run for key, run in vapo.items() if key.startswith(task)]
        if runs:
            means = [
                interval([value for run in runs for value in run[part][-last:] if value is not None])
                for part, last in (("pretraining", 10), ("training", 20))
            ]
            before, after = (f"{mean:.2f} ± {half:.2f}" for mean, half in means)
            lines.append(
                f"`VAPOTrainer` with its defaults but `length_adaptive_alpha=1.5`, {title}, seeds: {len(runs)}: "
                f"explained variance within prompts of rollouts, each predicted before it is trained on: {before} over "
                f"the last 10 of the pretraining, {after} over the last 20 steps (95 % intervals of the mean).\n"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=["toy", "letters"])
    parser.add_argument("--smollm", type=Path, help="folder of the language model for the arm `smollm`")
    parser.add_argument("--updates", type=int, default=50, help="default: those of `critic_pretraining_steps`")
    parser.add_argument("--vapo", nargs="*", choices=["toy", "letters"], default=[], help="tasks for VAPOTrainer")
    parser.add_argument("--vapo_seeds", type=int, default=2)
    parser.add_argument("--vapo_steps", type=int, default=30)
    parser.add_argument("--models", type=Path, default=Path("outputs/quickstart"), help="where the tiny policy is kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/critic_rates"), help="without its ending")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = fitted(TinyModelSettings(terms=TERMS), args.models)
    file = args.output.with_suffix(".json")
    stored = json.loads(file.read_text()) if file.exists() else {"rates": {}, "ceilings": {}, "vapo": {}}

    def save():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        page = (
            "Explained variance of the returns on held-out prompts / the same within prompts, after "
            f"{args.updates} updates, by `benchmarks/critic_rates.py` on one CPU core, torch {torch.__version__}.\n\n"
        )
        args.output.with_suffix(".md").write_text(page + table(stored), encoding="utf-8")

    for name in args.arms:
        run_arm(name, args, policy, stored, save)
    for task, seed in [(task, seed) for task in args.vapo for seed in range(args.vapo_seeds)]:
        key = f"{task} {seed}"
        if key not in stored["vapo"]:
            stored["vapo"][key] = run_vapo(task, args, policy, seed)
            print(key, json.dumps(stored["vapo"][key]), flush=True)
            save()
    save()
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    sys.exit(main())
