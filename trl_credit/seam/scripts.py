"""TRL's command line and training scripts, with our trainers in them."""

from trl import GRPOTrainer


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


def _run_script(main, name: str, trainer_class: type, *args) -> None:
    import trl

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
