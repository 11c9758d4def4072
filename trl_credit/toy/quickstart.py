"""The quickstart, from the command line to the table."""

import argparse
import logging
import os
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Defaults:
    """Settings of a run that depend on the model and the machine."""

    steps: int
    learning_rate: float
    prompts_per_step: int
    problems: int  # held out
    terms: tuple[int, ...]  # digits of a problem
    batch_size: int  # of the evaluation


TINY = Defaults(steps=150, learning_rate=3e-4, prompts_per_step=16, problems=1024, terms=(4, 5, 6), batch_size=256)
# Of longer chains a critic learns nothing from as few completions, and it falls behind a policy that is faster.
TINY_WITH_CRITIC = replace(TINY, learning_rate=2e-5, terms=(3, 4))
OWN_ON_CPU = Defaults(steps=50, learning_rate=5e-6, prompts_per_step=2, problems=64, terms=(3,), batch_size=32)
OWN_ON_GPU = Defaults(steps=200, learning_rate=2e-6, prompts_per_step=16, problems=512, terms=(3, 4), batch_size=128)


def make_parser() -> argparse.ArgumentParser:
    """The options of `trl-credit quickstart`."""
    parser = argparse.ArgumentParser(
        prog="trl-credit quickstart",
        description="Train a small language model to reason better, and see by how much: minutes on two CPU cores.",
    )
    add = parser.add_argument
    add("--model", metavar="PATH_OR_ID", help="a chat model: folder or Hub id (default: a tiny one, made in a minute)")
    add("--trainer", choices=["grpo-lambda", "grpo", "vapo"], default="grpo-lambda", help="default: %(default)s")
    add("--trace_lambda", type=float, help="lambda of GRPO-λ (default: the trainer's)")
    add("--learning_rate", type=float, help=f"default: {_both('learning_rate')}")
    add("--steps", type=int, help=f"rollouts (default: {_both('steps')})")
    add("--minutes", type=float, default=5, help="end the training after these, done or not (default: %(default)s)")
    add("--problems", type=int, help=f"held-out problems to solve before and after (default: {_both('problems')})")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output_dir", type=Path, default=Path("outputs/quickstart"), help="default: %(default)s")
    return parser


def _both(name: str) -> str:
    tiny, critic, cpu, gpu = (getattr(of, name) for of in (TINY, TINY_WITH_CRITIC, OWN_ON_CPU, OWN_ON_GPU))
    return f"{tiny}{'' if critic == tiny else f', {critic} for vapo'}; with --model {cpu}, on a GPU {gpu}"


def run(argv: list[str] | None = None) -> int:
    """Parse, train, evaluate, report."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("steps", "problems", "minutes", "learning_rate"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}")
    if args.trace_lambda is not None and args.trainer != "grpo-lambda":
        parser.error(f"--trace_lambda is an option of --trainer grpo-lambda, got --trainer {args.trainer}")
    if args.trace_lambda is not None and not 0 <= args.trace_lambda <= 1:
        parser.error(f"--trace_lambda must be in [0, 1], got {args.trace_lambda}")
    with _quiet():
        return _quickstart(args)


@contextmanager
def _quiet():
    """The run reports in a table and a picture: what its libraries report, short of errors, is left out."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    import datasets
    import transformers

    bars_on = transformers.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars_on[0]:
            transformers.logging.enable_progress_bar()
        if not bars_on[1]:
            datasets.enable_progress_bars()


def _quickstart(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from transformers import set_seed

    from ..critics.token import TokenCritic
    from .runs import METHODS, train
    from .scoring import evaluate, explained_within_problems, held_out_problems
    from .show import plot_learning_curve, progress_bars, show_completions, show_critic, show_table
    from .task import ChainTask, ChatTask, Task
    from .tiny_model import TinyModelSettings, fit_and_save, load

    start = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    method, config, _ = METHODS[args.trainer]
    pretraining = getattr(config, "critic_pretraining_steps", 0)  # of a critic, if it has one
    defaults: Defaults
    task: Task
    if args.model is None:
        torch.set_num_threads(1)  # as fast as two at this size, and the same numbers on any number of cores
        defaults = TINY_WITH_CRITIC if pretraining else TINY
        task = ChainTask(defaults.terms)
        tiny = TinyModelSettings(terms=task.terms)
        start_model = tiny.folder(args.output_dir)
        if not start_model.exists():
            with progress_bars(console) as bar:
                fit_and_save(tiny, start_model, bar("Fitting a tiny model", tiny.steps, "loss"))
    else:
        defaults = OWN_ON_CPU if device == "cpu" else OWN_ON_GPU
        task = ChatTask(defaults.terms)
        start_model = args.model

    set_seed(args.seed)
    model, tokenizer = load(start_model)
    if args.model is not None and tokenizer.chat_template is None:
        console.print(f"--model must be a chat model, and {args.model} has no chat template.", markup=False)
        return 2
    problems = held_out_problems(task, args.problems or defaults.problems)
    with console.status("Evaluating"):
        before = evaluate(model.to(device), tokenizer, task, problems, defaults.batch_size)

    steps = args.steps or defaults.steps
    settings = {"learning_rate": args.learning_rate or defaults.learning_rate}
    if args.trace_lambda is not None:
        settings["trace_lambda"] = args.trace_lambda
    rewards = []
    with progress_bars(console) as bar:
        pretrained = bar("Pretraining its critic", pretraining, "solved") if pretraining else lambda value: None
        advance = bar(f"Training with {method}", steps, "solved")

        def on_step(metrics):
            rewards.append(metrics["reward"])
            advance(metrics["reward"])

        trainer = train(
            model,
            tokenizer,
            task,
            args.trainer,
            steps=steps,
            prompts_per_step=defaults.prompts_per_step,
            seed=args.seed,
            output_dir=args.output_dir,
            minutes=args.minutes,
            on_step=on_step,
            on_pretraining=lambda metrics: pretrained(metrics["critic_pretraining/reward"]),
            **settings,
        )
    if len(rewards) < steps:
        console.print(f"Stopped after {args.minutes:g} minutes, at step {len(rewards)} of {steps}: see --minutes.")

    checkpoint = args.output_dir / "model"
    trainer.save_model(str(checkpoint))
    model, tokenizer = load(checkpoint)  # what is evaluated is what is on the disk
    with console.status("Evaluating"):
        after = evaluate(model.to(device), tokenizer, task, problems, defaults.batch_size)

    plot = args.output_dir / "learning_curve.png"
    name = "a tiny model" if args.model is None else Path(args.model).name
    title = f"{method} on {name} ({model.num_parameters() / 1e6:.2g} M parameters)"
    plot_learning_curve(plot, title, rewards, before, after)
    console.print()
    show_table(console, before, after)
    show_completions(console, before, after)
    if pretraining:
        critic = TokenCritic.from_pretrained(str(checkpoint / "critic"), tokenizer, batch_size=defaults.batch_size)
        known = explained_within_problems(critic, model, tokenizer, task, problems, defaults.batch_size)
        show_critic(console, known)
    console.print(f"\nlearning curve  {plot}\ncheckpoint      {checkpoint}", markup=False)
    console.print(f"{(time.monotonic() - start) / 60:.1f} minutes on {device}, seed {args.seed}")
    return 0
