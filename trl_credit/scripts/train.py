"""
What `trl-credit <method>` runs in each process: the script of `trl grpo` with the trainer of a method. The method is
the first argument.

    accelerate launch -m trl_credit.scripts.train vapo --model_name_or_path ...
"""

import sys

from trl_credit.methods import METHODS
from trl_credit.scripts import grpo_parser
from trl_credit.seam.scripts import run_grpo_script


def make_parser(method: str, prog: str | None = None):
    """The parser of `trl grpo` with the fields of a method's config."""
    return grpo_parser(METHODS[method].load()[0], prog)


def main(argv: list[str], trainer_of=lambda trainer_class: trainer_class) -> None:
    """
    Train.

    Args:
        argv (`list[str]`):
            The method, and the options of its parser.
        trainer_of (`Callable`, *optional*):
            What is made of the method's trainer first.
    """
    method, options = (argv or ["no method"])[0], argv[1:]
    if method not in METHODS:
        raise SystemExit(f"{method!r} is none of the methods {', '.join(METHODS)}, which the first argument must be.")
    trainer_class = trainer_of(METHODS[method].load()[1])
    arguments = make_parser(method).parse_args_and_config(options, fail_with_unknown_args=False)
    run_grpo_script(trainer_class, *arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
