"""The pretraining of a critic: rollouts of the policy, which does not move, until the critic knows it."""

from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from ...seam import CreditTrainer
from .critic_config import CriticConfig
from .symptoms import warn_of_fruitless_pretraining


# Where in a saved policy the critic lies.
CRITIC_FOLDER = "critic"
# What the pretraining is called in logs and tables.
PRETRAINING = "critic_pretraining"
_MOST_IDLE_ROLLOUTS = 10


class CriticPretraining(CreditTrainer):
    """The part of [`CriticTrainer`] that comes before the policy moves."""

    args: CriticConfig
    # Of the latest rollout; NaN when its returns do not vary.
    explained_variance: float = float("nan")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._pretraining = {"pretraining_steps": 0, "pretraining_rollouts": 0, "pretraining_done": 0}
        self._logged_pretraining = 0  # updates

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
                "`critic_pretraining_steps=0`: there is nothing to pretrain. Set it to the steps you want."
            )
        self.run_without_training(resume_from_checkpoint)
        self.save_critic(Path(str(self.args.output_dir)) / CRITIC_FOLDER)
        return dict(self._pretraining)

    def _pretrain(self, checkpoint: str | None) -> None:
        progress = self._pretraining
        steps = self.args.critic_pretraining_steps
        rollouts = self.rollouts(skip=progress["pretraining_rollouts"], checkpoint=checkpoint)
        next_save = progress["pretraining_steps"] + self.args.save_steps
        idle = 0  # rollouts in a row on which there was nothing to learn
        with self._pretraining_bar() as bar:
            while progress["pretraining_steps"] < steps:
                losses = self._pretrain_on(next(rollouts), bar)
                progress["pretraining_rollouts"] += 1
                idle = 0 if losses else idle + 1
                if idle == _MOST_IDLE_ROLLOUTS:
                    raise ValueError(
                        f"The critic's pretraining found nothing to learn in {idle} rollouts in a row: no completion "
                        "has both a reward and a token to train on. Look at the reward functions, and at "
                        "`mask_truncated_completions` beside `max_completion_length`."
                    )
                if losses and self._pretraining_is_enough(losses):
                    break
                if self.args.save_strategy == "steps" and next_save <= progress["pretraining_steps"] < steps:
                    next_save += self.args.save_steps
                    self.save_checkpoint()
        if steps:
            self._log_pretraining()
            self._announce(
                f"The critic's pretraining has ended after {progress['pretraining_steps']} updates on "
                f"{progress['pretraining_rollouts']} rollouts, with an explained variance of "
                f"{self.explained_variance:.2f} in the last."
            )
            warn_of_fruitless_pretraining(self, PRETRAINING)
        self.finish_pretraining()
        progress["pretraining_done"] = 1
        # The policy's loop begins with the random numbers of its checkpoint, so that resuming from here and going on
        # are the same.
        if steps and self.args.save_strategy != "no":
            self.save_checkpoint()

    def _pretrain_on(self, steps_of_rollout: list[list[dict]], bar) -> list[float]:
        """The updates of a rollout, as far as there are any left to make; returns their losses."""
        progress = self._pretraining
        losses: list[float] = []
        for step in steps_of_rollout:
            for _ in range(self.args.critic_updates_per_step):
                if progress["pretraining_steps"] == self.args.critic_pretraining_steps:
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

    def _pretraining_bar(self):
        done, steps = self._pretraining["pretraining_steps"], self.args.critic_pretraining_steps
        if steps:
            self._announce(
                f"The critic is pretrained for {steps} updates, {done} of which are done, on rollouts of the policy, "
                "which does not move meanwhile."
            )
        hidden = self.args.disable_tqdm or not self.is_world_process_zero() or steps == 0
        return tqdm(total=steps, initial=done, desc="Critic pretraining", disable=hidden)

    def _announce(self, text: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(text)

    def _log_pretraining(self) -> None:
        """Log what has come since the last time, at the step of the pretraining and under names of its own."""
        step = self._pretraining["pretraining_steps"]
        if step == self._logged_pretraining:
            return
        self._logged_pretraining = step
        with self.logging_pretraining():
            self.log({f"{PRETRAINING}/step": step})

    @contextmanager
    def logging_pretraining(self):
        """What is logged inside goes under names of the pretraining, at its step."""
        with self.logging_as(PRETRAINING, self._pretraining["pretraining_steps"], _name_in_pretraining):
            yield

    def finish_pretraining(self) -> None:
        """Called after the last update of the pretraining, before the critic is saved."""

    def _pretraining_is_enough(self, losses: list[float]) -> bool:
        loss, variance = (
            self.args.critic_pretraining_loss_threshold,
            self.args.critic_pretraining_explained_variance_threshold,
        )
        if loss is None and variance is None:
            return False
        return (loss is None or max(losses) <= loss) and (variance is None or self.explained_variance >= variance)


def _name_in_pretraining(name: str) -> str:
    """`critic/loss` is `critic_pretraining/loss`, and `reward` is `critic_pretraining/reward`."""
    name = name.removeprefix("critic/")
    return name if name.startswith(f"{PRETRAINING}/") else f"{PRETRAINING}/{name}"
