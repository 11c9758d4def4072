"""
The credit log: what each token of some rollouts was given, as one parquet file a rollout, for `trl-credit inspect`.

Two moments fill a table. When a rollout is made its advantages and values are known; when it is trained on, its
log-probabilities, entropies, ratios and trace weights. Of several updates on one rollout the last one is kept, so a
ratio says how far the policy had moved from the one that sampled the completion when it last learned from it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..segmenting import token_texts
from .reader import CREDIT_FOLDER


# By its key in a rollout each completion finds its row in the table again, shuffled and split as the rollout is.
ROW_KEY = "credit_row"


class CreditLog:
    """
    Collects the table of one rollout after another, and writes it when the rollout has been trained on.

    Args:
        args ([`~trl_credit.seam.CreditConfig`]):
            The run's options.
        accelerator (`Accelerator`):
            For its processes: each keeps its share of the logged completions, the main one writes.
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's.
        method (`str`):
            What to call the trainer.
    """

    def __init__(self, args, accelerator: Accelerator, tokenizer, method: str):
        self.args, self.accelerator, self.tokenizer, self.method = args, accelerator, tokenizer, method
        self.folder = Path(str(args.output_dir)) / CREDIT_FOLDER
        self._rows: list[dict[str, Any]] = []
        self._begun_at = 0
        self._is_logged = False
        self._losses = self._losses_due = 0

    @property
    def is_collecting(self) -> bool:
        """Whether the table under way has rows of this process."""
        return bool(self._rows)

    def begin_training(self, resumed: bool) -> None:
        """A run from the start leaves the tables of an earlier one in the same folder as they are, under a new name."""
        if self.accelerator.is_main_process and not resumed and any(self.folder.glob("*.parquet")):
            number = 1
            while (aside := self.folder.with_name(f"{CREDIT_FOLDER}-{number}")).exists():
                number += 1
            self.folder.rename(aside)

    def begin_rollout(self, step: int, rollout: dict, rewards: torch.Tensor, scores: dict, losses: int) -> None:
        """
        Begin the table of a rollout, if it is the turn of one.

        Args:
            step (`int`):
                Optimizer steps made so far.
            rollout (`dict`):
                TRL's rollout of this process; gets the key `credit_row`.
            rewards (`torch.Tensor`):
                Weighted sums of the rewards, shape `(B,)`.
            scores (`dict`):
                Rewards of each reward function, shape `(B,)`.
            losses (`int`):
                Micro-batches that will be trained on, over all iterations.
        """
        if self._losses:  # the last rollout was cut short by the end of an epoch or a resumed run's phase
            self.write()
        self._rows, self._begun_at, self._losses, self._losses_due = [], step, 0, losses
        steps_of_rollout = max(1, losses // self.args.gradient_accumulation_steps)
        self._is_logged = -step % self.args.log_credit_steps < steps_of_rollout
        if not self._is_logged:
            return
        ids = rollout["completion_ids"]
        first = self.accelerator.process_index * len(ids)
        logged = min(max(self.args.log_credit_completions - first, 0), len(ids))
        row_of = torch.arange(len(ids), device=ids.device)
        rollout[ROW_KEY] = torch.where(row_of < logged, row_of, -1)
        prompts, prompt_mask = (rollout[name][:logged].cpu() for name in ("prompt_ids", "prompt_mask"))
        completions, mask = (rollout[name][:logged].cpu() for name in ("completion_ids", "completion_mask"))
        trained = mask * rollout["tool_mask"][:logged].cpu() if "tool_mask" in rollout else mask
        totals, by_function = rewards[:logged].tolist(), {name: x[:logged].tolist() for name, x in scores.items()}
        for row in range(logged):
            length = int(mask[row].sum())
            if length == 0:  # a truncated completion that is masked: up to its padding
                said = (completions[row] != self.tokenizer.pad_token_id).nonzero()
                length = int(said[-1]) + 1 if len(said) else 0
            self._rows.append(
                {
                    "row": first + row,
                    "prompt_ids": prompts[row][prompt_mask[row].bool()].tolist(),
                    "token_ids": completions[row, :length].tolist(),
                    "trained": trained[row, :length].bool().numpy(),
                    "reward": totals[row],
                    "rewards": {name: values[row] for name, values in by_function.items()},
                    "columns": {},
                }
            )

    def add(self, name: str, values: Any, inputs: dict | None = None) -> None:
        """
        Add a column.

        Args:
            name (`str`):
                Its name.
            values (`torch.Tensor` or `list`):
                A number per token, shape `(B, T)`, or per completion, shape `(B,)`; or, of a rollout, a list of
                anything that parquet can hold, one per completion.
            inputs (`dict`, *optional*):
                The micro-batch that the rows are of. Default: they are those of this process's rollout.
        """
        if not self._rows:
            return
        if inputs is None:
            kept, rows = slice(len(self._rows)), range(len(self._rows))
        elif ROW_KEY in inputs:
            kept = inputs[ROW_KEY] >= 0
            rows = inputs[ROW_KEY][kept].tolist()
        else:
            return
        if isinstance(values, torch.Tensor):
            values = values.detach()[kept].float().cpu().numpy()
        for row, value in zip(rows, values, strict=False):
            self._rows[row]["columns"][name] = value

    def after_loss(self) -> None:
        """Count a micro-batch that was trained on; after the last one the table is written, by all processes."""
        self._losses += 1
        if self._losses == self._losses_due:
            self.write()

    def write(self) -> None:
        """Write the table of a rollout that was trained on, all of it or in part. Every process must call this."""
        rows, self._rows, losses, self._losses = self._rows, [], self._losses, 0
        if not (self._is_logged and losses):
            return
        rows = gather_object(rows)
        if not self.accelerator.is_main_process:
            return
        rows = [self._finish(row) for row in rows]
        names = dict.fromkeys(name for row in rows for name in row)
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{self._begun_at:07d}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)  # so that no reader, and no kill, meets half a table

    def _finish(self, row: dict) -> dict:
        trained = row["trained"]
        columns = {}
        for name, value in row["columns"].items():
            if isinstance(value, (np.ndarray, np.floating)):  # of tokens, or one number for all of them
                on_tokens = value[: len(trained)] if isinstance(value, np.ndarray) else value
                value = np.where(trained, on_tokens, np.float32("nan"))
            columns[name] = value
        return {
            "step": self._begun_at,
            "row": row["row"],
            "method": self.method,
            "prompt": self.tokenizer.decode(row["prompt_ids"]),
            "tokens": token_texts(self.tokenizer, row["token_ids"]),
            "token_ids": np.asarray(row["token_ids"], dtype=np.int32),
            "trained": trained,
            "reward": row["reward"],
            "rewards": row["rewards"],
            **columns,
        }
