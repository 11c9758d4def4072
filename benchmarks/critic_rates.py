"""
How much a critic knows after its default pretraining, by the learning rates of its head and of what is below.

    python benchmarks/critic_rates.py --output docs/results/critic_rates [--arms toy letters smollm --smollm FOLDER]

A policy that does not move writes the rollouts once, with rewards of 0 and 1. Every pair of rates trains the same fresh
critic on them, one update each, with the trainer's engine and loss, and explains rollouts of other prompts or samples.

- `toy`: the quickstart's arithmetic, and a critic from the checkpoint of its tiny policy, as by default.
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
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from accelerate import Accelerator
from chain_policy import LENGTH, LETTERS, chain, true_values
from measuring import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_credit.credit.fit import explained_variance, fit_sums
from trl_credit.credit.value_loss import squared_error
from trl_credit.critics.engine import CriticEngine, CriticOptimization
from trl_credit.critics.fresh_head import trained_head
from trl_credit.critics.token import make_token_critic, read_values
from trl_credit.toy.scoring import complete
from trl_credit.toy.task import ChainTask
from trl_credit.toy.tiny_model import TinyModelSettings, fit_and_save, load


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
        "Arithmetic; a critic from the tiny policy's checkpoint, width 64, 3 layers",
        *(64, 16, 128, 2, (1e-4, 1e-3, 1e-2), (2e-6, 1e-5, 1e-4, 1e-3)),
    ),
    "letters": Arm(
        "Letters; a critic with random weights, width 896, 2 layers",
        *(896, 4, 48, 1, (1e-4, 1e-3), (1e-5, 1e-4, 1e-3)),
    ),
    "smollm": Arm(
        "Letters; a critic from SmolLM2-135M-Instruct, width 576, 30 layers",
        *(576, 2, 24, 1, (1e-3,), (1e-5, 1e-4, 1e-3)),
    ),
}


def solve_problems(policy: Path, number: int, seed: int, held_out: bool) -> list[dict]:
    """Arithmetic: problems with the policy's completions, those of a problem next to each other."""
    model, tokenizer = load(policy)
    task = ChainTask(TinyModelSettings().terms)
    rng = random.Random(f"rates {seed} {held_out}")
    problems = [problem for _ in range(number) for problem in [task.draw(rng, held_out)] * GENERATIONS]
    set_seed(seed)
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


def ceiling(rows: list[dict]) -> tuple[float, float]:
    """What the true values explain, of all returns and within prompts."""
    lines = []
    for row in rows:
        values = torch.tensor([row["values"]])
        lines.append(fit_sums(values, torch.full_like(values, row["reward"]), torch.ones_like(values)))
    sums = torch.cat(lines)
    return explained_variance(sums), explained_variance(sums, torch.arange(len(sums)) // GENERATIONS)


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
        if all(key in results for key in keys):
            continue
        size = arm.prompts * GENERATIONS
        rows = write(args.updates * arm.prompts, seed, False)
        batches = [as_tensors(rows[first : first + size], tokenizer) for first in range(0, len(rows), size)]
        rows = write(arm.held_out, seed, True)
        if "values" in rows[0]:
            stored["ceilings"][f"{name} {seed}"] = ceiling(rows)
        held_out = split(as_tensors(rows, tokenizer), 64)
        for key, (rate, head_rate, start) in zip(keys, pairs, strict=True):
            if key not in results:
                results[key] = measure(make_network, batches, held_out, rate, head_rate, start)
                print(key, json.dumps(results[key]), flush=True)
                save()


def run_vapo(args, policy: Path, seed: int) -> dict:
    """`VAPOTrainer` with its defaults on the quickstart's task: what its critic explains of new rollouts."""
    from trl_credit import VAPOConfig, VAPOTrainer
    from trl_credit.toy.runs import Method, train

    set_seed(seed)
    model, tokenizer = load(policy)
    logs = []
    trainer = train(
        model,
        tokenizer,
        ChainTask(TinyModelSettings().terms),
        Method("VAPO", VAPOConfig, VAPOTrainer),
        steps=args.vapo_steps,
        prompts_per_step=16,
        seed=seed,
        output_dir=policy.parent / "vapo",
        on_step=logs.append,
        length_adaptive_alpha=1.5,  # for completions of 30 tokens
    )
    history = trainer.state.log_history
    of_pretraining = [entry for entry in history if "critic_pretraining/explained_variance_within_prompt" in entry]
    return {
        "pretraining": [e["critic_pretraining/explained_variance_within_prompt"] for e in of_pretraining][-10:],
        "training": [entry["critic/explained_variance_within_prompt"] for entry in logs][-20:],
        "reward": [entry["reward"] for entry in logs][-20:],
    }


def pair_key(name: str, seed: int, rate: float, head_rate: float, start: float | None = None) -> str:
    return f"{name} {seed} {rate:g} {head_rate:g} {start}"


def mean(results: dict, name: str, pair: tuple, of: str) -> str:
    """A number of a pair of rates, over its seeds."""
    runs = [run[of] for seed in range(ARMS[name].seeds) if (run := results.get(pair_key(name, seed, *pair)))]
    return f"{statistics.mean(runs):.2f}" if runs else "–"


def cell(results: dict, name: str, *pair) -> str:
    return " / ".join(mean(results, name, pair, of) for of in ("explained_variance", "within_prompt"))


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
    for part, of in (("pretraining", "the last 10 rollouts of its pretraining"), ("training", "its last 20 steps")):
        values = [value for run in vapo.values() for value in run[part]]
        if values:
            half = 1.96 * statistics.stdev(values) / len(values) ** 0.5
            lines.append(
                f"`VAPOTrainer` with its defaults but `length_adaptive_alpha=1.5`, {len(vapo)} seeds: explained "
                f"variance within prompts over {of}, each rollout predicted before it is trained on: "
                f"{statistics.mean(values):.2f} ± {half:.2f} (95 % interval of the mean).\n"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["toy", "letters"])
    parser.add_argument("--smollm", type=Path, help="folder of the language model for the arm `smollm`")
    parser.add_argument("--updates", type=int, default=50, help="default: those of `critic_pretraining_steps`")
    parser.add_argument("--vapo", type=int, default=0, metavar="SEEDS", help="runs of VAPOTrainer")
    parser.add_argument("--vapo_steps", type=int, default=30)
    parser.add_argument("--models", type=Path, default=Path("outputs/quickstart"), help="where the tiny policy is kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/critic_rates"), help="without its ending")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tiny = TinyModelSettings()
    policy = tiny.folder(args.models)
    if not policy.exists():
        fit_and_save(tiny, policy)
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
    for seed in range(args.vapo):
        if str(seed) not in stored["vapo"]:
            stored["vapo"][str(seed)] = run_vapo(args, policy, seed)
            print(seed, json.dumps(stored["vapo"][str(seed)]), flush=True)
    save()
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    sys.exit(main())
