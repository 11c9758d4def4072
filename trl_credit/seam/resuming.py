"""Where a run begins, or goes on: what TRL leaves out of it."""

from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from torch.utils.data import Sampler
from transformers import TrainerCallback


logger = get_logger(__name__)


class BeginTraining(TrainerCallback):
    """Calls [`CreditTrainer.begin_training`] when the policy is on its devices."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        checkpoint, self.trainer._resume_from = self.trainer._resume_from, None
        self.trainer._step_inputs = []
        if checkpoint is not None:
            resume_rollout(self.trainer, Path(checkpoint))
        if self.trainer._credit_log is not None:
            self.trainer._credit_log.begin_training(resumed=checkpoint is not None)
        self.trainer.begin_training(checkpoint)

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer._credit_log is not None:
            self.trainer._credit_log.write()


def save_rollout(trainer, folder: Path) -> None:
    """Save what is left to do with a rollout in a checkpoint between two of its steps. Every process must call this."""
    if trainer._step % trainer._losses_of_rollout:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"step": trainer._step, "micro_batches": trainer._buffered_inputs}, _rollout_file(trainer, folder))


def resume_rollout(trainer, folder: Path) -> None:
    """Go on with the rollout of a checkpoint between two of its steps, which TRL would generate anew."""
    trainer._step, trainer._buffered_inputs = 0, None
    file = _rollout_file(trainer, folder)
    if file.is_file():
        with torch.serialization.safe_globals(list(trainer.rollout_types)):
            rollout = torch.load(file, map_location="cpu", weights_only=True)
        if len(rollout["micro_batches"]) == trainer._rollout_parts:
            trainer._step = rollout["step"]
            trainer._buffered_inputs = send_to_device(rollout["micro_batches"], trainer.accelerator.device)
            return
    if trainer.state.global_step * trainer.args.gradient_accumulation_steps % trainer._losses_of_rollout:
        logger.warning(
            f"{folder} was made between two steps of a rollout and holds none that {trainer.accelerator.num_processes} "
            f"processes with `steps_per_generation={trainer._rollout_parts}` could go on with: it is generated anew. "
            "The run is another from here."
        )


def _rollout_file(trainer, folder: Path) -> Path:
    accelerator = trainer.accelerator
    return folder / f"rollout_{accelerator.process_index}_of_{accelerator.num_processes}.pt"


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
