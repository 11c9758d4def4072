"""Rollouts: how a policy is sampled and rewarded, and what TRL does not keep."""

import itertools
from typing import Any

import torch
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from ..credit.boundaries import turn_ends
from ..credit.rewards import weighted_reward
from .loss import trained_tokens
from .rollout_keys import check_keys, declared_keys
from .sampling import SamplingSeam
from .user_functions import TurnScores
from .versions import check_rollout


class RolloutSeam(SamplingSeam):
    """The part of [`CreditTrainer`] that creates rollouts and passes them to [`CreditTrainer.assign_credit`]."""

    _scores: Any = None  # rewards per function of the latest rollout, over all processes
    # What `assign_credit` adds to a rollout, and its shape: B completions of T tokens, "[B]" for a list of B things.
    # Those of all base classes belong to it.
    rollout_keys: dict[str, str] = {}
    # Classes of what is in their lists, for a checkpoint holds a rollout that is not done with.
    rollout_types: tuple[type, ...] = ()

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        """
        Assign the credit of a rollout.

        Args:
            rollout (`dict`):
                TRL's rollout of this process, including `advantages` of shape `(B,)`.
            rewards (`torch.Tensor`):
                Weighted sum of the rewards as returned by the reward functions, shape `(B,)`; NaN where none was
                returned.
            mode (`str`):
                `"train"` or `"eval"`.

        Returns:
            `dict`: The rollout with other `advantages`, `(B,)` or `(B, T)`, and any further tensors whose first
            dimension is `B`: they are shuffled and split along with it. `rollout_keys` declares them.
        """
        return rollout

    def begin_step(self, micro_batches: list[dict], mode: str) -> None:
        """
        Called with all micro-batches of an optimizer step before the first of them is trained on; collect here what has
        to be known about all of them together. In evaluation every batch is a step of its own.
        """

    def trained_tokens(self, inputs: dict) -> torch.Tensor:
        """Tokens that the policy chose and is trained on, shape `(B, T)`, boolean."""
        return trained_tokens(inputs)

    def is_cut_off(self, rollout: dict) -> torch.Tensor:
        """
        Which completions ran out of room, shape `(B,)`: they have no EOS token at the end, and no room for another
        token.

        A shorter one without EOS has ended on its own: at a stop string, or where a rollout function ended it. If a
        vLLM server has a shorter context than the model, that is not known here.

        Args:
            rollout (`dict`):
                TRL's, or a micro-batch.

        Returns:
            `torch.Tensor`: Boolean; False where all of a completion is masked.
        """
        mask = rollout["completion_mask"].bool()
        lengths = mask.sum(1)
        last_ids = rollout["completion_ids"].gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last_ids.device)
        generation: Any = self.args.generation_kwargs or {}
        limits = [self.max_completion_length, *(generation.get(name) for name in ("max_new_tokens", "max_tokens"))]
        room = min((limit for limit in limits if limit is not None), default=0)
        context = (self.use_vllm and self.args.vllm_max_model_length) or self._context
        is_full = (lengths >= room) | (rollout["prompt_mask"].sum(1) + lengths >= context)
        return ~torch.isin(last_ids, ends) & is_full & mask.any(1)

    @property
    def reward_scores(self) -> torch.Tensor:
        """
        Each reward function's reward for each completion of this process's latest rollout, shape `(B, F)`, in the order
        of `reward_func_names`; NaN where it gave none.
        """
        start = self.accelerator.process_index * len(self.rollout_rows)
        return self._scores[start : start + len(self.rollout_rows)]

    def rewards_where_they_fall(self, rollout: dict, rewards: torch.Tensor) -> torch.Tensor:
        """
        The rewards of a rollout, placed on its tokens.

        Returns:
            `torch.Tensor`: `rewards` itself, shape `(B,)`, if all reward functions gave one number for a completion;
            else `(B, T)`, with these numbers at the last trained token, and 0 where a function does not score a token.
        """
        if not any(self._token_scores):
            return rewards
        mask = trained_tokens(rollout)
        on_tokens = torch.zeros(mask.shape, device=mask.device)
        for scores_of_rows, weight in zip(self._token_scores, self.reward_weights.tolist(), strict=True):
            for row, scores in scores_of_rows.items():
                on_tokens[row, : len(scores)] += weight * torch.tensor(scores, device=mask.device)
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        rest = torch.nan_to_num(rewards) - on_tokens.sum(1)
        on_tokens[torch.arange(len(mask), device=mask.device), last] += rest
        return on_tokens

    def rollouts(self, skip: int = 0, checkpoint: str | None = None):
        """
        Rollouts of the policy as it is, cycling through the training data without end.

        Args:
            skip (`int`, *optional*, defaults to `0`):
                How many to skip at the start; these are not generated.
            checkpoint (`str`, *optional*):
                Begin with the random state of this checkpoint.

        Yields:
            `list[list[dict]]`: The micro-batches of each optimizer step that a rollout provides.
        """
        for number, batch in self._batches(skip):
            if checkpoint is not None:
                self._load_rng_state(checkpoint)
                checkpoint = None
            self.model.train()
            self._rollout_number = number
            rollout: Any = shuffle_sequence_dict(self._generate_and_score_completions(batch))
            self._rollout_number = 0
            yield self._begun_steps(rollout)

    def _batches(self, skip: int):
        """Numbers and rows of the training data for one rollout after another, without end."""
        loader = self.get_train_dataloader()
        number = 0
        for epoch in itertools.count():
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            batches = itertools.islice(iter(loader), 0, None, self._losses_of_rollout)
            empty = True
            while True:
                with torch.random.fork_rng(devices=[]):  # a loader draws a seed that it has no use for
                    batch = next(batches, None)
                if batch is None:
                    break
                empty = False
                number += 1
                if number > skip:
                    yield number, batch
            if empty:
                raise ValueError("The training data hold fewer prompts than one rollout needs.")

    def _begun_steps(self, rollout: dict) -> list[list[dict]]:
        steps = self._steps_of(split_tensor_dict(rollout, self._rollout_parts))
        for step in steps:
            self._begin_step(step)
        return steps

    def _make_token_mean_exact(self, micro_batches: list[dict]) -> None:
        # TRL divides by the tokens of the generation batch, shared out evenly over its optimizer steps.
        tokens = self.total(torch.stack([trained_tokens(inputs).sum() for inputs in micro_batches]).sum())
        for inputs in micro_batches:
            inputs["num_items_in_batch"] = tokens * (self._rollout_parts / len(micro_batches))

    def _begin_step(self, micro_batches: list[dict]) -> None:
        """What happens at the start of every optimizer step, of the policy or of a critic."""
        if self.args.exact_token_mean:
            self._make_token_mean_exact(micro_batches)
        self.begin_step(micro_batches, "train")

    def _tokenize_prompts(self, prompts):
        tokenized = super()._tokenize_prompts(prompts)
        for ids, prompt in zip(tokenized[0], prompts, strict=True):
            if len(ids) == 0:
                raise ValueError(
                    f"A prompt of the batch at step {self.state.global_step} has no tokens, so there is nothing to go "
                    f"on from: {prompt!r}. Drop such rows from the dataset."
                )
            if len(ids) >= self._context:
                raise ValueError(
                    f"A prompt has {len(ids)} tokens, and the model's context of {self._context} leaves no room for a "
                    f"completion. Shorten it or drop it from the dataset. It begins: {str(prompt)[:200]!r}"
                )
        return tokenized

    def _calculate_rewards(self, *args, **kwargs):
        for scores_of_rows in self._token_scores:
            scores_of_rows.clear()
        scores = super()._calculate_rewards(*args, **kwargs)  # (B of all processes, reward functions)
        if torch.isinf(scores).any():
            row, column = torch.isinf(scores).nonzero()[0].tolist()
            raise ValueError(
                f"Reward function {self.reward_func_names[column]!r} returned {scores[row, column].item()} for "
                f"completion {row} of the batch at step {self.state.global_step}. A reward must be a finite number, or "
                "None for a completion that it does not score."
            )
        self._metrics[self._mode]["rewards/unscored"].append(scores.isnan().all(dim=1).float().mean().item())
        self._scores = scores
        return scores

    def _generate_and_score_completions(self, inputs, *args, **kwargs):
        # A rollout with a number is one of [`rollouts`]: the policy does not learn from it.
        rollout = self._generate_and_score(inputs, *args, policy_learns=not self._rollout_number, **kwargs)
        rewards = weighted_reward(self.reward_scores, self.reward_weights)
        if self._credit_log is not None and self._mode == "train":
            scores = dict(zip(self.reward_func_names, self.reward_scores.unbind(1), strict=True))
            self._credit_log.begin_rollout(self.state.global_step, rollout, rewards, scores, self._losses_of_rollout)
        rollout = self._assign_credit(rollout, rewards)
        self._reading = None

        # The completions table shows one advantage a completion; TRL has filled it with those it computed itself.
        advantages = rollout["advantages"]
        if advantages.dim() == 2:
            mask = trained_tokens(rollout)
            advantages = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
        advantages = self.accelerator.gather(advantages).tolist()
        table: Any = self._logs["advantages"]
        for _ in range(min(len(advantages), len(table))):
            table.pop()
        table.extend(advantages)
        return rollout

    def _generate_and_score(self, inputs, *args, policy_learns: bool, **kwargs) -> dict:
        """
        TRL's rollout; its rewards are in `reward_scores`. What only the policy's loss would read, the log-probabilities
        of the old and the reference policy, is left out of one that the policy does not learn from.
        """
        self.rollout_rows, self._draws = inputs, 0
        self._fields_of_completions = set()
        for row, example in enumerate(inputs):
            if example["prompt"] is None:
                raise ValueError(
                    f"The prompt of row {row} of the batch at step {self.state.global_step} is None. Drop such rows "
                    "from the dataset."
                )
        if self.scores_continuations:
            self._refuse_unscorable()
        columns = set(inputs[0])
        corrects = self.vllm_importance_sampling_correction
        self._scores_tokens, self.vllm_importance_sampling_correction = policy_learns, corrects and policy_learns
        try:
            rollout = super()._generate_and_score_completions(inputs, *args, **kwargs)
        finally:
            self._scores_tokens, self.vllm_importance_sampling_correction = True, corrects
        check_rollout(rollout)
        self._fields_of_completions = set(inputs[0]) - columns
        self._place_rewards_of_turns(rollout)
        if self.scores_continuations and (trained_tokens(rollout) != rollout["completion_mask"].bool()).any():
            raise ValueError(
                f"`rollout_func` returned an `env_mask` with zeros: tokens that the policy did not write. Nothing "
                f"writes them in the continuations that {type(self).__name__} samples. Leave them out."
            )
        return rollout

    def _place_rewards_of_turns(self, rollout: dict) -> None:
        """Rewards per turn become rewards per token, at the last token of each turn."""
        for name, scores_of_rows in zip(self.reward_func_names, self._token_scores, strict=True):
            for row, scores in scores_of_rows.items():
                if not isinstance(scores, TurnScores):
                    continue
                chosen = torch.ones(1, scores.tokens)
                if "tool_mask" in rollout:
                    chosen = rollout["tool_mask"][row : row + 1, : scores.tokens]
                ends = turn_ends(chosen)[0].nonzero().flatten().tolist()
                is_masked = not rollout["completion_mask"][row].any()  # and with it TRL has lost its turns
                if len(ends) != len(scores.rewards) and not is_masked:
                    raise ValueError(
                        f"Reward function {name!r} returned {len(scores.rewards)} rewards for completion {row}, which "
                        f"has {scores.tokens} tokens in {len(ends)} turns of the policy. Return one reward per token "
                        "of `completion_ids`, one per turn (a message of the assistant in `completions`), or one "
                        "number."
                    )
                placed = [0.0] * scores.tokens
                for end, reward in zip(ends, scores.rewards, strict=not is_masked):
                    placed[end] = reward
                scores_of_rows[row] = placed

    def _assign_credit(self, rollout: dict, rewards: torch.Tensor) -> dict:
        known = set(rollout)
        rollout = self.assign_credit(rollout, rewards, self._mode)
        check_keys(rollout, known, declared_keys(type(self)), type(self).__name__)
        self.add_credit("advantage", rollout["advantages"])
        return rollout
