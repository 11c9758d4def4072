"""Where a run begins, or goes on: checkpoints that are whole or absent, and what TRL leaves out of them."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, send_to_device
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..saved import MANIFEST, differences, finish_moves, put_in_place, read_tensors, write_manifest


# In the output directory, while a checkpoint is being saved; no part of what is pushed to the Hub.
UNFINISHED_FOLDER = "_unfinished"
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


class FinishStep(TrainerCallback):
    """Calls [`CreditTrainer.finish_step`] when the policy has made its step and forgotten its gradient."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        step, self.trainer._step_inputs = self.trainer._step_inputs, []
        self.trainer.finish_step(step)


@contextmanager
def saved_whole(place: Path, trainer):
    """
    Save a checkpoint beside its place and move it there when all of it is on the disk. If that fails, what was there
    before stays. Every process must call this.

    Args:
        place (`Path`):
            Where the checkpoint is to be: `checkpoint-…` in the output directory.
        trainer ([`CreditTrainer`]):
            The trainer.

    Yields:
        `Path`: The folder to save it in.

    Raises:
        OSError: If it cannot be saved, with the last checkpoint that is whole.
    """
    accelerator = trainer.accelerator
    beside = place.parent / UNFINISHED_FOLDER
    if accelerator.is_local_main_process:  # each node may have a disk of its own
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    trainer._saved_beside = beside
    try:
        yield beside / place.name
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_manifest(beside / place.name)
            put_in_place(beside / place.name, place)
        accelerator.wait_for_everyone()
        if accelerator.is_local_main_process and (beside / place.name).is_dir():  # not the main process's disk
            put_in_place(beside / place.name, place)
    except Exception as error:
        if accelerator.is_local_main_process:
            shutil.rmtree(beside, ignore_errors=True)
        last = get_last_checkpoint(place.parent) if place.parent.is_dir() else None
        raise OSError(
            f"{place} could not be saved ({type(error).__name__}: {error}), and nothing of it is left. "
            + (f"{last} is whole: resume from there" if last else "There is no checkpoint yet: begin again")
            + f" when the cause is gone. On this disk {shutil.disk_usage(place.parent).free / 2**30:.1f} GiB are free."
        ) from error
    finally:
        trainer._saved_beside = None


def checkpoint_to_resume(trainer, asked: str | bool | None) -> str | None:
    """
    The checkpoint that a run is to go on from, which is whole. Every process must call this.

    Args:
        trainer ([`CreditTrainer`]):
            The trainer.
        asked (`str`, `bool` or `None`):
            `resume_from_checkpoint`: a folder, or `True` for the last one in the output directory. The texts `"true"`
            and `"false"`, as they come from a command line, mean the same.

    Raises:
        ValueError: If there is none, or a part of it is missing or was changed.
    """
    if isinstance(asked, str) and asked.lower() in ("true", "false"):
        asked = asked.lower() == "true"
    if not asked:
        return None
    run = Path(str(trainer.args.output_dir)) if asked is True else Path(asked).parent
    problem: list = [None]
    if trainer.accelerator.is_local_main_process:
        finish_moves(run / UNFINISHED_FOLDER, run)
    trainer.accelerator.wait_for_everyone()
    folder = (get_last_checkpoint(run) if run.is_dir() else None) if asked is True else asked
    if trainer.accelerator.is_main_process:
        problem = [_why_not(folder, run, asked)]
    if broadcast_object_list(problem)[0] is not None:  # so that all processes stop
        raise ValueError(problem[0])
    return folder


def _why_not(folder: str | None, run: Path, asked: str | bool) -> str | None:
    """Why a run cannot go on from a checkpoint, `None` if it can."""
    if folder is None:
        return (
            f"`resume_from_checkpoint=True` goes on from the last checkpoint of `output_dir`, and {run} has none. "
            "Leave it out to begin anew, or set `output_dir` to that of the run."
        )
    if not Path(folder).is_dir():
        return (
            f"`resume_from_checkpoint={asked!r}` is no folder. Give that of a checkpoint, or `true` for the last one "
            "in `output_dir`."
        )
    wrong = differences(Path(folder))
    if not (Path(folder) / TRAINER_STATE_NAME).is_file():
        wrong = [f"{TRAINER_STATE_NAME}, which is saved last, is missing"]
    if not wrong:
        return None
    others = sorted(str(path.parent) for path in run.glob(f"checkpoint-*/{TRAINER_STATE_NAME}"))
    others = [path for path in others if Path(path) != Path(folder)]
    return (
        f"{folder} is not whole: {'; '.join(wrong)}. Resume from another checkpoint"
        + (f" ({', '.join(others)})" if others else "")
        + f", or copy this one again. If you changed files yourself, delete its {MANIFEST}."
    )


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
            rollout = read_tensors(file)
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
