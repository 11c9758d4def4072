"""Where a run begins, or goes on: what TRL leaves out of it."""

from torch.utils.data import Sampler
from transformers import TrainerCallback


class BeginTraining(TrainerCallback):
    """Calls [`CreditTrainer.begin_training`] when the policy is on its devices."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        checkpoint, self.trainer._resume_from = self.trainer._resume_from, None
        self.trainer._step_inputs = []
        if self.trainer._credit_log is not None:
            self.trainer._credit_log.begin_training(resumed=checkpoint is not None)
        self.trainer.begin_training(checkpoint)

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer._credit_log is not None:
            self.trainer._credit_log.write()


class ResumableSampler(Sampler):
    """
    TRL's sampler, with the order of a resumed run's epoch that of the run itself: its random numbers go on from epoch
    to epoch, and TRL begins with those of the first.
    """

    def __init__(self, sampler: Sampler, trainer):
        self.sampler, self.trainer, self.epochs_begun = sampler, trainer, 0

    def __len__(self):
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self):
        while self.epochs_begun < int(self.trainer.state.epoch or 0):
            next(iter(self.sampler), None)
            self.epochs_begun += 1
        self.epochs_begun += 1
        return iter(self.sampler)
