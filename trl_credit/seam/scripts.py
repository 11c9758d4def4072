"""TRL's command line and training scripts, with our trainers in them."""

from pathlib import Path

from trl import GRPOTrainer
from trl.scripts.utils import DatasetConfig


# What `datasets` reads a file with, by how its name ends.
FILE_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def split_launch_arguments(parser, argv: list[str]) -> tuple[list[str], list[str]]:
    """
    Tell the arguments of `accelerate launch` from those of a training script, and check the latter.

    Args:
        parser ([`~trl.TrlParser`]):
            The script's parser.
        argv (`list[str]`):
            Arguments of both, among them any `--config` file, which may hold both too.

    Returns:
        `tuple[list[str], list[str]]`: Those of `accelerate launch`, `--accelerate_config` resolved, and the script's.
    """
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence

    *_, from_file, from_argv = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    return resolve_accelerate_config_argument(from_file + from_argv), _subtract_subsequence(argv, from_argv)


def run_grpo_script(trainer_class: type[GRPOTrainer], *args) -> None:
    """
    Run the script of `trl grpo` with another trainer: datasets, rewards, quantization, PEFT, resuming and the Hub are
    TRL's code.

    Args:
        trainer_class (`type[GRPOTrainer]`):
            The trainer.
        args:
            The script's arguments as its parser returns them.
    """
    from trl.scripts.grpo import main

    _run_script(main, "GRPOTrainer", trainer_class, *args)


def run_sft_script(trainer_class: type, *args) -> None:
    """The same with the script of `trl sft` and a subclass of [`~trl.SFTTrainer`]."""
    from trl.scripts.sft import main

    _run_script(main, "SFTTrainer", trainer_class, *args)


def reader_of(dataset_name: str | None) -> str | None:
    """
    What reads the file that a `--dataset_name` names.

    Args:
        dataset_name (`str`, *optional*):
            A file, or a folder or id of the Hub.

    Returns:
        `str`: A path for `load_dataset`, which takes the file as `data_files`; `None` if this names no file.

    Raises:
        FileNotFoundError: If it is the name of a file, and there is none.
    """
    name = Path(dataset_name or "")
    reader = None if name.is_dir() else FILE_READERS.get(name.suffix)
    if reader is not None and not name.is_file():
        raise FileNotFoundError(f"--dataset_name: there is no file {dataset_name}.")
    return reader


def _take_file(script_args, dataset_args) -> None:
    """TRL's scripts load a folder or an id by its name, and a file only as part of a mixture."""
    reader = None if dataset_args.datasets else reader_of(script_args.dataset_name)
    if reader is not None:
        dataset_args.datasets = [DatasetConfig(path=reader, data_files=script_args.dataset_name)]
        dataset_args.streaming |= script_args.dataset_streaming
        script_args.dataset_name = None


def _run_script(main, name: str, trainer_class: type, *args) -> None:
    import trl

    _take_file(args[0], args[-1])

    # `main` imports the trainer from `trl` when it is called. If it got it in any other way, it would train TRL's own
    # without a word.
    if name not in main.__code__.co_varnames:
        raise ImportError(f"`{main.__module__}.main` no longer imports `{name}` when it is called.")
    original = getattr(trl, name)
    setattr(trl, name, trainer_class)
    try:
        main(*args)
    finally:
        setattr(trl, name, original)
