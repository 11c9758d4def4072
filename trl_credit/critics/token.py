"""A value for every state of a sequence: a token-classification model with one label, plain to save and to load."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..credit.bounded_values import bounded_values
from .adapters import with_new_adapters, with_saved_adapters
from .backbone import new_token_classifier, token_classifier
from .batches import evaluate_evenly, gather_rows, shares_of_batches
from .critic import Critic, Runner, nan_beyond_the_end, on_device
from .facts import CriticFacts
from .prompt_tokens import PAD, critic_prompts, pad_prompts, tokenize_prompts
from .refusals import has_other_vocabulary, refuse_causal_lm, refuse_images


# What [`read_values`] reads.
READ = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
# What the last layer of a token- or sequence-classification model is called.
_HEADS = ("score", "classifier")
_HEAD_IS_THERE = (
    "The critic has a head that has learned already, which cannot start at `critic_initial_value` (an output of {:g}). "
    "Leave that option out, or start from a checkpoint without a head."
)


class TokenCritic(Critic):
    """
    A value for every token: the critic of VAPO and PPO, or a reward model.

    Args:
        network (`nn.Module` or [`~trl_credit.critics.critic.Runner`]):
            As created by [`make_token_critic`], on its device, or what runs it.
        name (`str`, *optional*, defaults to `"token critic"`):
            What it is called in a report.
        batch_size (`int`, *optional*, defaults to `32`):
            Completions that are read at a time; of shorter ones more, as long as they have no more tokens than so many
            of the longest.
        batch_tokens (`int`, *optional*, defaults to `0`):
            Tokens that may be read at a time where that is more.
        reward_range (`Sequence[float]`, *optional*):
            The range of the reward, for a network that puts out the logit of a value within it. Default: it puts out
            the value.
        prompt_template (`str`, *optional*):
            What it reads in the place of the prompt, see [`~trl_credit.critics.prompt_tokens.critic_prompts`]. Default:
            the policy's prompt.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The policy's, which a template needs.
        tools (`list`, *optional*):
            Those of the policy, for chat templates that show them.
        template_kwargs (`dict`, *optional*):
            Further arguments of the chat template.
    """

    kind = "token"

    def __init__(
        self,
        network: nn.Module | Runner,
        name: str = "token critic",
        batch_size: int = 32,
        batch_tokens: int = 0,
        reward_range: Sequence[float] | None = None,
        prompt_template: str | None = None,
        tokenizer=None,
        tools: list | None = None,
        template_kwargs: dict | None = None,
    ):
        super().__init__(network, name)
        self.batch_size: int = batch_size
        self.batch_tokens = batch_tokens
        self.reward_range, self.prompt_template = reward_range, prompt_template
        self.tokenizer, self.tools, self.template_kwargs = tokenizer, tools, template_kwargs

    @classmethod
    def from_pretrained(cls, path: str, tokenizer=None, batch_size: int = 32, **model_init_kwargs) -> "TokenCritic":
        """
        A critic or a reward model that was saved.

        Args:
            path (`str`):
                A folder or Hub id.
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                The policy's. A tokenizer with another vocabulary beside the critic is an error.
            batch_size (`int`, *optional*, defaults to `32`):
                Completions that are read at a time.
            model_init_kwargs:
                Of `from_pretrained`.
        """
        facts = CriticFacts.load(path, model_init_kwargs)
        if facts is not None:
            facts.refuse_other_kind(cls.kind, path)
        refuse_causal_lm(path)
        if tokenizer is not None and has_other_vocabulary(path, tokenizer):
            raise ValueError(
                f"The critic {path} has another vocabulary than the policy, whose tokens it would be given."
            )
        network = on_device(make_token_critic(path, model_init_kwargs=model_init_kwargs))
        if facts is None:
            return cls(network, path, batch_size)
        template = facts.settings.get("critic_prompt_template")
        if template is not None and tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path)
        return cls(
            network,
            path,
            batch_size,
            reward_range=facts.settings.get("reward_range"),
            prompt_template=template,
            tokenizer=tokenizer,
            template_kwargs=facts.template_kwargs,
        )

    def state_values(self, rollout: dict) -> torch.Tensor:
        """See [`~trl_credit.critics.critic.Critic.state_values`]; its outputs are read by [`read_values`]."""
        refuse_images(rollout)
        rollout = {**rollout, **self.own_prompts(rollout)}
        rows = gather_rows(self.runner, {name: rollout[name] for name in READ})

        def read(network: nn.Module, index: torch.Tensor) -> torch.Tensor:
            return read_values(network, {name: x[index] for name, x in rows.items()})

        lengths = _lengths(rows)
        outputs = evaluate_evenly(self.runner, lengths, self._tokens_at_once(lengths), read)
        return self._values(outputs, rollout)

    def values_as_read(self, parts: list[dict[str, torch.Tensor]], rollout: dict) -> torch.Tensor:
        """
        What [`state_values`] would have returned, from what [`read_values`] has returned for the [`batches`] of a
        rollout: this process's, each with its `row` and `outputs`. Every process must call this.
        """
        row, outputs = (self.runner.gather(torch.cat([part[name] for part in parts])) for name in ("row", "outputs"))
        in_order = torch.empty_like(outputs)
        in_order[row] = outputs
        return self._values(in_order, rollout)

    def _values(self, outputs: torch.Tensor, rollout: dict) -> torch.Tensor:
        """Those of a rollout, from the outputs for the rows of all processes."""
        count, tokens = rollout["completion_ids"].shape
        own = outputs[self.runner.process_index * count :][:count, : tokens + 1]
        return nan_beyond_the_end(bounded_values(own, self.reward_range), rollout)

    def batches(self, rows: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """
        Rows of all processes, divided anew among them, in batches to train on.

        Args:
            rows (`dict[str, torch.Tensor]`):
                This process's: what [`read_values`] reads, and anything else of shape `(B,)` or `(B, T)`. Every process
                must call this, with equally many.

        Returns:
            `list[dict[str, torch.Tensor]]`: As many batches for every process, of about the same tokens; with the
            number of each row among those of all processes, `row`.
        """
        rows = dict(gather_rows(self.runner, rows))
        rows["row"] = torch.arange(len(rows["completion_ids"]), device=rows["completion_ids"].device)
        lengths = _lengths(rows)
        shares = shares_of_batches(lengths, self._tokens_at_once(lengths), self.runner.num_processes)
        return [{name: x[index] for name, x in rows.items()} for index in shares[self.runner.process_index]]

    def _tokens_at_once(self, lengths: list[int]) -> int:
        return max(self.batch_tokens, self.batch_size * max(lengths))

    def own_prompts(self, rollout: dict) -> dict[str, torch.Tensor]:
        """
        `prompt_ids` and `prompt_mask` of what it reads in the place of the policy's prompts; empty without a template.

        Args:
            rollout (`dict`):
                See [`~trl_credit.critics.critic.Critic.state_values`].
        """
        if self.prompt_template is None:
            return {}
        texts = critic_prompts(self.prompt_template, rollout)
        ids = pad_prompts(tokenize_prompts(self.tokenizer, texts, self.tools, self.template_kwargs))
        ids = ids.to(rollout["completion_ids"].device)
        mask = ids != PAD
        lengths = mask.sum(1) + rollout["completion_mask"].sum(1)
        context = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and lengths.max() > context:
            raise ValueError(
                f"With `critic_prompt_template` a prompt and its completion have {lengths.max().item()} tokens, and "
                f"the critic's context is {context}. Shorten what the template adds, or `max_completion_length`."
            )
        return {"prompt_ids": ids.clamp(min=0), "prompt_mask": mask.long()}


class Float32Head(nn.Linear):
    """A linear layer that computes in float32, whatever its input, weights and autocast: bf16 has only 3 digits."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(states.float(), self.weight.float(), bias)


