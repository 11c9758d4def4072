"""What `trl-credit pretrain-critic` runs in each process: `trl-credit vapo`, up to where the policy moves."""

from pathlib import Path

from trl_credit import VAPOConfig, VAPOTrainer
from trl_credit.critics.card import push_critic
from trl_credit.scripts import grpo_parser
from trl_credit.seam.scripts import run_grpo_script
from trl_credit.trainers.critic.critic_trainer import CRITIC_FOLDER, CriticTrainer


class CriticPretrainer(CriticTrainer):
    """A trainer whose training is the pretraining; what it saves and publishes is the critic."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        return self.pretrain_critic(resume_from_checkpoint)

    def save_model(self, output_dir=None, _internal_call=False):
        if _internal_call:  # of a checkpoint, which has to hold the policy too
            super().save_model(output_dir, _internal_call)

    def push_to_hub(self, *args, **kwargs):
        if self.accelerator.is_main_process:
            repo = str(self.args.critic_hub_model_id or self.hub_model_id)
            push_critic(Path(str(self.args.output_dir)) / CRITIC_FOLDER, repo, self.args)


class VAPOPretrainer(CriticPretrainer, VAPOTrainer):
    """The pretraining of VAPO's critic."""


def make_parser(prog: str | None = None):
    """The parser of `trl grpo` with the fields of this trainer's config."""
    return grpo_parser(VAPOConfig, prog)


if __name__ == "__main__":
    run_grpo_script(VAPOPretrainer, *make_parser().parse_args_and_config(fail_with_unknown_args=False))
