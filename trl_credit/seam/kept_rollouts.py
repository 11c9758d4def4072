"""Rollouts that are kept: taken apart into samples, and made of samples again, without the policy."""

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import shuffle_sequence_dict

from ..credit.rewards import weighted_reward
from .loss import trained_tokens
from .rollouts import RolloutSeam


class KeptRolloutSeam(RolloutSeam):
    """The part of [`CreditTrainer`] for rollouts that are used more than once."""

    def samples(self, skip: int = 0):
        """
        The same rollouts as they were sampled and scored, to be kept: no credit is assigned, and nothing of the trainer
        but its policy takes part.

        Args:
            skip (`int`, *optional*, defaults to `0`):
                How many to skip at the start; these are not generated.

        Yields:
            `list[dict]`: This process's completions, each with `row` (of the dataset, as JSON), `prompt_ids`,
            `completion_ids`, `chosen` (which tokens the policy chose), `scores` (one per reward function, NaN for none)
            and `token_scores` (per function a list or `None`).
        """
        for _, batch in self._batches(skip):
            self.model.train()
            rollout = self._generate_and_score(batch, policy_learns=False)
            chosen = trained_tokens(rollout)
            samples = []
            for row, length in enumerate(rollout["completion_mask"].sum(1).tolist()):
                samples.append(
                    {
                        "row": json.dumps(self._row_of_data(row), default=str),
                        "prompt_ids": rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()].tolist(),
                        "completion_ids": rollout["completion_ids"][row, :length].tolist(),
                        "chosen": chosen[row, :length].tolist(),
                        "scores": self.reward_scores[row].tolist(),
                        "token_scores": [scores_of_rows.get(row) for scores_of_rows in self._token_scores],
                    }
                )
            yield samples

    def _row_of_data(self, row: int) -> dict:
        return {name: x for name, x in self.rollout_rows[row].items() if name not in self._fields_of_completions}

    def take_up(self, samples: dict[str, list], scores: torch.Tensor) -> tuple[dict, torch.Tensor]:
        """
        Make a rollout of samples, which takes the place of the latest one.

        Args:
            samples (`dict[str, list]`):
                This process's share of what [`samples`] gave, by name, equally many on every process.
            scores (`torch.Tensor`):
                The scores of all processes' shares, one after the other, shape `(B of all, F)`. A completion without
                any counts nowhere.

        Returns:
            `tuple[dict, torch.Tensor]`: The rollout and its rewards, shape `(B,)`, as `assign_credit` takes them.
        """
        device, pad = self.accelerator.device, self._tokenizer.pad_token_id

        def rows_of(name: str, side: str, padding: int) -> torch.Tensor:
            # Of a completion that is masked because it was truncated, nothing is left.
            rows = [torch.tensor(row or [padding], dtype=torch.long) for row in samples[name]]
            return pad_sequence(rows, batch_first=True, padding_value=padding, padding_side=side).to(device)

        lengths = torch.tensor([len(ids) for ids in samples["completion_ids"]], device=device)
        prompt_lengths = torch.tensor([len(ids) for ids in samples["prompt_ids"]], device=device)
        prompts, completions = rows_of("prompt_ids", "left", pad), rows_of("completion_ids", "right", pad)
        from_end = torch.arange(prompts.shape[1], 0, -1, device=device)
        rollout = {
            "prompt_ids": prompts,
            "prompt_mask": (from_end <= prompt_lengths.unsqueeze(1)).long(),
            "completion_ids": completions,
            "completion_mask": (torch.arange(completions.shape[1], device=device) < lengths.unsqueeze(1)).long(),
            "tool_mask": rows_of("chosen", "right", 0),
            "advantages": torch.zeros(len(lengths), device=device),
        }
        self.model.train()
        self.rollout_rows = [json.loads(row) for row in samples["row"]]
        self._scores = scores.to(device)
        for function, scores_of_rows in enumerate(self._token_scores):
            scores_of_rows.clear()
            for row, functions in enumerate(samples["token_scores"]):
                if functions[function] is not None:
                    scores_of_rows[row] = functions[function]
        return rollout, weighted_reward(self.reward_scores, self.reward_weights)

    def rollouts_of(self, taken_up: Iterable[tuple[dict, torch.Tensor]], skip: int = 0, checkpoint: str | None = None):
        """
        As `rollouts`, of what `take_up` gives: credit is assigned anew, and nothing is generated.

        Args:
            taken_up (`Iterable`):
                Rollouts and rewards, without those that are skipped.
            skip (`int`, *optional*, defaults to `0`):
                How many are: each rollout has random numbers of its own, which are not the run's, to mix its
                completions.
            checkpoint (`str`, *optional*):
                Begin with the random state of this checkpoint.

        Yields:
            `list[list[dict]]`: The micro-batches of each optimizer step that a rollout provides.
        """
        if checkpoint is not None:
            self._load_rng_state(checkpoint)
        for number, (rollout, rewards) in enumerate(taken_up, start=skip):
            credited = self._assign_credit(rollout, rewards)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.args.seed + number)
                shuffled: Any = shuffle_sequence_dict(credited)
            yield self._begun_steps(shuffled)
