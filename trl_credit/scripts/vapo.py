"""What `trl-credit vapo` runs in each process: the script of `trl grpo` with `VAPOTrainer`."""

from trl_credit import VAPOConfig, VAPOTrainer
from trl_credit.scripts import grpo_parser
from trl_credit.seam.scripts import run_grpo_script


def make_parser(prog: str | None = None):
    """The parser of `trl grpo` with the fields of this trainer's config."""
    return grpo_parser(VAPOConfig, prog)


if __name__ == "__main__":
    run_grpo_script(VAPOTrainer, *make_parser().parse_args_and_config(fail_with_unknown_args=False))
