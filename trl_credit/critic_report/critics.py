"""What a report asks of a critic, and adapters for those there are."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from ..critics.engine.engine import seeded
from ..critics.generative.network import make_generative_critic
from ..critics.generative.question import TEMPLATE, check_template, critic_query, parse_score
from ..critics.prompt import load_critic_tokenizer, pad_prompts, read_prompts, tokenize_prompts
from ..critics.token import make_token_critic, read_values
from ..sampling import chunks_within, sample_answers
from ..segmenting import segment_texts
from .probes import Rollout


class Critic(Protocol):
    """Anything that values states."""

    name: str

    def values(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """
        Values of all states of each rollout, shape `(T + 1,)`: the one in which each token is chosen, and the one after
        the last. A critic that values few states keeps to those in `cuts`, and holds each value up to the next.
        """
        ...


class ConstantCritic:
    """
    One value for every state.

    Args:
        value (`float`, *optional*):
            Default: the mean reward of the completions.
    """

    def __init__(self, value: float | None = None):
        self.value = value
        self.name = "constant" if value is None else f"constant {value:g}"

    def values(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """The same for all."""
        value = self.value
        if value is None:
            value = float(np.mean([rollout.reward for rollout in rollouts if not math.isnan(rollout.reward)]))
        return [np.full(len(rollout.completion_ids) + 1, value) for rollout in rollouts]


class LeaveOneOutMean:
    """
    For every state the mean reward of the prompt's other completions: the baseline of RLOO and, but for the completion
    itself, of GRPO.
    """

    name = "leave-one-out mean"

    def values(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """The same along a completion."""
        if any(not rollout.other_rewards for rollout in rollouts):
            raise ValueError("The leave-one-out mean needs probes with at least 2 completions of each prompt.")
        return [np.full(len(rollout.completion_ids) + 1, np.mean(rollout.other_rewards)) for rollout in rollouts]


class TokenCritic:
    """
    A value for every token: the critic of VAPO and PPO, or a reward model.

    Args:
        network (`nn.Module`):
            As [`~trl_credit.critics.token.make_token_critic`] makes it, on its device.
        name (`str`, *optional*, defaults to `"token critic"`):
            What it is called in a report.
        batch_size (`int`, *optional*, defaults to `32`):
            Completions that are read at a time.
    """

    def __init__(self, network: nn.Module, name: str = "token critic", batch_size: int = 32):
        self.network, self.name, self.batch_size = network.eval(), name, batch_size

    @classmethod
    def from_pretrained(cls, path: str, tokenizer=None, batch_size: int = 32, **model_init_kwargs) -> "TokenCritic":
        """
        A critic or a reward model that was saved.

        Args:
            path (`str`):
                A folder or Hub id.
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                The policy's. One of another vocabulary beside the critic is an error.
            batch_size (`int`, *optional*, defaults to `32`):
                Completions that are read at a time.
            model_init_kwargs:
                Of `from_pretrained`.
        """
        refuse_causal_lm(path)
        if tokenizer is not None and _has_other_vocabulary(path, tokenizer):
            raise ValueError(
                f"The critic {path} has another vocabulary than the policy, whose tokens it would be given."
            )
        network = on_device(make_token_critic(path, model_init_kwargs=model_init_kwargs))
        return cls(network, path, batch_size)

    @torch.no_grad()
    def values(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """As the trainers read them."""
        found: list[Any] = [None] * len(rollouts)
        # Sorted by length, for little padding.
        order = sorted(
            range(len(rollouts)), key=lambda i: len(rollouts[i].prompt_ids) + len(rollouts[i].completion_ids)
        )
        device = next(self.network.parameters()).device
        for at in range(0, len(order), self.batch_size):
            rows = order[at : at + self.batch_size]
            batch = {name: x.to(device) for name, x in padded([rollouts[row] for row in rows]).items()}
            values = read_values(self.network, batch).double().cpu().numpy()
            for row, line in zip(rows, values, strict=True):
                found[row] = line[: len(rollouts[row].completion_ids) + 1]
        return found


class PromptCritic:
    """
    A value for the prompt alone, held along the completion: the critic of SPPO.

    Args:
        network (`nn.Module`):
            As [`~trl_credit.SPPOTrainer`] trains it, on its device.
        tokenizer (`PreTrainedTokenizerBase`):
            The critic's own.
        critic_loss (`str`, *optional*, defaults to `"bce"`):
            What it was trained with. With `"bce"` it answers a logit, with `"mse"` the value.
        reward_range (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            That of its training with `"bce"`.
        name (`str`, *optional*, defaults to `"prompt critic"`):
            What it is called in a report.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts that are read at a time.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer,
        critic_loss: str = "bce",
        reward_range: tuple[float, float] = (0.0, 1.0),
        name: str = "prompt critic",
        batch_size: int = 32,
    ):
        if critic_loss not in ("bce", "mse"):
            raise ValueError(f"`critic_loss` must be 'bce' or 'mse', got {critic_loss!r}.")
        self.network, self.tokenizer, self.name, self.batch_size = network.eval(), tokenizer, name, batch_size
        self.critic_loss, self.reward_range = critic_loss, reward_range

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        critic_loss: str = "bce",
        reward_range: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 32,
        **model_init_kwargs,
    ) -> "PromptCritic":
        """
        A critic that was saved.

        Args:
            path (`str`):
                A folder or Hub id, its tokenizer beside it.
            critic_loss, reward_range, batch_size:
                As above.
            model_init_kwargs:
                Of `from_pretrained`.
        """
        refuse_causal_lm(path)
        network = on_device(make_token_critic(path, model_init_kwargs=model_init_kwargs))
        return cls(network, load_critic_tokenizer(path), critic_loss, reward_range, f"prompt:{path}", batch_size)

    @torch.no_grad()
    def values(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """The same along a completion; each prompt is read once."""
        numbers = [rollout.group for rollout in rollouts]
        prompts = {rollout.group: rollout.prompt for rollout in rollouts}
        device = next(self.network.parameters()).device
        found: dict[int, float] = {}
        for at in range(0, len(prompts), self.batch_size):
            groups = list(prompts)[at : at + self.batch_size]
            ids = tokenize_prompts(self.tokenizer, [prompts[group] for group in groups])
            outputs = read_prompts(self.network, pad_prompts(ids).to(device)).double()
            if self.critic_loss == "bce":
                low, high = self.reward_range
                outputs = low + (high - low) * outputs.sigmoid()
            found |= dict(zip(groups, outputs.tolist(), strict=True))
        return [np.full(len(r.completion_ids) + 1, found[n]) for r, n in zip(rollouts, numbers, strict=True)]


class GenerativeCritic:
    """
    A value that is written out: the critic of GenAC. It is asked about the states in `cuts`, once each.

    Args:
        network (`nn.Module`):
            As [`~trl_credit.critics.generative.network.make_generative_critic`] makes it, on its device.
        tokenizer (`PreTrainedTokenizerBase`):
            The critic's.
        policy_tokenizer (`PreTrainedTokenizerBase`):
            The policy's, whose tokens the completions are.
        template (`str`, *optional*):
            What it is asked, see [`~trl_credit.GenACConfig`]. Default: that of the trainer.
        actor_description (`str`, *optional*, defaults to `"A language model"`):
            Who writes the solutions, for the template.
        success_rate (`float`, *optional*):
            What it is told of the policy. Default: the mean reward of the completions.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Longest answer, in tokens.
        name (`str`, *optional*, defaults to `"generative critic"`):
            What it is called in a report.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Tokens of the sequences that are generated together.

    `parse_rate` is the share of the latest answers that had a score, `tokens` how many tokens their questions and they
    had. A state without a score gets the mean of the others, as the trainer gives it the mean value.
    """

    parse_rate: float = math.nan
    tokens: int = 0

    def __init__(
        self,
        network: Any,
        tokenizer,
        policy_tokenizer,
        template: str = TEMPLATE,
        actor_description: str = "A language model",
        success_rate: float | None = None,
        max_completion_length: int = 1024,
        name: str = "generative critic",
        batch_tokens: int = 16384,
    ):
        check_template(template, ("problem", "partial_solution"))
        self.network, self.tokenizer, self.policy_tokenizer = network.eval(), tokenizer, policy_tokenizer
        self.template, self.actor_description, self.success_rate = template, actor_description, success_rate
        self.max_completion_length, self.name, self.batch_tokens = max_completion_length, name, batch_tokens

    @classmethod
    def from_pretrained(cls, path: str, policy_tokenizer, dtype="auto", **settings) -> "GenerativeCritic":
        """
        A critic that was saved, its tokenizer beside it.

        Args:
            path (`str`):
                A folder or Hub id.
            policy_tokenizer, settings:
                As above.
            dtype (`str`, *optional*, defaults to `"auto"`):
                Of its weights.
        """
        network = on_device(make_generative_critic(path, model_init_kwargs={"dtype": dtype}))
        return cls(
            network, AutoTokenizer.from_pretrained(path), policy_tokenizer, name=f"generative:{path}", **settings
        )

    def values(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """Sampled, with the same random numbers every time."""
        rate = self.success_rate
        if rate is None:
            rate = float(np.mean([rollout.reward for rollout in rollouts if not math.isnan(rollout.reward)]))
        prompts = [prompt for rollout in rollouts for prompt in self._prompts(rollout, rate)]
        with seeded(0):
            answers = sample_answers(
                self.network,
                prompts,
                self._sampling(),
                chunks_within([len(ids) + self.max_completion_length for ids in prompts], self.batch_tokens),
            )
        self.tokens = sum(map(len, prompts)) + sum(map(len, answers))
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        scores = np.array([np.nan if score is None else score for score in map(parse_score, texts)], dtype=float)
        parsed = ~np.isnan(scores)
        self.parse_rate = float(parsed.mean())
        values = np.where(parsed, scores, scores[parsed].mean() if parsed.any() else rate)
        ends = np.cumsum([len(rollout.cuts) for rollout in rollouts])
        return [_held(part, rollout) for part, rollout in zip(np.split(values, ends[:-1]), rollouts, strict=True)]

    def _prompts(self, rollout: Rollout, rate: float) -> list[list[int]]:
        ends = sorted({*rollout.cuts, len(rollout.completion_ids)} - {0})
        # One more, empty, so that there is a state after the last token.
        texts = [*segment_texts(rollout.completion_ids, ends, self.policy_tokenizer), ""]
        query = critic_query(self.tokenizer, self.template, rollout.prompt, texts, self.actor_description, rate)
        asked = dict(zip([0, *ends], query.prompts(), strict=True))
        return [asked[cut] for cut in rollout.cuts]

    def _sampling(self) -> GenerationConfig:
        tokenizer, config = self.tokenizer, self.network.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        return GenerationConfig(
            max_new_tokens=self.max_completion_length,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=sorted({*ends, tokenizer.eos_token_id} - {None}),
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )


def _held(values: np.ndarray, rollout: Rollout) -> np.ndarray:
    """Each value up to the next cut."""
    states = np.arange(len(rollout.completion_ids) + 1)
    return values[np.clip(np.searchsorted(rollout.cuts, states, side="right") - 1, 0, None)]


def refuse_causal_lm(path: str) -> None:
    """Raise for a checkpoint that has no value head, and would be given one that knows nothing."""
    if (Path(path) / "adapter_config.json").is_file():
        return
    architectures = AutoConfig.from_pretrained(path).architectures or []
    if any(name.endswith("ForCausalLM") for name in architectures):
        raise ValueError(f"{path} is a causal LM ({architectures[0]}), which has no values: give a critic.")


def on_device(network: nn.Module) -> nn.Module:
    """On the GPU if there is one."""
    return network.to("cuda" if torch.cuda.is_available() else "cpu")


def padded(rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, completions on the right, as a trainer's rollout has them."""
    width, length = (max(len(ids) for ids in column) for column in _ids(rollouts))
    batch: dict[str, list] = {"prompt_ids": [], "prompt_mask": [], "completion_ids": [], "completion_mask": []}
    for rollout in rollouts:
        left, right = width - len(rollout.prompt_ids), length - len(rollout.completion_ids)
        batch["prompt_ids"].append([0] * left + rollout.prompt_ids)
        batch["prompt_mask"].append([0] * left + [1] * len(rollout.prompt_ids))
        batch["completion_ids"].append(rollout.completion_ids + [0] * right)
        batch["completion_mask"].append([1] * len(rollout.completion_ids) + [0] * right)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def _ids(rollouts):
    return [r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts]


def _has_other_vocabulary(path: str, tokenizer) -> bool:
    try:
        own = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):  # none was saved with it
        return False
    return own.get_vocab() != tokenizer.get_vocab()
