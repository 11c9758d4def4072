"""The `trl-credit` command. Each subcommand is imported when it runs, so that `trl-credit --help` is instant."""

import sys
from argparse import ArgumentParser
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple

from ..methods import METHODS


class Training(NamedTuple):
    """A subcommand that trains: what it does, and what [`launch`] is told."""

    help: str
    script: str
    method: str | None = None
    recipes: tuple[str, ...] = ()


_TRAINING = {name: Training(row.help, "train", name, row.recipes) for name, row in METHODS.items()} | {
    "genac-traces": Training(
        "Stage 1 of GenAC: sample partial solutions, and ask an oracle to reason about their value",
        "genac_traces",
        recipes=METHODS["genac"].recipes,
    ),
    "genac-sft": Training("Stage 1 of GenAC: fit the critic to the oracle's traces", "genac_sft"),
    "genac-pretrain": Training(
        "Stage 2 of GenAC: train the critic by REINFORCE on rollouts of a policy that does not move",
        "pretrain",
        "genac",
        METHODS["genac"].recipes,
    ),
    "pretrain-critic": Training(
        "Fit a critic to a policy that does not move, to be used by later runs",
        "pretrain",
        "vapo",
        METHODS["vapo"].recipes,
    ),
}
# All others: the module whose `main(argv)` they are.
_OTHERS = {
    "inspect": ("trl_credit.cli.inspect", "Write a page that shows what each token of a run's completions was given"),
    "quickstart": ("trl_credit.toy", "Build a small language model that reasons, train it and show the gain"),
    "critic-report": ("trl_credit.cli.critic_report", "Measure what critics know, against Monte-Carlo truth"),
    "plan": ("trl_credit.cli.plan", "Say how much memory a run will take and where its time will go, before it starts"),
    "env": ("trl_credit.cli.env", "Print versions and what is installed, for a bug report"),
}


def main(argv: list[str] | None = None) -> int:
    """
    Run the `trl-credit` command.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.

    Returns:
        `int`: The exit status.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = ArgumentParser(
        prog="trl-credit",
        description="Train language models with fine-grained credit assignment, on top of HuggingFace TRL.",
        epilog="`trl-credit COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=version("trl-credit"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    texts = {name: row.help for name, row in _TRAINING.items()} | {name: text for name, (_, text) in _OTHERS.items()}
    for name, text in texts.items():
        commands.add_parser(name, help=text, add_help=False)

    name = parser.parse_args(argv[:1]).command
    if name is None:
        parser.print_help()
        return 0
    if name in _TRAINING:
        from .launch import launch

        training = _TRAINING[name]
        return launch(name, argv[1:], training.script, training.method, training.recipes)
    return import_module(_OTHERS[name][0]).main(argv[1:]) or 0