def make_token_critic(
    source: str | Path | PreTrainedModel,
    initial_value: float = 0.0,
    peft_config: Any = None,
    model_init_kwargs: dict | None = None,
) -> nn.Module:
    """
    Make a critic out of a checkpoint or a model.

    A head that comes with `source` (a critic, a reward model) is kept. A fresh one starts at zero with a bias of
    `initial_value`, so that the value of every state is `initial_value` until the first update. The head is in float32,
    and all dropout is off.

    Args:
        source (`str`, `Path` or `PreTrainedModel`):
            A folder or Hub id of any checkpoint that `AutoModelForTokenClassification` can start from: a causal LM, a
            reward model (sequence classification with one label), a critic, or the adapter of a LoRA critic. Or a model
            in memory: one for token classification is used as it is; from any other the weights are copied.
        initial_value (`float`, *optional*, defaults to `0.0`):
            What a fresh head outputs everywhere, e.g. 0 or the mean reward.
        peft_config (`~peft.PeftConfig`, *optional*):
            Train adapters and the head instead of all weights.
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained`; `dtype` defaults to `"float32"`. For a model in memory whose weights
            are copied, only the `dtype` of the copy can be set.

    Returns:
        `nn.Module`: The critic, a `PreTrainedModel` or a `PeftModel`. [`read_values`] calls it.

    Raises:
        ValueError: If `initial_value` is not 0 and the head is already trained.
    """
    kwargs = {"dtype": "float32", **(model_init_kwargs or {})}
    network: Any
    if isinstance(source, PreTrainedModel):
        network, fresh = _from_model(source, refuse_kwargs_of_a_model(source, model_init_kwargs))
    elif (Path(source) / "adapter_config.json").is_file():
        if initial_value:
            raise ValueError(_HEAD_IS_THERE.format(initial_value))
        return _from_adapter(source, peft_config, kwargs)
    else:
        network, fresh = _from_checkpoint(str(source), kwargs)
    return finish_token_critic(network, initial_value, peft_config, fresh)


