"""What a run writes down, and what all of its processes know: the ground floor of [`CreditTrainer`]."""

import math
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from trl import GRPOTrainer

from ..credit_log.log import CreditLog
from .config import CreditConfig
from .versions import check_trainer


class RecordingSeam(GRPOTrainer):
    """The part of [`CreditTrainer`] that logs."""

    args: CreditConfig
    model: Any  # DDP, a DeepSpeed engine, an FSDP module, a PEFT model, ...
    _credit_log: CreditLog | None = None
    _loss: Any = None  # what is known of the loss being computed

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_trainer(self)
        self._sums: dict[str, dict] = {"train": {}, "eval": {}}  # of metrics, see `log_means`
        # Of each reward function its rewards per token of the latest rollout: {row of this process: list}.
        self._token_scores: list[dict[int, Any]] = [{} for _ in self.reward_funcs]

    def log_value(self, mode: str, name: str, value: float) -> None:
        """
        Log a number; the log shows the mean of those since the last one. What is logged is the main process's: let it
        be a number that is the same on all, or one that each has of its own, as seconds.
        """
        self._metrics[mode][name].append(value)

    def add_column(self, name: str, values: list) -> None:
        """Add a column to the completions table, with this process's values of the latest rollout."""
        if self.log_completions:
            extra: Any = self._logs["extra"]
            extra[name].extend(gather_object(values))

    @property
    def logs_credit(self) -> bool:
        """Whether completions of this process's rollout go into the credit log: when to make a costly column."""
        return self._credit_log is not None and self._mode == "train" and self._credit_log.is_collecting

    def add_credit(self, name: str, values) -> None:
        """
        Add a column to the credit log; nothing happens without one. Call it in `assign_credit` or in `shape_loss`.

        Args:
            name (`str`):
                Its name, e.g. `value` or `weight`.
            values (`torch.Tensor` or `list`):
                A number per token, shape `(B, T)`, or per completion, shape `(B,)`; or, in `assign_credit`, a list of
                anything that parquet can hold, one per completion.
        """
        if self._credit_log is not None and self._mode == "train":
            self._credit_log.add(name, values, None if self._loss is None else self._loss.inputs)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        return self.accelerator.reduce(x, reduction="sum")

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max().item())

    def log_means(self, mode: str, sums_and_counts: dict[str, tuple]) -> None:
        """
        Log `sum / count` of each metric, over all micro-batches and processes since the last log: a mean over tokens,
        not one over micro-batches. A metric that counts nothing is left out.
        """
        for name, sum_and_count in sums_and_counts.items():
            pair = torch.stack([torch.as_tensor(x, dtype=torch.float32).detach() for x in sum_and_count])
            self._sums[mode][name] = self._sums[mode].get(name, 0) + pair.to(self.accelerator.device)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _rollout_parts(self) -> int:
        assert self.args.steps_per_generation is not None  # set by `GRPOConfig`
        return self.args.steps_per_generation

    @property
    def _losses_of_rollout(self) -> int:
        """How often a micro-batch of it is trained on, all iterations together."""
        return self._rollout_parts * self.num_iterations

    def _steps_of(self, micro_batches: list[dict]) -> list[list[dict]]:
        size = self.args.gradient_accumulation_steps
        return [micro_batches[start : start + size] for start in range(0, len(micro_batches), size)]

    @property
    def _context(self) -> float:
        """Most tokens that the policy reads, prompt and completion together; infinite if its config names none."""
        return getattr(self._causal_lm().config.get_text_config(), "max_position_embeddings", None) or math.inf

    def _causal_lm(self):
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model
