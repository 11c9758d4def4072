"""One cell of the grid: a trainer on a task, from one start model, with one seed."""

import hashlib
import json
import logging
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

from .arms import ARMS
from .evaluation import Evaluation
from .tasks import TASKS, RewardFunction, prepare, training_data


@dataclass(frozen=True)
class Cell:
    """
    What determines a run.

    Args:
        method (`str`):
            What it is called in tables.
        trainer (`str`):
            A name of `ARMS`.
        task (`str`):
            A name of `TASKS`.
        fit (`int`):
            Seed of the start model.
        seed (`int`):
            Of the training.
        tokens (`int`):
            Tokens to generate; the run ends after the update that exceeds them.
        settings (`dict`, *optional*):
            Fields of the trainer's config.
        completions (`int`, *optional*, defaults to `16`):
            Completions of a rollout.
        evaluate_every (`int`, *optional*, defaults to `5`):
            Updates between evaluations.
        evaluation_prompts (`int`, *optional*, defaults to `1024`):
            Fresh prompts that the reward is measured on.
        stop_at (`float`, *optional*):
            End the run once an evaluation reaches this reward.
    """

    method: str
    trainer: str
    task: str
    fit: int
    seed: int
    tokens: int
    settings: dict = field(default_factory=dict)
    completions: int = 16
    evaluate_every: int = 5
    evaluation_prompts: int = 1024
    stop_at: float | None = None

    def __post_init__(self):
        for name, value, known in (("trainer", self.trainer, ARMS), ("task", self.task, TASKS)):
            if value not in known:
                raise ValueError(f"There is no {name} {value!r}; there are {', '.join(known)}.")

    @property
    def key(self) -> str:
        """What its results are kept under."""
        content = asdict(self)
        del content["method"]  # a name is no setting
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def make_trainer(self, cache: Path, output: Path):
        """The trainer, its reward function, and the scoring of its policy."""
        arm = ARMS[self.trainer]
        task, folder, tokenizer = prepare(self.task, self.fit, cache)
        rewards = RewardFunction(task, tokenizer.pad_token_id)
        settings = {"num_generations": 8, **arm.settings, **self.settings}
        steps = -(-self.tokens // self.completions)  # at least one token each
        prompts = -(-self.tokens // task.completion_length // settings["num_generations"]) + self.completions
        config = arm.config(
            str(output),
            per_device_train_batch_size=self.completions,
            max_completion_length=task.completion_length,
            max_steps=steps,
            seed=self.seed,
            **{"lr_scheduler_type": "constant", **settings},
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        transformers.set_seed(self.seed)
        trainer = arm.trainer(
            model=AutoModelForCausalLM.from_pretrained(folder),
            reward_funcs=rewards,
            args=config,
            train_dataset=training_data(task, tokenizer, prompts, self.seed),
            processing_class=tokenizer,
            **({"task": task} if arm.knows_task else {}),
        )
        trainer.remove_callback(PrinterCallback)
        evaluation = Evaluation(task, AutoModelForCausalLM.from_pretrained(folder), self.evaluation_prompts, self.seed)
        return trainer, rewards, evaluation

    def run(self, cache: Path) -> pa.Table:
        """Train, and say for each evaluation what had been spent and what was reached."""
        with tempfile.TemporaryDirectory() as output:
            _, rows = self.train(cache, Path(output))
        what = {**asdict(self), "settings": json.dumps(self.settings, sort_keys=True), "cell": self.key}
        return pa.Table.from_pylist([{**what, **row} for row in rows])

    def train(self, cache: Path, output: Path):
        """Train; the trainer, and a row for each evaluation."""
        _be_quiet()
        torch.set_num_threads(1)
        trainer, rewards, evaluation = self.make_trainer(cache, output)
        curve = _Curve(self, trainer, rewards, evaluation)
        trainer.add_callback(curve)
        trainer.train()
        curve.evaluate(trainer.state.global_step)
        return trainer, curve.rows


class _Curve(TrainerCallback):
    """Evaluates now and then; the clock stands still meanwhile."""

    def __init__(self, cell: Cell, trainer, rewards: RewardFunction, evaluation: Evaluation):
        self.cell = cell
        self.trainer = trainer
        self.rewards = rewards
        self.evaluation = evaluation
        self.rows: list[dict] = []
        self.metrics: dict[str, list[float]] = {}
        self.step = 0
        self.read = 0  # tokens that went through a critic's network
        self.spent = [0.0, 0.0]
        self.since = (time.perf_counter(), time.process_time())
        critic = getattr(trainer, "critic", None)
        if isinstance(critic, torch.nn.Module):
            critic.register_forward_pre_hook(self._count_read, with_kwargs=True)

    def _count_read(self, module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.is_floating_point():  # a probe critic reads no tokens
            return
        mask = kwargs.get("attention_mask")
        self.read += ids.numel() if mask is None else int(mask.sum())

    def on_train_begin(self, args, state, control, **kwargs):
        self.since = (time.perf_counter(), time.process_time())
        self.evaluate(0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in logs.items():
            if isinstance(value, (int, float)):
                self.metrics.setdefault(name, []).append(float(value))
        if state.global_step > self.step and "critic_pretraining/step" not in logs:  # of an update of the policy
            self.step = state.global_step
            self.after_update(state, control)

    def after_update(self, state, control):
        done = self.tokens >= self.cell.tokens
        if done or state.global_step % self.cell.evaluate_every == 0:
            row = self.evaluate(state.global_step)
            done = done or (self.cell.stop_at is not None and row["reward"] >= self.cell.stop_at)
        control.should_training_stop = control.should_training_stop or done

    @property
    def tokens(self) -> int:
        return self.rewards.tokens + getattr(self.trainer, "continuation_tokens", 0)

    def evaluate(self, step: int) -> dict:
        if self.rows and self.rows[-1]["step"] == step:
            return self.rows[-1]
        now = (time.perf_counter(), time.process_time())
        self.spent = [spent + end - start for spent, end, start in zip(self.spent, now, self.since, strict=True)]
        row = {
            "step": step,
            "tokens_generated": self.tokens,
            "tokens_read": self.read + getattr(self.trainer, "critic_tokens", 0),
            "seconds": self.spent[0],
            "cpu_seconds": self.spent[1],
            **self.evaluation(self.trainer.accelerator.unwrap_model(self.trainer.model)),
            # Means since the last evaluation.
            "metrics": json.dumps({name: sum(values) / len(values) for name, values in self.metrics.items()}),
        }
        self.metrics = {}
        self.rows.append(row)
        self.since = (time.perf_counter(), time.process_time())
        return row


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


def write(table: pa.Table, path: Path) -> None:
    """A table as parquet, under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    partial.rename(path)