def finish_token_critic(
    network: PreTrainedModel, initial_value: float = 0.0, peft_config=None, fresh: bool = True
) -> nn.Module:
    """
    What every critic gets: a head in float32, no dropout, and adapters if asked for.

    Args:
        network (`PreTrainedModel`):
            A model for token classification with one label.
        initial_value (`float`, *optional*, defaults to `0.0`):
            What a fresh head answers everywhere.
        peft_config (`~peft.PeftConfig`, *optional*):
            Train adapters and the head instead of all weights.
        fresh (`bool`, *optional*, defaults to `True`):
            Whether the head is untrained.
    """
    network.config.use_cache = False
    head = _use_float32_head(network)
    if initial_value and not fresh:
        raise ValueError(_HEAD_IS_THERE.format(initial_value))
    if fresh:
        with _whole(head):
            nn.init.zeros_(head.weight)
            if head.bias is not None:
                nn.init.constant_(head.bias, initial_value)
    if initial_value and head.bias is None:
        raise ValueError(f"{type(network).__name__} has a head without bias, which cannot start at {initial_value}.")
    turn_dropout_off(network)
    if peft_config is not None:
        network = _add_adapters(network, peft_config)  # type: ignore[assignment]
    return network


def _lengths(rows: dict[str, torch.Tensor]) -> list[int]:
    return (rows["prompt_mask"].sum(1) + rows["completion_mask"].sum(1)).tolist()


