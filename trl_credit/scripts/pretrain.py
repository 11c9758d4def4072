"""
What `trl-credit pretrain-critic` and `genac-pretrain` run in each process: the training of a method with a critic, up
to where the policy moves. The method is the first argument.
"""

import sys
from pathlib import Path

from trl_credit.critics.card import push_critic
from trl_credit.scripts.train import main, make_parser
from trl_credit.trainers.critic.critic_trainer import CRITIC_FOLDER, CriticTrainer


__all__ = ["make_parser", "pretrainer"]


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


def pretrainer(trainer_class: type) -> type:
    """The pretraining of a trainer's critic, as a trainer."""
    if not issubclass(trainer_class, CriticTrainer):
        raise SystemExit(f"{trainer_class.__name__} has no critic to pretrain.")
    return type(trainer_class.__name__.replace("Trainer", "Pretrainer"), (CriticPretrainer, trainer_class), {})


if __name__ == "__main__":
    main(sys.argv[1:], pretrainer)
