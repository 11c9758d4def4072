"""Subcommands that train: TRL's parser reads the arguments, TRL's launcher starts the processes."""

import signal
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from subprocess import CalledProcessError

import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.accelerate_launcher import launch_training_script

from ..seam.scripts import split_launch_arguments


def with_recipe(argv: list[str], recipes: tuple[str, ...]) -> list[str]:
    """`argv` with the file of a recipe for its name, where no file of the user's has that name."""
    return [
        str(files("trl_credit") / "recipes" / f"{value}.yaml")
        if option == "--config" and value in recipes and not Path(value).exists()
        else value
        for option, value in zip(["", *argv], argv, strict=False)
    ]


def launch(name: str, argv: list[str], script: str, method: str | None, recipes: tuple[str, ...]) -> int:
    """
    Run a training script through `accelerate launch`.

    Args:
        name (`str`):
            The subcommand.
        argv (`list[str]`):
            Its arguments: flags of the script, and of `accelerate launch`.
        script (`str`):
            Module in `trl_credit/scripts` that each process runs.
        method (`str` or `None`):
            The script's first argument, if it takes one.
        recipes (`tuple[str, ...]`):
            The recipes that `--config` takes the names of.

    Returns:
        `int`: The exit status of the training processes.
    """
    module = import_module(f"trl_credit.scripts.{script}")
    path, first = str(module.__file__), [method] if method else []
    parser = module.make_parser(*first, prog=f"trl-credit {name}")
    # Not the usage of argparse, which has hundreds of flags and comes before each error.
    parser.usage = f"{parser.prog} [--config FILE.yaml] [options of the trainer] [options of accelerate launch]"
    names = ", ".join(sorted(Path(file.name).stem for file in files("trl.accelerate_configs").iterdir()))
    or_recipe = f", or from a recipe of the package's ({', '.join(recipes)})" if recipes else ""
    parser.epilog = (
        f"`--config FILE.yaml` reads options from a file{or_recipe}; those on the command line win. "
        f"`--accelerate_config` takes the name of a config of TRL's ({names}) or a file. Any option of `accelerate "
        "launch` is one here too: `--num_processes 2`."
    )

    def launch_parser():
        launcher = launch_command_parser()
        launcher.prog, launcher.usage = parser.prog, parser.usage
        return launcher

    def run(args) -> None:
        if args.training_script != path:  # accelerate took a stray argument for the script
            parser.error(f"unrecognized arguments: {args.training_script}")
        launch_command(args)

    argv = with_recipe(argv, recipes)
    if argv and argv[-1] in ("--config", "--accelerate_config"):
        parser.error(f"argument {argv[-1]}: expected one argument")
    try:
        launch_args, script_args = split_launch_arguments(parser, argv)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))

    try:
        # TRL joins the path to that of its own scripts, which leaves an absolute one as it is.
        launch_training_script(
            path, launch_args, first + script_args, launch_command_fn=run, launch_parser_fn=launch_parser
        )
    except CalledProcessError as error:
        print(f"{parser.prog}: {_why(error.returncode)}", file=sys.stderr)
        return 1
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"{parser.prog}: {_why(failure.exitcode, f' of rank {rank}')}", file=sys.stderr)
        return 1
    return 0


def _why(status: int, of_rank: str = "") -> str:
    """What to say of a process that ended with this status; negative ones are those of signals."""
    if status >= 0:
        return "training failed, see the first error above."
    return (
        f"the process{of_rank} was killed by {signal.Signals(-status).name}, which leaves no error. Memory that ran "
        "out (`dmesg` says so) or a scheduler are the usual causes. `--resume_from_checkpoint true` goes on from the "
        "last checkpoint in `--output_dir`."
    )