def read_values(network: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    What a critic puts out for all states of the completions: their values, or the logits of bounded ones.

    A state's value is read at the last token before the choice: for the first token of a completion, at the last token
    of its prompt.

    Args:
        network (`nn.Module`):
            A critic, wrapped or not.
        inputs (`dict`):
            `prompt_ids`, `prompt_mask` of shape `(B, P)`, padded on either side; `completion_ids`, `completion_mask` of
            shape `(B, T)`, padded on the right. Columns of padding alone are not read.

    Returns:
        `torch.Tensor`: `(B, T + 1)`, float32, with gradient. Column t is the state in which token t is chosen, and
        column l, of a completion of l tokens, the state after its last one; what follows is not to be used.
    """
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
    # Tokens first, padding last: rows begin at position 0, whatever the architecture makes of padding on the left, and
    # are not wider than their tokens.
    order = mask.byte().argsort(dim=1, descending=True, stable=True)[:, : mask.sum(1).max()]
    logits = network(input_ids=ids.gather(1, order), attention_mask=mask.gather(1, order).long()).logits
    if logits.shape[-1] != 1:
        raise ValueError(f"A critic must have one label, but {type(network).__name__} has {logits.shape[-1]}.")
    columns = torch.arange(inputs["completion_ids"].shape[1] + 1, device=ids.device)
    states = inputs["prompt_mask"].sum(1, keepdim=True) - 1 + columns
    return logits[:, :, 0].float().gather(1, states.clamp(max=order.shape[1] - 1))


def head_of(network: nn.Module) -> Any:
    """The last layer of a critic, or its trained copy when it has adapters."""
    for name in _HEADS:
        if hasattr(network, name):
            return getattr(network, name)
    raise ValueError(f"{type(network).__name__} has no head named one of {_HEADS}, so it cannot be a critic.")


def _from_checkpoint(source: str, kwargs: dict) -> tuple[PreTrainedModel, bool]:
    shared = {name: x for name, x in kwargs.items() if name in ("revision", "trust_remote_code", "token", "cache_dir")}
    config = AutoConfig.from_pretrained(source, **shared)
    is_classifier = any(name.endswith("Classification") for name in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ValueError(f"A critic must have one label, but {source} has {config.num_labels}.")
    kind = token_classifier(config)
    network, info = kind.from_pretrained(source, num_labels=1, output_loading_info=True, **kwargs)
    missing = set(info["missing_keys"])
    fresh = any(f"{name}.weight" in missing for name in _HEADS)
    backbone = [key for key in missing if not key.startswith(_HEADS)]
    if backbone:
        raise ValueError(f"The checkpoint {source!r} lacks weights of a {type(network).__name__}: {backbone[:5]}.")
    if not fresh:  # a reward model has no bias
        head = head_of(network)
        if head.bias is not None and any(f"{name}.bias" in missing for name in _HEADS):
            with _whole(head):
                nn.init.zeros_(head.bias)
    return network, fresh


def refuse_kwargs_of_a_model(source: PreTrainedModel, model_init_kwargs: dict | None) -> Any:
    """The dtype for the copy of a model in memory, `None` for its own; raise for any other argument."""
    kwargs = dict(model_init_kwargs or {})
    dtype = kwargs.pop("dtype", None)
    if kwargs or (dtype is not None and "TokenClassification" in type(source).__name__):
        raise ValueError(
            f"`critic_model_init_kwargs={model_init_kwargs}` has no effect on a critic that is already a model "
            f"({type(source).__name__}). Pass a path or a Hub id, or drop the kwargs."
        )
    return getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype


def _from_model(source: PreTrainedModel, dtype: Any = None) -> tuple[PreTrainedModel, bool]:
    if "TokenClassification" in type(source).__name__:
        if source.config.num_labels != 1:
            raise ValueError(f"A critic must have one label, but {type(source).__name__} has {source.num_labels}.")
        return source, False
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"With ZeRO-3 the weights of a {type(source).__name__} in memory are already split over the processes and "
            "cannot be copied into a critic. Pass `critic` as a path or a Hub id."
        )
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    network = new_token_classifier(config, dtype or source.dtype)
    missing, _ = network.load_state_dict(source.state_dict(), strict=False)
    backbone = [key for key in missing if not key.startswith(_HEADS)]
    if backbone:
        raise ValueError(f"A {type(source).__name__} lacks weights of a {type(network).__name__}: {backbone[:5]}.")
    fresh = any(key.endswith("weight") for key in missing)
    if not fresh and missing:
        nn.init.zeros_(head_of(network).bias)
    network.name_or_path = source.name_or_path
    return network, fresh


def _from_adapter(source, peft_config, kwargs: dict) -> nn.Module:
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(source).base_model_name_or_path
    network: Any
    network, _ = _from_checkpoint(base, kwargs)
    return add_saved_adapters(network, source, peft_config)


def add_saved_adapters(network: PreTrainedModel, source: str | Path, peft_config=None) -> nn.Module:
    """
    A critic with the adapters and the head of an earlier run, still trainable.

    Args:
        network (`PreTrainedModel`):
            A model for token classification with one label, the base of the adapters.
        source (`str` or `Path`):
            Folder of the adapters.
        peft_config (`~peft.PeftConfig`, *optional*):
            Must be `None`: the saved adapters have their own.
    """
    network.config.use_cache = False
    _use_float32_head(network)
    critic = with_saved_adapters(network, source, peft_config)
    turn_dropout_off(critic)
    return critic


def _use_float32_head(network: PreTrainedModel) -> Any:
    head = head_of(network)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"The head of a {type(network).__name__} is a {type(head).__name__}; a critic needs a linear layer."
        )
    head.__class__ = Float32Head
    return head.float()


def turn_dropout_off(network: nn.Module) -> None:
    """Set every dropout rate of a network to 0."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # attention layers keep a number
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _add_adapters(network: Any, peft_config: Any) -> nn.Module:
    # The task's type has the head trained and saved with the adapters; "all-linear" would put one on it as well.
    network = with_new_adapters(network, peft_config, "TOKEN_CLS", without=_HEADS)
    head = head_of(network.get_base_model())
    if not any(p.requires_grad for p in head.parameters()):
        raise ValueError("`critic_peft_config` leaves the head of the critic untrained.")
    return network


def _whole(module: nn.Module):
    """All of a module's weights on this process, also where ZeRO-3 has split them as they were made."""
    parameters = list(module.parameters())
    if not any(hasattr(p, "ds_id") for p in parameters):
        return torch.no_grad()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
