"""What `trl-credit genac-pretrain` runs in each process: `trl-credit genac`, up to where the policy moves."""

from trl_credit import GenACConfig, GenACTrainer
from trl_credit.scripts import grpo_parser
from trl_credit.scripts.pretrain_critic import CriticPretrainer
from trl_credit.seam.scripts import run_grpo_script


class GenACPretrainer(CriticPretrainer, GenACTrainer):
    """The pretraining of GenAC's critic."""


def make_parser(prog: str | None = None):
    """The parser of `trl grpo` with the fields of this trainer's config."""
    return grpo_parser(GenACConfig, prog)


if __name__ == "__main__":
    run_grpo_script(GenACPretrainer, *make_parser().parse_args_and_config(fail_with_unknown_args=False))
