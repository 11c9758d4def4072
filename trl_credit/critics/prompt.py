"""A value for a whole prompt, from a critic that may have its own tokenizer and chat template."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer

from ..credit.bounded_values import bounded_values
from .batches import evaluate_evenly, shares_of_batches
from .critic import Critic, Runner, nan_beyond_the_end, on_device
from .facts import CriticFacts, fingerprint
from .prompt_tokens import PAD, critic_prompts, pad_prompts, tokenize_prompts
from .refusals import refuse_causal_lm, refuse_images
from .token import make_token_critic, read_values


# Keyword arguments of a model's `from_pretrained` that its tokenizer shares.
_SHARED_KWARGS = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder")


class PromptCritic(Critic):
    """
    One value for the prompt, held constant along the completion: the critic of SPPO.

    Args:
        network (`nn.Module` or [`~trl_credit.critics.critic.Runner`]):
            As [`~trl_credit.SPPOTrainer`] trains it, on its device, or what runs it.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The critic's own tokenizer, with which it reads the prompts of the dataset. Default: it reads the prompts as
            the policy read them, in the policy's tokens.
        critic_loss (`str`, *optional*, defaults to `"bce"`):
            The loss it is trained with. With `"bce"` it outputs a logit, with `"mse"` the value.
        reward_range (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            The reward range of its training with `"bce"`.
        name (`str`, *optional*, defaults to `"prompt critic"`):
            What it is called in a report.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts that are read at a time; of shorter ones more, as long as they have no more tokens than so many of
            the longest.
        batch_tokens (`int`, *optional*, defaults to `0`):
            Tokens that may be read at a time where that is more.
        tools (`list`, *optional*):
            Those of the policy, for chat templates that show them.
        template_kwargs (`dict`, *optional*):
            Further arguments of the chat template.
        prompt_template (`str`, *optional*):
            What it reads in the place of the prompt, see [`~trl_credit.critics.prompt_tokens.critic_prompts`].
    """

    kind = "prompt"

    def __init__(
        self,
        network: nn.Module | Runner,
        tokenizer=None,
        critic_loss: str = "bce",
        reward_range: Sequence[float] = (0.0, 1.0),
        name: str = "prompt critic",
        batch_size: int = 32,
        batch_tokens: int = 0,
        tools: list | None = None,
        template_kwargs: dict | None = None,
        prompt_template: str | None = None,
    ):
        if critic_loss not in ("bce", "mse"):
            raise ValueError(f"`critic_loss` must be 'bce' or 'mse', got {critic_loss!r}.")
        super().__init__(network, name)
        self.tokenizer, self.prompts_at_once, self.batch_tokens = tokenizer, batch_size, batch_tokens
        self.critic_loss, self.reward_range = critic_loss, reward_range
        self.tools, self.template_kwargs, self.prompt_template = tools, template_kwargs, prompt_template

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        critic_loss: str = "bce",
        reward_range: Sequence[float] = (0.0, 1.0),
        batch_size: int = 32,
        policy_tokenizer=None,
        **model_init_kwargs,
    ) -> "PromptCritic":
        """
        A critic that was saved.

        Args:
            path (`str`):
                A folder or Hub id, its tokenizer beside it.
            critic_loss, reward_range, batch_size:
                As above. At their defaults they are taken from the critic's `critic.json`.
            policy_tokenizer (`PreTrainedTokenizerBase`, *optional*):
                The policy's. A critic that was trained to read what such a policy read still does so.
            model_init_kwargs:
                Of `from_pretrained`.
        """
        facts = CriticFacts.load(path, model_init_kwargs)
        settings: dict[str, Any] = {"critic_loss": critic_loss, "reward_range": list(reward_range)}
        reads_policys_tokens = False
        if facts is not None:
            facts.refuse_other_kind(cls.kind, path)
            settings = facts.agreed(settings, {"critic_loss": "bce", "reward_range": [0.0, 1.0]}, path)
            settings["template_kwargs"] = facts.template_kwargs
            settings["prompt_template"] = facts.settings.get("critic_prompt_template")
            if policy_tokenizer is not None and not facts.own_tokenizer and settings["prompt_template"] is None:
                reads_policys_tokens = facts.tokenizer == fingerprint(policy_tokenizer)
        refuse_causal_lm(path)
        network = on_device(make_token_critic(path, model_init_kwargs=model_init_kwargs))
        tokenizer = None if reads_policys_tokens else load_critic_tokenizer(path)
        return cls(network, tokenizer, name=f"prompt:{path}", batch_size=batch_size, **settings)

    def state_values(self, rollout: dict) -> torch.Tensor:
        """See [`~trl_credit.critics.critic.Critic.state_values`]; the value of every state is its prompt's."""
        values = self.prompt_values(self.prompts(rollout)[0])
        states = rollout["completion_ids"].shape[1] + 1
        return nan_beyond_the_end(values.unsqueeze(1).expand(-1, states), rollout)

    def prompts(self, rollout: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The prompts of a rollout in the critic's tokens.

        Args:
            rollout (`dict`):
                See [`~trl_credit.critics.critic.Critic.state_values`].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Prompts of shape `(B, P)`, padded on the left with -1, with the same P
            on every process; and which of them were cut to fit the critic's context, shape `(B,)`, keeping their end.

        Raises:
            ValueError: If the rollout has images, or tokens that the critic does not know.
        """
        refuse_images(rollout)
        if self.tokenizer is None:  # exactly what the policy has read
            prompts = torch.where(rollout["prompt_mask"].bool(), rollout["prompt_ids"], PAD)
        else:
            texts = critic_prompts(self.prompt_template, rollout)
            ids = tokenize_prompts(self.tokenizer, texts, self.tools, self.template_kwargs)
            prompts = pad_prompts(ids).to(next(self.network.parameters()).device)
        config = self.network.config.get_text_config()
        if prompts.max() >= config.vocab_size:
            whose = "the policy's tokenizer" if self.tokenizer is None else type(self.tokenizer).__name__
            raise ValueError(
                f"A prompt has token {prompts.max().item()}, but the critic knows {config.vocab_size} tokens: {whose} "
                "is not its tokenizer. Pass its own as `critic_processing_class`."
            )
        context = getattr(config, "max_position_embeddings", None)
        is_cut = (prompts != PAD).sum(1) > (math.inf if context is None else context)
        prompts = prompts if context is None else prompts[:, -context:]
        widest = self.runner.gather(torch.tensor([prompts.shape[1]], device=prompts.device)).max().item()
        return F.pad(prompts, (int(widest) - prompts.shape[1], 0), value=PAD), is_cut

    def prompt_values(self, prompts: torch.Tensor) -> torch.Tensor:
        """
        Values of prompts, in units of the reward. Each distinct prompt goes through the critic once, on one process.

        Args:
            prompts (`torch.Tensor`):
                Of [`prompts`], shape `(B, P)`.

        Returns:
            `torch.Tensor`: Shape `(B,)`.
        """
        distinct, prompt_of_row = self.runner.gather(prompts).unique(dim=0, return_inverse=True)

        def read(network: nn.Module, index: torch.Tensor) -> torch.Tensor:
            return read_prompts(network, distinct[index])

        lengths = _lengths(distinct)
        outputs = evaluate_evenly(self.runner, lengths, self._tokens_at_once(lengths), read)
        start = self.runner.process_index * len(prompts)
        outputs = outputs[prompt_of_row[start : start + len(prompts)]]
        return bounded_values(outputs, self.reward_range if self.critic_loss == "bce" else None)

    def batches(self, distinct: torch.Tensor) -> list[torch.Tensor]:
        """
        This process's share of prompts that all processes have, in batches to train on: indices, as in
        [`~trl_credit.critics.batches.shares_of_batches`].
        """
        lengths = _lengths(distinct)
        if not lengths:
            return []
        shares = shares_of_batches(lengths, self._tokens_at_once(lengths), self.runner.num_processes)
        return [index.to(distinct.device) for index in shares[self.runner.process_index]]

    def _tokens_at_once(self, lengths: list[int]) -> int:
        return max(self.batch_tokens, self.prompts_at_once * max(lengths))


def _lengths(prompts: torch.Tensor) -> list[int]:
    return (prompts != PAD).sum(1).tolist()


def load_critic_tokenizer(source: str | Path, model_init_kwargs: dict | None = None) -> Any:
    """
    The tokenizer of a critic's checkpoint.

    Args:
        source (`str` or `Path`):
            Its folder or Hub id.
        model_init_kwargs (`dict`, *optional*):
            Those of the critic: its revision and the like also apply to the tokenizer.

    Raises:
        ValueError: If the checkpoint has no tokenizer.
    """
    kwargs = {name: value for name, value in (model_init_kwargs or {}).items() if name in _SHARED_KWARGS}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    except (OSError, ValueError):
        tokenizer = None
    # For some architectures one is made up where there is none: it has no words.
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"The critic {str(source)!r} comes without a tokenizer. Pass `critic_processing_class`: the one it was "
            "trained with."
        )
    return tokenizer


def read_prompts(network: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    """
    What a critic answers at the last token of each prompt.

    Args:
        network (`nn.Module`):
            A critic, wrapped or not.
        prompts (`torch.Tensor`):
            Of [`pad_prompts`], shape `(B, P)`.

    Returns:
        `torch.Tensor`: `(B,)`, float32, with gradient.
    """
    mask = (prompts != PAD).long()
    none = prompts[:, :0]
    inputs = {"prompt_ids": prompts.clamp(min=0), "prompt_mask": mask, "completion_ids": none, "completion_mask": none}
    return read_values(network, inputs).squeeze(1)
