"""A critic that writes its values: how it is asked about the states of completions, and how it is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from ...credit.running_mean import RunningMean
from ...sampling import chunks_within, sample_continuations, up_to_end
from ...segmenting import DelimiterSegmenter, Segmenter
from ..critic import PROMPTS, Critic, Runner, on_device
from ..engine.engine import seeded
from ..facts import CriticFacts
from ..prompt import load_critic_tokenizer
from ..refusals import refuse_images
from .network import make_generative_critic
from .prefixes import Prefixes, StatePrompt, keeps_prefixes, tokens_read
from .question import TEMPLATE, Question, check_template, end_of_turn, refuse_other_segmenter
from .reading import Reading, value_of_each_state


class GenerativeCritic(Critic):
    """
    A value that is written out as text: the critic of GenAC. It is asked about each state once; its answers are
    sampled.

    Args:
        network (`nn.Module` or [`~trl_credit.critics.critic.Runner`]):
            As created by [`~trl_credit.critics.generative.network.make_generative_critic`], on its device, or what runs
            it.
        tokenizer (`PreTrainedTokenizerBase`):
            The critic's.
        policy_tokenizer (`PreTrainedTokenizerBase`):
            The policy's, whose tokens the completions are.
        template (`str`, *optional*):
            The question, see [`~trl_credit.GenACConfig`]. Default: the trainer's.
        actor_description (`str`, *optional*, defaults to `"A language model"`):
            Who writes the solutions, for the template.
        success_rate (`float`, *optional*):
            What it is told about the policy. Default: the mean reward of a report's completions; the middle of
            `reward_range` where there is no reward.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Maximum length of an answer, in tokens.
        name (`str`, *optional*, defaults to `"generative critic"`):
            What it is called in a report.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Tokens per generated batch.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of its answers.
        segmenter ([`~trl_credit.segmenting.Segmenter`], *optional*):
            Says where the states are, unless a rollout does so in its `cuts`.
        context (`int`, *optional*):
            Maximum number of tokens of a question with its answer. Default: the network's.
        write (`Callable`, *optional*):
            From questions ([`~trl_credit.critics.generative.prefixes.StatePrompt`]) to the token ids of answers.
            Default: the network writes them with transformers.
        reads_prefixes_once (`bool`, *optional*):
            Whether what the states of a completion share is read once. Default: as transformers can do it with this
            network.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the answers in [`state_values`], which are the same each time.
        reward_range (`Sequence[float]`, *optional*, defaults to `(0.0, 1.0)`):
            The rewards that the scores 0 and 10 stand for.

    `parse_rate` is the share of the latest answers that had a score, `tokens` the number of tokens that were read and
    written for them.
    """

    kind = "generative"
    tokens: int = 0

    def __init__(
        self,
        network: nn.Module | Runner,
        tokenizer,
        policy_tokenizer,
        template: str = TEMPLATE,
        actor_description: str = "A language model",
        success_rate: float | None = None,
        max_completion_length: int = 1024,
        name: str = "generative critic",
        batch_tokens: int = 16384,
        temperature: float = 1.0,
        segmenter: Segmenter | None = None,
        context: int | None = None,
        write: Callable[[list[StatePrompt]], list[list[int]]] | None = None,
        reads_prefixes_once: bool | None = None,
        seed: int = 0,
        reward_range: Sequence[float] = (0.0, 1.0),
    ):
        check_template(template, ("problem", "partial_solution"))
        super().__init__(network, name)
        segmenter = segmenter or DelimiterSegmenter()
        self.question = Question(tokenizer, policy_tokenizer, template, actor_description, segmenter, reward_range)
        self.success_rate, self.temperature, self.seed = success_rate, temperature, seed
        self.max_completion_length, self.batch_tokens = max_completion_length, batch_tokens
        self.context = min(context_of(self.network), context or float("inf"))
        self.write = write or self.generate
        self.reads_prefixes_once = keeps_prefixes(self.network) if reads_prefixes_once is None else reads_prefixes_once

    @classmethod
    def from_pretrained(cls, path: str, policy_tokenizer, dtype="auto", **settings) -> "GenerativeCritic":
        """
        A critic that was saved, its tokenizer beside it.

        Args:
            path (`str`):
                A folder or Hub id.
            policy_tokenizer, settings:
                As above. Those that are not given are taken from the critic's `critic.json`.
            dtype (`str`, *optional*, defaults to `"auto"`):
                Of its weights.

        Raises:
            ValueError: If a given setting differs from the critic's.
        """
        facts = CriticFacts.load(path)
        if facts is not None:
            facts.refuse_other_kind(cls.kind, path)
            settings = _as_trained(facts, settings, path)
        network = on_device(make_generative_critic(path, model_init_kwargs={"dtype": dtype}))
        tokenizer = load_critic_tokenizer(path)
        return cls(network, tokenizer, policy_tokenizer, name=f"generative:{path}", **settings)

    @property
    def tokenizer(self) -> Any:
        """The critic's tokenizer."""
        return self.question.tokenizer

    # --- Values

    def state_values(self, rollout: dict) -> torch.Tensor:
        """See [`~trl_credit.critics.critic.Critic.state_values`]; a value holds up to the next state asked about."""
        rate = sum(self.question.reward_range) / 2 if self.success_rate is None else self.success_rate
        readings = self.readings(rollout, rate)
        with seeded(self.seed + self.runner.process_index):
            self.ask([reading for reading in readings if reading is not None])
        ids = rollout["completion_ids"]
        return value_of_each_state(readings, ids.shape[1]).to(ids.device)

    def values(self, rollouts) -> list[np.ndarray]:
        """
        As for every critic, NaN where the answer could not be read. Without a success rate the critic is told the mean
        reward of the completions.
        """
        told = self.success_rate
        rewards = [rollout.reward for rollout in rollouts if rollout.reward == rollout.reward]
        rate = float(np.mean(rewards)) if told is None else told
        self.success_rate = rate
        try:
            return super().values(rollouts)
        finally:
            self.success_rate = told

    def readings(self, rollout: dict, success_rate: float, counted: torch.Tensor | None = None) -> list[Reading | None]:
        """
        What the critic is asked about the completions of a rollout.

        Args:
            rollout (`dict`):
                See [`~trl_credit.critics.critic.Critic.state_values`].
            success_rate (`float`):
                What it is told of the policy.
            counted (`torch.Tensor`, *optional*):
                The completions that it is asked about, shape `(B,)`, boolean. Default: all that have a token.

        Returns:
            `list[Reading]`: One per completion, without answers; `None` for those that it is not asked about.
        """
        refuse_images(rollout)
        ids, mask = rollout["completion_ids"], rollout["completion_mask"]
        trained = mask * rollout["tool_mask"] if "tool_mask" in rollout else mask
        cuts = rollout.get("cuts", [None] * len(ids))
        counted = mask.any(1) if counted is None else counted
        return [
            self.question.about(
                ids[row, :length].tolist(),
                rollout[PROMPTS][row],
                success_rate,
                trained[row, :length].bool().tolist(),
                cuts[row],
            )
            if counted[row]
            else None
            for row, length in enumerate(mask.sum(1))
        ]

    def ask(self, readings: list[Reading]) -> None:
        """
        Ask the critic about all states that leave it room, and read its answers.

        Raises:
            ValueError: If a problem alone leaves no room.
        """
        prompts, places = [], []
        for reading in readings:
            reading.answers = [[] for _ in reading.ends]
            for state in range(len(reading.query.cuts)):
                prompt = StatePrompt(reading.query, state)
                if len(prompt) + self.max_completion_length <= self.context:
                    prompts.append(prompt)
                    places.append((reading, state))
                elif reading.starts[state] == 0:
                    raise ValueError(
                        f"A problem takes {len(prompt)} tokens to put to the critic, whose context of {self.context} "
                        "leaves no room for an answer of `critic_max_completion_length="
                        f"{self.max_completion_length}` tokens. Shorten the answer, or drop the problem "
                        f"from the dataset. It ends: {self.text_of([prompt.ids])[0][-200:]!r}"
                    )
        for (reading, state), answer in zip(places, self.write(prompts), strict=True):
            reading.answers[state] = up_to_end(answer, self.ends)
        for reading in readings:
            reading.scores = [self.question.value(text) for text in self.text_of(reading.answers)]
        written = sum(len(answer) for reading in readings for answer in reading.answers)
        self.tokens = tokens_read(prompts, self.reads_prefixes_once) + written
        read = sum(score is not None for reading in readings for score in reading.scores)
        self.parse_rate = read / len(prompts) if prompts else float("nan")

    # --- Writing

    @cached_property
    def ends(self) -> set[int]:
        """
        Tokens that end an answer: the ends of sequence of the tokenizer and of the checkpoint's generation config, and
        the token that ends a turn in the chat template, with which a critic has learned to end.
        """
        ends = self.network.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {*ends, self.tokenizer.eos_token_id, end_of_turn(self.tokenizer)} - {None}

    def generate(self, prompts: list[StatePrompt]) -> list[list[int]]:
        """Answers by transformers, on one process."""
        return self.runner.evaluate(lambda network: self.sample(network, prompts, self.chunks(prompts)))

    def chunks(self, prompts: list[StatePrompt]) -> list[list[int]]:
        """Indices of the questions that transformers answers together."""
        families: dict[int, int] = {}  # states of a completion are near each other, as long as they share what is kept
        for prompt in prompts:
            families.setdefault(id(prompt.query), len(families))
        return chunks_within(
            [len(prompt) + self.max_completion_length for prompt in prompts],
            self.batch_tokens,
            [families[id(prompt.query)] for prompt in prompts] if self.reads_prefixes_once else None,
        )

    def sample(self, network, prompts: list[StatePrompt], chunks: list[list[int]], synced: bool = False):
        """[`~trl_credit.sampling.sample_continuations`] with the settings of this critic."""
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        prefixes = Prefixes(network, prompts, chunks, pad, synced) if self.reads_prefixes_once else None
        return sample_continuations(
            network,
            [prompt.ids for prompt in prompts],
            [self.max_completion_length] * len(prompts),
            ends=self.ends,
            pad=pad,
            temperature=self.temperature,
            chunks=chunks,
            synced=synced,
            read=None if prefixes is None else prefixes.of,
        )

    def text_of(self, answers: list[list[int]]) -> list[str]:
        """The texts of answers."""
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)


