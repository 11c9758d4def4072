"""`trl-credit critic-report`: what critics know of a policy's chances, against Monte-Carlo truth."""

import sys
from argparse import ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path


def make_parser() -> ArgumentParser:
    """The options of `trl-credit critic-report`."""
    parser = ArgumentParser(
        prog="trl-credit critic-report",
        description="Measure critics of a policy against Monte-Carlo truth: sample completions, continue them from "
        "many states, and compare the critics' values with what the continuations are rewarded.",
        epilog="What was sampled is kept in --probes and never sampled again: an interrupted report goes on, and a "
        "report on another critic of the same policy samples nothing.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--policy", required=True, metavar="PATH_OR_ID", help="folder or Hub id of the policy")
    add(
        "--critics",
        required=True,
        nargs="+",
        metavar="CRITIC",
        help="folder or Hub id of a critic that a trainer has saved, or of a reward model; prompt:PATH_OR_ID, a critic "
        "of SPPO, and generative:PATH_OR_ID, one of GenAC, where no critic.json says so; constant or constant:VALUE; "
        "leave_one_out",
    )
    add(
        "--dataset_name",
        required=True,
        metavar="NAME_OR_FILE",
        help="Hub id, or a .json, .jsonl, .csv or .parquet file",
    )
    add("--dataset_split", default="train", help="split of it (default: %(default)s)")
    add("--prompts", type=int, default=64, help="how many rows of it, from the first (default: %(default)s)")
    add(
        "--reward_funcs",
        required=True,
        nargs="+",
        metavar="NAME",
        help="those of `trl grpo`, by name, or any by import path, module.function",
    )
    add(
        "--reward_weights",
        type=float,
        nargs="+",
        metavar="WEIGHT",
        help="one for each of them, as in training; not given: 1 for each",
    )
    add("--completions", type=int, default=4, help="completions of each prompt (default: %(default)s)")
    add("--continuations", type=int, default=16, help="continuations of each state (default: %(default)s)")
    add(
        "--cuts",
        default="deciles",
        help="where the states are: deciles, lines, a number of tokens, or after:TEXT (default: %(default)s)",
    )
    add(
        "--candidates", type=int, default=4, help="next steps to rank, of one state a completion (default: %(default)s)"
    )
    add("--max_completion_length", type=int, default=256, help="most tokens of a completion (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="of the sampling (default: %(default)s)")
    add("--top_p", type=float, default=1.0, help="of the sampling (default: %(default)s)")
    add("--top_k", type=int, default=0, help="0 for all (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add("--batch_size", type=int, default=64, help="sequences at a time, without vLLM (default: %(default)s)")
    add("--use_vllm", action="store_true", help="sample with vLLM")
    add(
        "--vllm_gpu_memory_utilization",
        type=float,
        default=0.5,
        help="share of the GPU's memory that vLLM takes (default: %(default)s)",
    )
    add("--vllm_max_model_length", type=int, help="context of vLLM; not given: the model's")
    add("--dtype", default="auto", help="of the policy and of critics, e.g. bfloat16 (default: %(default)s)")
    add(
        "--critic_loss",
        choices=["bce", "mse"],
        help="what prompt critics were trained with: with bce they answer a logit (default: as their critic.json says, "
        "or bce)",
    )
    add(
        "--reward_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of prompt critics that were trained with bce (default: as their critic.json says, or 0 1)",
    )
    add(
        "--critic_max_completion_length",
        type=int,
        help="longest answer of generative critics (default: as their critic.json says, or 1024)",
    )
    add(
        "--draws",
        type=int,
        default=500,
        help="resamplings for the interval of the calibration error (default: %(default)s)",
    )
    add(
        "--output_dir",
        type=Path,
        default=Path("critic_report"),
        help="for report.html and report.json (default: %(default)s)",
    )
    add("--probes", type=Path, metavar="FOLDER", help="where samples are kept; not given: `probes` in the former")
    return parser


def main(argv: list[str]) -> int:
    """Draw what is missing, measure, write; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("prompts", "batch_size", "draws"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.reward_range and not args.reward_range[0] < args.reward_range[1]:
        parser.error(f"--reward_range must rise, got {args.reward_range[0]:g} {args.reward_range[1]:g}")
    try:
        return _report(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def _report(args: Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..critic_report import Decoding, ProbeSettings, VLLMPolicy, draw_probes, evaluate_critic, load_policy
    from ..critic_report.report_page import write_json, write_page

    settings = ProbeSettings(
        completions=args.completions,
        continuations=args.continuations,
        cuts=args.cuts,
        candidates=args.candidates,
        max_completion_length=args.max_completion_length,
        decoding=Decoding(args.temperature, args.top_p, args.top_k),
        seed=args.seed,
    )
    rewards = [_reward_func(name) for name in args.reward_funcs]
    dataset = _dataset(args.dataset_name, args.dataset_split, args.prompts)
    console = Console(highlight=False)
    if args.use_vllm:
        policy = VLLMPolicy(
            args.policy,
            dtype=args.dtype,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_len=args.vllm_max_model_length,
        )
    else:
        policy = load_policy(args.policy, batch_size=args.batch_size, dtype=args.dtype)
    critics = [_critic(spec, args, policy.tokenizer) for spec in args.critics]
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("")
        probes = draw_probes(
            args.probes or args.output_dir / "probes",
            policy,
            dataset,
            rewards,
            settings,
            lambda done, total: progress.update(bar, completed=done, total=total),
            args.reward_weights,
        )
    reports = []
    for critic in critics:
        with console.status(f"Measuring {critic.name}"):
            reports.append(evaluate_critic(critic, probes, args.draws))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "report.json", reports)
    write_page(args.output_dir / "report.html", reports)
    _show(console, reports)
    console.print(f"\nreport  {args.output_dir / 'report.html'}", markup=False, soft_wrap=True)
    return 0


def _show(console, reports) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ..critic_report.layout import SECTIONS
    from ..critic_report.report_page import show

    for report in reports:
        console.print(f"\n{report.critic}", style="bold", markup=False, soft_wrap=True)
        for sentence in report.verdict.sentences:
            console.print(f"  {sentence}", markup=False, soft_wrap=True)
    console.print()
    facts = reports[0].probes
    title = f"{facts['completions']} completions, {facts['states']} states, mean reward {facts['mean_reward']:.3f}"
    table = Table(title=f"{title}; brackets are 95 % intervals", title_justify="left")
    table.add_column("")
    for report in reports:
        table.add_column(escape(report.critic), overflow="fold")
    table.add_column("ideal")
    for section in SECTIONS:
        for row in section.rows:
            table.add_row(row.label, *(escape(show(r.rows.get(row.name))) for r in reports), row.ideal)
        table.add_section()
    for report_row, label in (("lambda", "advantage, λ = {:g}"), ("alpha", "advantage, α = {:g}")):
        curves = [dict(report.curves.get(f"advantage/correlation_by_{report_row}", [])) for report in reports]
        for x in max(curves, key=len):  # one of whose answers none was read has no curve
            table.add_row(label.format(x), *(escape(show(curve.get(x))) for curve in curves), "1" if x == 0 else "")
    console.print(table)


def _critic(spec: str, args: Namespace, tokenizer):
    from ..critic_report import ConstantCritic, LeaveOneOutMean
    from ..critics.loading import load_critic

    if spec == "leave_one_out":
        return LeaveOneOutMean()
    if spec == "constant":
        return ConstantCritic()
    kind, _, rest = spec.partition(":")
    if kind == "constant":
        try:
            return ConstantCritic(float(rest))
        except ValueError:
            raise ValueError(f"--critics constant:VALUE needs a number, got {rest!r}.") from None
    given = {
        "critic_loss": args.critic_loss,
        "reward_range": args.reward_range,
        "max_completion_length": args.critic_max_completion_length,
    }
    named = kind in ("prompt", "generative")
    return load_critic(
        rest if named else spec,
        tokenizer,
        kind if named else None,
        args.batch_size,
        args.dtype,
        **{name: value for name, value in given.items() if value is not None},
    )


def _dataset(name: str, split: str, prompts: int):
    from datasets import load_dataset

    from ..seam.scripts import reader_of

    if reader := reader_of(name):
        dataset = load_dataset(reader, data_files=name, split=split)
    else:
        dataset = load_dataset(name, split=split)
    return dataset.select(range(min(prompts, len(dataset))))


def _reward_func(name: str):
    from trl import rewards

    if "." not in name:
        known = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
        if name not in known:
            raise ValueError(f"--reward_funcs: {name!r} is neither one of {known} nor an import path, module.function.")
        return getattr(rewards, name)
    module, _, attribute = name.rpartition(".")
    sys.path.insert(0, "")  # as for a program that is started in this folder
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--reward_funcs: {name!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove("")
