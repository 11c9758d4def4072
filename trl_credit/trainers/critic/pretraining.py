"""The pretraining of a critic: rollouts of the policy, which does not move, until the critic knows it."""

import math
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ...credit.fit import explained_variance
from ...critics.engine.engine import CriticEngine, seeded
from ...seam import CreditTrainer
from .critic_config import CriticConfig
from .stored_rollouts import Passes, StoredRollouts, facts_of
from .symptoms import warn_of_fruitless_pretraining


# Where in a saved policy the critic lies.
CRITIC_FOLDER = "critic"
# What the pretraining is called in logs and tables.
PRETRAINING = "critic_pretraining"
# And what the writing of its rollouts is called.
WRITING = "critic_pretraining_rollouts"
# In the output directory, while the critic is pretrained; no part of what is pushed to the Hub.
BEST_CRITIC_FOLDER = "_best_critic"
_MOST_IDLE_ROLLOUTS = 10
_NO_ERROR_YET = {"lowest": math.inf, "since": 0}
logger = get_logger(__name__)


class CriticPretraining(CreditTrainer):
    """The part of [`CriticTrainer`] that comes before the policy moves."""

    args: CriticConfig
    # Of the latest rollout; NaN when its returns do not vary.
    explained_variance: float = float("nan")

    critic_kind: str

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._pretraining: dict[str, Any] = {"pretraining_steps": 0, "pretraining_rollouts": 0, "pretraining_done": 0}
        self._logged_pretraining = 0  # updates
        self._stored: StoredRollouts | None = None
        self._passes: Passes | None = None  # over the stored rollouts, once they are there
        if self.args.critic_pretraining_rollouts is not None:
            order = {name: getattr(self.args, name) for name in ("seed", "shuffle_dataset", "generation_batch_size")}
            order["num_processes"] = self.accelerator.num_processes
            folder = Path(self.args.critic_pretraining_rollouts)
            self._stored = StoredRollouts(folder, facts_of(self), order)
            self._pretraining |= {"pretraining_most_steps": 0, **_NO_ERROR_YET}

    @property
    def engine(self) -> CriticEngine:
        """What trains the critic."""
        raise NotImplementedError

    def critic_fit(self, rollout: dict, rewards: torch.Tensor) -> torch.Tensor:
        """
        How well the critic knows what a rollout earned, as [`~trl_credit.credit.fit.fit_sums`], shape `(B, 5)`.

        Args:
            rollout (`dict`), rewards (`torch.Tensor`):
                As [`CreditTrainer.assign_credit`] takes them.
        """
        raise NotImplementedError

    def update_critic(self, micro_batches: list[dict], prefix: str = "critic") -> dict[str, float] | None:
        """One update on the micro-batches of an optimizer step; `None` if nothing in them counts."""
        raise NotImplementedError

    def save_critic(self, folder: str | Path) -> None:
        """Save the critic in plain `save_pretrained` form. Every process must call this."""
        raise NotImplementedError

    def pretrain_critic(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, int]:
        """
        Fit the critic to rollouts of the policy, which does not move, for `critic_pretraining_steps` updates, and save
        it in the folder `critic` of `output_dir`. Give that folder to a later run as its `critic`, with
        `critic_pretraining_steps=0`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Continue from a checkpoint of an interrupted pretraining, as in [`~transformers.Trainer.train`].

        Returns:
            `dict`: The number of `pretraining_steps` and `pretraining_rollouts` made.
        """
        if self.args.critic_pretraining_steps == 0:
            raise ValueError(
                "`critic_pretraining_steps=0`: there is nothing to pretrain. Set it to the steps you want. (A probe "
                "critic has no pretraining: it learns from the rollouts that the policy learns from.)"
            )
        self.run_without_training(resume_from_checkpoint)
        self.save_critic(Path(str(self.args.output_dir)) / CRITIC_FOLDER)
        return dict(self._pretraining)

    def updates_of_pretraining(self, is_resumed: bool) -> int:
        """Updates before the policy moves, at most. Rollouts that are to be stored, and are not, are written here."""
        progress = self._pretraining
        if progress["pretraining_done"] and not is_resumed:  # in an earlier training
            return 0
        if self._stored is None:
            return self.args.critic_pretraining_steps
        if not progress["pretraining_done"]:
            self._passes = self._store_rollouts(self._stored)
            rollouts = len(self._passes) * self.args.critic_pretraining_epochs
            progress["pretraining_most_steps"] = rollouts * self._updates_of_rollout
        return progress["pretraining_most_steps"]

    def _pretrain(self, checkpoint: str | None, steps: int) -> None:
        progress, passes = self._pretraining, self._passes
        done = progress["pretraining_rollouts"]
        if passes is None:
            rollouts = self.rollouts(skip=done, checkpoint=checkpoint)
        else:
            rollouts = self.rollouts_of(self._taken_up(passes, done), skip=done, checkpoint=checkpoint)
        next_save = progress["pretraining_steps"] + self.args.save_steps
        idle = 0  # rollouts in a row on which there was nothing to learn
        with self._pretraining_bar(steps) as bar, self._tables_only_of_new_rollouts():
            while progress["pretraining_steps"] < steps and (steps_of_rollout := next(rollouts, None)) is not None:
                losses = self._pretrain_on(steps_of_rollout, steps, bar)
                progress["pretraining_rollouts"] += 1
                idle = 0 if losses else idle + 1
                if idle == _MOST_IDLE_ROLLOUTS:
                    raise ValueError(
                        f"The critic's pretraining found nothing to learn in {idle} rollouts in a row: no completion "
                        "has both a reward and a token to train on. Look at the reward functions, and at "
                        "`mask_truncated_completions` beside `max_completion_length`."
                    )
                if self._pass_was_enough() if passes is not None else losses and self._pretraining_is_enough(losses):
                    break
                if self.args.save_strategy == "steps" and next_save <= progress["pretraining_steps"] < steps:
                    next_save += self.args.save_steps
                    self.save_checkpoint()
        if steps:
            self._log_pretraining()
            result = f"with an explained variance of {self.explained_variance:.2f} in the last"
            if passes is not None and passes.held_out:
                best = progress["pretraining_rollouts"] // len(passes) - progress["since"]
                result = f"the best on what is held out, with an error of {progress['lowest']:.4g}, after pass {best}"
            self._announce(
                f"The critic's pretraining has ended after {progress['pretraining_steps']} updates on "
                f"{progress['pretraining_rollouts']} rollouts, {result}."
            )
            warn_of_fruitless_pretraining(self, PRETRAINING)
        self.finish_pretraining()
        progress["pretraining_done"] = 1
        # The policy's loop begins with the random numbers of its checkpoint, so that resuming from here and going on
        # are the same.
        if steps and self.args.save_strategy != "no":
            self.save_checkpoint()

    def _pretrain_on(self, steps_of_rollout: list[list[dict]], most: int, bar) -> list[float]:
        """The updates of a rollout, as far as there are any left to make; returns their losses."""
        progress = self._pretraining
        losses: list[float] = []
        for step in steps_of_rollout:
            for _ in range(self.args.critic_updates_per_step):
                if progress["pretraining_steps"] == most:
                    return losses
                result = self.update_critic(step, PRETRAINING)
                if result is None:  # nothing counts in it
                    break
                losses.append(result["loss"])
                progress["pretraining_steps"] += 1
                bar.update()
                bar.set_postfix(explained_variance=f"{self.explained_variance:.2f}")
                if progress["pretraining_steps"] % max(int(self.args.logging_steps), 1) == 0:
                    self._log_pretraining()
        return losses

    def _pretraining_bar(self, steps: int):
        done = self._pretraining["pretraining_steps"]
        if steps and self._passes is None:
            self._announce(
                f"The critic is pretrained for {steps} updates, {done} of which are done, on rollouts of the policy, "
                "which does not move meanwhile."
            )
        elif self._passes is not None:
            self._announce(
                f"The critic is pretrained for up to {self.args.critic_pretraining_epochs} passes over stored "
                f"rollouts, {len(self._passes)} each, which are {steps} updates, {done} of which are done."
            )
        return self._bar("Critic pretraining", done, steps)

    def _bar(self, name: str, done: int, total: int):
        hidden = self.args.disable_tqdm or not self.is_world_process_zero() or total == 0
        return tqdm(total=total, initial=done, desc=name, disable=hidden)

    def _announce(self, text: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(text)

    def _log_pretraining(self, **numbers: float) -> None:
        """Log what has come since the last time, at the step of the pretraining and under names of its own."""
        step = self._pretraining["pretraining_steps"]
        if step == self._logged_pretraining and not numbers:
            return
        self._logged_pretraining = step
        with self.logging_pretraining():
            self.log({f"{PRETRAINING}/step": step, **numbers})

    @contextmanager
    def logging_pretraining(self):
        """What is logged inside goes under names of the pretraining, at its step."""
        with self.logging_as(PRETRAINING, self._pretraining["pretraining_steps"], partial(_name_in, PRETRAINING)):
            yield

    # --- Stored rollouts

    def _store_rollouts(self, stored: StoredRollouts) -> Passes:
        """The rollouts that as many updates need without any pass but the first; what is not there is written."""
        args = self.args
        assert args.generation_batch_size is not None and args.num_generations is not None
        rollouts = -(-args.critic_pretraining_steps // self._updates_of_rollout)
        wanted = rollouts * args.generation_batch_size
        if stored.completions < wanted:
            stored.refuse_more(wanted)
            self._write_rollouts(stored, rollouts)
        if stored.completions < wanted:
            raise ValueError(
                f"Process {self.accelerator.process_index} does not see all rollouts in "
                f"`critic_pretraining_rollouts={args.critic_pretraining_rollouts!r}`: it must be a folder that all "
                "processes share."
            )
        data = stored.read(wanted)
        return Passes(
            data, args.num_generations, args.generation_batch_size, args.critic_pretraining_held_out, args.seed
        )

    def _write_rollouts(self, stored: StoredRollouts, rollouts: int) -> None:
        done, every = len(stored), max(int(self.args.logging_steps), 1)
        self._announce(f"Rollouts of the policy are written to {stored.folder}: {rollouts}, {done} of which are there.")
        self.accelerator.wait_for_everyone()  # before the first grows the folder
        samples, processes = self.samples(skip=done), self.accelerator.num_processes
        with self._bar("Rollouts for the critic", done, rollouts) as bar:
            for number in range(done, rollouts):
                # Each has random numbers of its own: whoever goes on here writes the same.
                with seeded(self.args.seed + number * processes + self.accelerator.process_index):
                    everywhere = gather_object(next(samples))
                if self.accelerator.is_main_process:
                    stored.append(everywhere)
                bar.update()
                if (number + 1) % every == 0 or number + 1 == rollouts:
                    with self.logging_as(WRITING, number + 1, partial(_name_in, WRITING)):
                        self.log({f"{WRITING}/step": number + 1})
        self.accelerator.wait_for_everyone()

    def _taken_up(self, passes: Passes, skip: int):
        """What is left of all passes."""
        first, within = divmod(skip, len(passes))
        for number in range(first, self.args.critic_pretraining_epochs):
            for rows in passes.numbered(number)[within:]:
                yield self._take_up_share(passes, rows)
            within = 0

    def _take_up_share(self, passes: Passes, rows: list[int]) -> tuple[dict, torch.Tensor]:
        size = len(rows) // self.accelerator.num_processes
        start = size * self.accelerator.process_index
        return self.take_up(*passes.share(rows, start, start + size))

    def _pass_was_enough(self) -> bool:
        """At the end of a pass, whether the critic has stopped getting better at what is held out."""
        progress, passes = self._pretraining, self._passes
        assert passes is not None
        number, within = divmod(progress["pretraining_rollouts"], len(passes))
        if within or not passes.held_out:
            return False
        rollouts = (self._take_up_share(passes, rows) for rows in passes.of_held_out())
        sums = torch.cat([self.accelerator.gather(self.critic_fit(*rollout)) for rollout in rollouts])
        if not sums[:, 0].any():
            raise ValueError(
                f"None of the {len(passes.held_out) * passes.num_generations} completions that are held out has a "
                "reward: there is nothing to tell when the critic stops getting better. Look at the reward functions, "
                "or set `critic_pretraining_held_out=0`."
            )
        error = (sums[:, 4].sum() / sums[:, 0].sum()).item()
        numbers = {"error": error, "explained_variance": explained_variance(sums)}
        if self.critic_kind != "prompt" and passes.num_generations > 1:
            groups = torch.arange(len(sums), device=sums.device) // passes.num_generations
            numbers["explained_variance_within_prompt"] = explained_variance(sums, groups)
        known = {f"held_out_{name}": x for name, x in numbers.items() if not math.isnan(x)}
        self._log_pretraining(**{"pass": number, **known})
        return self.keep_the_best(error, progress, self.args.critic_pretraining_patience)

    @contextmanager
    def _tables_only_of_new_rollouts(self):
        """A completion is in the tables once: when it is generated."""
        log_completions = self.log_completions
        self.log_completions = log_completions and self._passes is None
        try:
            yield
        finally:
            self.log_completions = log_completions

    @property
    def _updates_of_rollout(self) -> int:
        steps = self._rollout_parts // self.args.gradient_accumulation_steps
        return steps * self.args.critic_updates_per_step

    # --- The best critic

    @property
    def _best_critic(self) -> Path:
        return Path(str(self.args.output_dir)) / BEST_CRITIC_FOLDER

    def keep_the_best(self, error: float, standing: dict[str, Any], patience: int | None) -> bool:
        """
        Keep the critic if no error was lower.

        Args:
            error (`float`):
                Of the critic as it is.
            standing (`dict`):
                The `lowest` error so far, and how many evaluations have brought no lower one `since`; both are updated.
            patience (`int` or `None`):
                How many such evaluations there may be.

        Returns:
            `bool`: Whether there were as many.
        """
        if error < standing["lowest"]:
            standing.update(lowest=error, since=0)
            self.engine.save(self._best_critic)
            self.engine.save_state(self._best_critic)
        else:
            standing["since"] += 1
        return patience is not None and standing["since"] >= patience

    def go_back_to_the_best(self, standing: dict[str, Any]) -> None:
        """Restore the critic with the lowest error, unless it is the last one."""
        if not standing["since"]:
            return
        if self._best_critic.is_dir():
            self.engine.go_back(self._best_critic, self._best_critic)
        else:
            logger.warning(
                "The best critic of the pretraining, with an error of %s, is not in %s: the last one is kept.",
                standing["lowest"],
                self._best_critic,
            )

    def drop_the_best(self) -> None:
        """Delete what `keep_the_best` has kept. Every process must call this."""
        self.accelerator.wait_for_everyone()  # all have read it
        if self.accelerator.is_main_process:
            shutil.rmtree(self._best_critic, ignore_errors=True)

    def finish_pretraining(self) -> None:
        """Called after the last update of the pretraining, before the critic is saved."""
        if self._passes is not None:
            self.go_back_to_the_best(self._pretraining)

    def _pretraining_is_enough(self, losses: list[float]) -> bool:
        loss, variance = (
            self.args.critic_pretraining_loss_threshold,
            self.args.critic_pretraining_explained_variance_threshold,
        )
        if loss is None and variance is None:
            return False
        return (loss is None or max(losses) <= loss) and (variance is None or self.explained_variance >= variance)


def _name_in(stage: str, name: str) -> str:
    """`critic/loss` is `critic_pretraining/loss`, and `reward` is `critic_pretraining/reward`."""
    name = name.removeprefix("critic/")
    return name if name.startswith(f"{stage}/") else f"{stage}/{name}"