def _as_trained(facts: CriticFacts, settings: dict[str, Any], path: str) -> dict[str, Any]:
    """Arguments of a [`GenerativeCritic`]: those that are given, and the critic's own for the others."""
    options = {
        "template": "critic_template",
        "actor_description": "actor_description",
        "temperature": "critic_temperature",
        "max_completion_length": "critic_max_completion_length",
        "reward_range": "reward_range",
    }
    facts.agreed({option: settings[name] for name, option in options.items() if name in settings}, {}, path)
    own: dict[str, Any] = {n: facts.settings[option] for n, option in options.items() if option in facts.settings}
    own["context"] = facts.context
    if facts.hint:
        own["success_rate"] = RunningMean(*facts.hint["success_rate"]).value
    if "segmenter" in settings:
        refuse_other_segmenter(facts, settings["segmenter"], path)
    elif "segmenter" in facts.settings:
        own["segmenter"] = _LostSegmenter(facts.settings["segmenter"])
    elif "segment_min_length" in facts.settings:
        names = ("segment_min_length", "segment_target_length", "segment_max_length", "max_segments")
        own["segmenter"] = DelimiterSegmenter(*(facts.settings[name] for name in names))
    return {**own, **settings}


@dataclass(frozen=True)
class _LostSegmenter:
    """In place of a user's function that a saved critic was trained with."""

    name: str

    def __call__(self, token_ids, tokenizer, trainable=None):
        raise ValueError(f"The critic was asked about segments by `{self.name}`: pass it as `segmenter`.")


def context_of(network: Any) -> float:
    """Most tokens that a network can read."""
    return getattr(network.config.get_text_config(), "max_position_embeddings", None) or float("inf")
