"""Services beside a rollout: sample from any prefix, score any completion, and leave the run as it was."""

import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import set_seed
from trl.models.utils import disable_gradient_checkpointing

from ..credit.rewards import weighted_reward
from .loss import LossSeam
from .versions import inputs_of_forward


class SamplingSeam(LossSeam):
    """The part of [`CreditTrainer`] that continues completions and scores them."""

    # Whether credit needs [`score`]: then a run of which it cannot be had is refused before anything is generated.
    scores_continuations = False
    # Rows of the dataset that the latest rollout of this process answers, `prompt` among their keys.
    rollout_rows: list[dict] = []  # replaced, never changed
    # What a rollout function has added to them: it is true of its own completions only.
    _fields_of_completions: set[str] = set()
    # What random numbers these services have had: calls in this rollout, and which rollout of `rollouts` it is.
    _draws = 0
    _rollout_number = 0

    def sample(
        self, prefixes: Sequence[list[int]], room: int | Sequence[int], batch_tokens: int = 65536
    ) -> list[list[int]]:
        """
        Continue texts with the policy as it is, sampled as the run's completions are: with the same engine,
        temperature, top-p and so on. The run does not notice: metrics, counters and random numbers stay as they are.

        In training the random numbers depend on the seed, the step, the process and how often this was called since
        the rollout was made; in evaluation they are the same every time. A vLLM server draws its own.

        Every process must call this, with as many prefixes as it has, be it none.

        Args:
            prefixes (`list[list[int]]`):
                Token ids of N texts: a prompt, and the beginning of a completion. Equal ones are sampled independently.
            room (`int` or `list[int]`):
                Most tokens of a continuation, one number for all or one for each.
            batch_tokens (`int`, *optional*, defaults to `65536`):
                Tokens that are generated together, padding included. vLLM and continuous batching divide the work
                themselves.

        Returns:
            `list[list[int]]`: Token ids of N continuations, up to and with the first end of sequence.

        Raises:
            ValueError: If a prefix is empty or has no room, or the run has images or a regex for its completions.
        """
        rooms = [room] * len(prefixes) if isinstance(room, int) else list(room)
        self._check_prefixes(prefixes, rooms)
        if self.use_vllm or self.use_transformers_continuous_batching:
            chunks = [list(range(len(prefixes)))] if prefixes else []
        else:
            chunks = _chunks([len(ids) for ids in prefixes], rooms, batch_tokens, self._context)
        most_chunks = self.most(len(chunks))
        continuations: list[list[int]] = [[] for _ in prefixes]
        ends = set(self.eos_token_ids)
        with self._unnoticed():
            for chunk in chunks + [[]] * (most_chunks - len(chunks)):
                texts, longest = [prefixes[i] for i in chunk], max((rooms[i] for i in chunk), default=1)
                number = max(len(texts), 1)
                if self.use_vllm:  # which takes as many texts from each process, and one limit
                    number, longest = self.most(number), self.most(longest)
                texts += [[self._tokenizer.eos_token_id]] * (number - len(texts))
                with self._most_new_tokens(longest):
                    written, _ = self._generate_single_turn(texts, None, {}, 1)
                for index, tokens in zip(chunk, written, strict=False):
                    tokens = list(tokens)[: rooms[index]]
                    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
                    continuations[index] = tokens[:length]
        return continuations

    def score(self, rows: Sequence[dict], completion_ids: Sequence[list[int]]) -> torch.Tensor:
        """
        Score completions with the run's reward functions and their weights, as those of a rollout are. The run does
        not notice, what reward functions log included. A reward function that compares the completions of a batch
        meets others than in a rollout.

        Every process must call this, with as many completions as it has, be it none: where another has more, reward
        functions are given an empty answer to fill the gap.

        Args:
            rows (`list[dict]`):
                For each of N completions the row of the dataset that it answers, see `rollout_rows`.
            completion_ids (`list[list[int]]`):
                Token ids of the completions, without padding.

        Returns:
            `torch.Tensor`: Rewards of shape `(N,)`, float32; NaN where all functions gave `None`.

        Raises:
            ValueError: If a completion is empty, or the run has tools, an environment or images, or a rollout function
                that adds to the rows what is true of its own completions only.
        """
        self._refuse_unscorable()
        if len(rows) != len(completion_ids) or not all(completion_ids):
            raise ValueError(
                f"`score` needs a row and at least one token for each completion, got {len(rows)} rows and completions "
                f"of {sorted({len(ids) for ids in completion_ids})} tokens for {len(completion_ids)} of them."
            )
        number, size = self.most(len(rows)), max(len(self.rollout_rows), 1)
        filler = (list(rows[:1]) or self.rollout_rows[:1]) * (number - len(rows))
        rows = [*rows, *filler]
        completion_ids = [*completion_ids, *([self._tokenizer.eos_token_id] for _ in filler)]
        rewards = [torch.zeros(0, device=self.accelerator.device)]
        with self._unnoticed():
            for start in range(0, number, size):
                part = slice(start, start + size)
                rewards.append(self._rewards_of(rows[part], completion_ids[part]))
        return torch.cat(rewards)[: len(rows) - len(filler)]

    @torch.no_grad()
    def sampler_logps(self, rollout: dict) -> torch.Tensor:
        """
        Log-probabilities of a rollout's tokens under what sampled them, for [`CreditTrainer.assign_credit`].

        Args:
            rollout (`dict`):
                TRL's.

        Returns:
            `torch.Tensor`: Shape `(B, T)`: those that vLLM or the rollout function gave, NaN where vLLM knows none;
            else the policy's own, which is the sampler, at the temperature of the run.
        """
        for name in ("sampling_per_token_logps", "old_per_token_logps"):
            if rollout.get(name) is not None:
                return rollout[name]
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(self.model, checkpointing):
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1),
                torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1),
                rollout["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
                **{name: rollout[name] for name in inputs_of_forward() if name in rollout},
            )
        return logps

    # --- What cannot be continued or scored

    def _check_prefixes(self, prefixes, rooms) -> None:
        if len(rooms) != len(prefixes):
            raise ValueError(f"`sample` got {len(prefixes)} prefixes and {len(rooms)} numbers in `room`.")
        for index, (ids, room) in enumerate(zip(prefixes, rooms, strict=True)):
            if len(ids) == 0 or room < 1:
                raise ValueError(
                    f"`sample` cannot continue prefix {index}: it has {len(ids)} tokens and room for {room} more. Each "
                    "needs at least one of both."
                )
        if self.args.vllm_structured_outputs_regex is not None:
            raise ValueError(
                f"`vllm_structured_outputs_regex={self.args.vllm_structured_outputs_regex!r}` is for whole "
                "completions: the rest of one that has begun does not match it. Leave it out."
            )
        self._refuse_images()

    def _refuse_images(self) -> None:
        for row in self.rollout_rows:
            parts = [
                part
                for message in (row["prompt"] if isinstance(row.get("prompt"), list) else [])
                for part in (message["content"] if isinstance(message["content"], list) else [])
            ]
            in_prompt = any(part["type"] == "image" for part in parts)
            if in_prompt or row.get("images") or row.get("image") is not None:
                raise ValueError(
                    f"{type(self).__name__} continues completions by their tokens alone, and a prompt of this rollout "
                    "has images. Drop the images from the dataset."
                )

    def _refuse_unscorable(self) -> None:
        """Of what only the rollout itself knows how it was rewarded."""
        for name, is_given in (("tools", self.tools), ("environment_factory", self.environment_factories)):
            if is_given:
                raise ValueError(
                    f"{type(self).__name__} scores continuations of completions, in which nothing runs `{name}`. Leave "
                    "it out."
                )
        if self._fields_of_completions:
            raise ValueError(
                f"`rollout_func` gives reward functions {sorted(self._fields_of_completions)} of its own completions. "
                f"{type(self).__name__} scores continuations of them, of which nobody knows these. Leave them out, and "
                "let the reward functions read the completions."
            )
        self._refuse_images()

    # --- Inside

    def _rewards_of(self, rows: list[dict], completion_ids: list[list[int]]) -> torch.Tensor:
        """Rewards of this process's completions, as many as on any other: `(N,)`."""
        distinct = {id(row): row for row in rows}
        tokenized, *_ = self._tokenize_prompts([row["prompt"] for row in distinct.values()])
        prompt_ids = dict(zip(distinct, tokenized, strict=True))
        # TRL makes messages or texts of the completions that a rollout function gives it.
        self.rollout_func = lambda prompts, trainer: {
            "prompt_ids": [prompt_ids[id(row)] for row in rows],
            "completion_ids": completion_ids,
            "logprobs": None,
        }
        prompts = [row["prompt"] for row in rows]
        _, _, _, completions, *_ = self._generate(prompts)
        scores = self._calculate_rewards(rows, prompts, completions, completion_ids)  # (N of all processes, functions)
        start = self.accelerator.process_index * len(rows)
        return weighted_reward(scores[start : start + len(rows)], self.reward_weights)

    @contextmanager
    def _unnoticed(self):
        """Around what leaves no trace in the run: not in its metrics and counters, not in its random numbers."""
        replaced: dict[str, Any] = {
            "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
            "_pending_extra_logs": defaultdict(list),
            "_pending_metrics": defaultdict(list),
            "_scores": None,
            "rollout_func": None,
        }
        kept = {name: getattr(self, name) for name in replaced}
        token_scores = [dict(of_rows) for of_rows in self._token_scores]
        tokens_seen, mode = self.state.num_input_tokens_seen, self._mode
        seed = self._next_seed()
        self.__dict__.update(replaced)
        with _other_random_numbers(seed, self.accelerator.device):
            try:
                yield
            finally:
                self.__dict__.update(kept)
                self.state.num_input_tokens_seen = tokens_seen
                for of_rows, kept_of_rows in zip(self._token_scores, token_scores, strict=True):
                    of_rows.clear()
                    of_rows.update(kept_of_rows)
                if self._mode != mode:  # continuous batching leaves the policy in training mode
                    self.model.train(mode == "train")

    def _next_seed(self) -> int:
        self._draws += 1
        when = (self.state.global_step, self._rollout_number) if self._mode == "train" else ()
        # Processes that are one engine sample the same.
        process = self.accelerator.process_index
        if self.use_vllm:
            process //= self.args.vllm_tensor_parallel_size
        return random.Random(repr((self.args.seed, when, self._draws, process))).getrandbits(32)

    @contextmanager
    def _most_new_tokens(self, number: int):
        """Around a generation of fewer tokens than a completion has."""
        engine: Any = self.vllm_generation if self.use_vllm else self.generation_config
        name = "max_completion_length" if self.use_vllm else "max_new_tokens"
        kept = getattr(engine, name)
        setattr(engine, name, number)
        try:
            yield
        finally:
            setattr(engine, name, kept)


def _chunks(lengths: list[int], rooms: list[int], budget: int, context: float) -> list[list[int]]:
    """
    Indices of prefixes that are continued together, those with the most room first: a chunk takes as long as its
    longest continuation. Padding included it stays within a budget of tokens, and no sequence of it outgrows the
    context for the sake of another.
    """
    chunks: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -rooms[i]):
        longest = max(longest, lengths[index])
        width = longest + rooms[chunks[-1][0]] if chunks else 0
        if chunks and width * (len(chunks[-1]) + 1) <= budget and width <= context:
            chunks[-1].append(index)
        else:
            chunks.append([index])
            longest = lengths[index]
    return chunks


@contextmanager
def _other_random_numbers(seed: int, device: torch.device):
    """Random numbers of `seed`; those of the run, of all kinds, are untouched."""
    kept, kept_of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept)
            np.random.set_state(kept_of_numpy)
