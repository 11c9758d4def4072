"""
What a critic learns from several passes over the same rollouts, and from as many updates on fresh ones.

    python benchmarks/stored_rollouts.py --output docs/results/stored_rollouts

The task is the quickstart's arithmetic, the policy its tiny model, which does not move. One folder of rollouts is
written and read by all runs: those on the same rollouts make 1, 4 or 8 passes over its beginning, those on fresh ones a
single pass over as much as that is, and one run holds out a part and ends by itself. Each critic then explains what the
policy earns on problems that are in neither. Runs that the JSON file holds already are not made again.
"""

import argparse
import json
import random
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from transformers import PrinterCallback

from trl_credit import VAPOConfig, VAPOTrainer
from trl_credit.credit.fit import explained_variance
from trl_credit.toy.task import ChainTask
from trl_credit.toy.tiny_model import TinyModelSettings, fitted, load


PROMPTS, GENERATIONS = 16, 8  # of a rollout, which is one update
PASSES = (1, 4, 8)


def make_trainer(policy: Path, folder: Path, problems: list[str], rollouts: Path, seed: int, **settings):
    task = ChainTask(TinyModelSettings().terms)
    model, tokenizer = load(policy)

    def correct(completions, problem, **kwargs):
        return [float(task.is_correct(p, text)) for p, text in zip(problem, completions, strict=True)]

    trainer = VAPOTrainer(
        model=model,
        reward_funcs=correct,
        args=VAPOConfig(
            str(folder),
            per_device_train_batch_size=PROMPTS * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=task.max_completion_length,
            critic_pretraining_rollouts=str(rollouts),
            seed=seed,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": [task.prompt(p) for p in problems], "problem": problems}),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def explained(trainer, test: VAPOTrainer) -> tuple[float, float]:
    """What its critic explains of the rollouts that another trainer has stored, and the same within prompts."""
    passes = test._passes
    assert passes is not None
    rollouts = (trainer.take_up(*passes.share(rows, 0, len(rows))) for rows in passes.numbered(0))
    sums = torch.cat([trainer.critic_fit(*rollout) for rollout in rollouts])
    return explained_variance(sums), explained_variance(sums, torch.arange(len(sums)) // GENERATIONS)


def run_seed(policy: Path, args, seed: int, results: dict) -> None:
    """Explained variance on new problems by kind of run and number of passes, where it is not in the results."""
    task, rng = ChainTask((args.terms,)), random.Random(f"stored {seed}")
    problems = [task.draw(rng) for _ in range(max(PASSES) * args.rollouts * PROMPTS)]
    new = [task.draw(rng, held_out=True) for _ in range(args.test * PROMPTS)]
    with TemporaryDirectory() as place:
        folder = Path(place)

        def pretrained(problems, part, steps, **settings):
            settings = {"critic_pretraining_steps": steps, **settings}
            trainer = make_trainer(policy, folder / "run", problems, folder / part, seed, **settings)
            trainer.pretrain_critic()
            return trainer

        test = pretrained(new, "test", args.test, critic_pretraining_epochs=1, critic_pretraining_held_out=0.0)
        for passes in PASSES:
            for kind, arm in (("fresh", (passes * args.rollouts, 1)), ("same", (args.rollouts, passes))):
                if (name := f"{kind} {passes}") not in results:
                    whole = {"critic_pretraining_epochs": arm[1], "critic_pretraining_held_out": 0.0}
                    trainer = pretrained(problems, "rollouts", arm[0], **whole)
                    assert trainer.engine.steps == passes * args.rollouts
                    results[name] = explained(trainer, test)
        if "kept" not in results:
            trainer = pretrained(problems, "rollouts", args.rollouts)
            results["kept"] = (*explained(trainer, test), trainer.engine.steps)


def table(stored: dict, rollouts: int) -> str:
    def cell(kind: str, passes: int) -> str:
        runs = [run[f"{kind} {passes}"] for run in stored.values()]
        return " / ".join(f"{statistics.mean(numbers):.2f}" for numbers in zip(*runs, strict=True))

    completions = rollouts * PROMPTS * GENERATIONS
    rows = (
        f"| {passes} | {passes * rollouts} | {cell('same', passes)} | {cell('fresh', passes)} | "
        f"{passes * completions:,} |"
        for passes in PASSES
    )
    head = f"| passes | updates | over the same {completions:,} completions | on fresh completions | which are |"
    of_all, within, updates = (statistics.mean(x) for x in zip(*(run["kept"] for run in stored.values()), strict=True))
    kept = (
        f"With a tenth of the prompts held out, and all other options at their defaults, pretraining ends after "
        f"{updates:.0f} updates, and the critic that is kept explains {of_all:.2f} / {within:.2f}.\n"
    )
    return "\n".join([head, "| --- | --- | --- | --- | --- |", *rows, "", kept])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=12, help="of a pass")
    parser.add_argument("--test", type=int, default=8, help="rollouts of new problems")
    parser.add_argument("--terms", type=int, default=4, help="digits of a problem")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--models", type=Path, default=Path("outputs/quickstart"), help="where the tiny policy is kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/stored_rollouts"), help="without its ending")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = fitted(TinyModelSettings(), args.models)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    file = args.output.with_suffix(".json")
    stored = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(args.seeds):
        run_seed(policy, args, seed, stored.setdefault(str(seed), {}))
        file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        page = (
            "Explained variance of the returns of 4-digit problems that no critic was trained on / the same within "
            f"prompts, by `benchmarks/stored_rollouts.py` on one CPU core, seeds: {len(stored)}.\n\n"
        ).replace("4-digit", f"{args.terms}-digit")
        args.output.with_suffix(".md").write_text(page + table(stored, args.rollouts), encoding="utf-8")
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
