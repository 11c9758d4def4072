"""
The seam with TRL: the one module that knows TRL's private names.

TRL has no hook for advantages finer than one number a completion. [`CreditTrainer`] makes one out of `GRPOTrainer` by
wrapping a few of its methods, never by copying their bodies. The trainers of this package see only the two hooks

- [`CreditTrainer.assign_credit`], once per rollout, and
- [`CreditTrainer.shape_loss`], once per loss,

and say there what their credit is. `tests/test_seam.py` checks every name, signature, key and shape of TRL relied on
here and names the one that moved; widening the version range below is then a change of one line.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from packaging.specifiers import SpecifierSet
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .model_card import add_credit_settings


TRL_VERSIONS = SpecifierSet(">=1.16,<1.17")

if version("trl") not in TRL_VERSIONS:
    raise ImportError(
        f"trl {version('trl')} is installed, but trl_credit {version('trl-credit')} works with trl{TRL_VERSIONS}: it "
        f"builds on private names of TRL that move between releases. Run `pip install 'trl{TRL_VERSIONS}'`."
    )

from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.generation.vllm_generation import VLLMGeneration  # noqa: E402
from trl.models import unwrap_model_for_generation  # noqa: E402
from trl.trainer.utils import (  # noqa: E402
    get_config_model_id,
    is_async_callable,
    maybe_gather_lm_head_ctx,
    shuffle_sequence_dict,
    split_tensor_dict,
)

from .credit_log import CreditLog, CreditLogConfig  # noqa: E402


logger = get_logger(__name__)

# Config fields by which an architecture transforms its logits after the LM head.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


@dataclass
class LossTerms:
    """
    What the policy loss is made of, for one micro-batch.

    Args:
        logps (`torch.Tensor`):
            Log-probabilities of the completion's tokens under the policy, shape `(B, T)`, with gradient.
        log_ratio (`torch.Tensor`):
            `logps` minus those of the policy that the update started from, shape `(B, T)`, float32, with gradient.
        advantages (`torch.Tensor`):
            Advantages, shape `(B, 1)` or `(B, T)`.
        mask (`torch.Tensor`):
            Trained tokens: neither padding nor tool output, shape `(B, T)`, boolean.
    """

    logps: torch.Tensor
    log_ratio: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor

    def replace(self, **changes) -> "LossTerms":
        """The same terms with some of them changed."""
        return replace(self, **changes)


class CreditTrainer(GRPOTrainer):
    """`GRPOTrainer` with hooks for credit assignment. Subclasses override the hooks and say what they are called."""

    args: GRPOConfig
    model: Any  # DDP, a DeepSpeed engine, an FSDP module, a PEFT model, ...
    config_class: type[GRPOConfig]
    # Metrics that TRL takes of a ratio which `shape_loss` has changed go under this name, apart from those of the true
    # ratio.
    shaped_prefix = "shaped"
    # Folders of a saved policy that hold other networks.
    folders_of_networks: tuple[str, ...] = ()
    # Whether a reward function may return a list of rewards for a completion, one per token.
    takes_token_rewards = False

    def __init__(self, model, reward_funcs=None, args=None, *rest, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self.config_class):
            raise TypeError(
                f"{type(self).__name__} needs `args` to be a {self.config_class.__name__}, got {type(args).__name__}."
            )
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        # Rewards per token of the latest rollout: {reward function: {row of this process: list}}.
        self._token_scores: dict[str, dict] = {}
        self.reward_funcs = [
            func if isinstance(func, nn.Module) else _checked_reward_func(func, name, self._token_scores_of(name))
            for func, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        if self.rollout_func is not None:
            self.rollout_func = _checked_rollout_func(self.rollout_func)
        self._scores: Any = None  # rewards per function of the latest rollout, over all processes
        # Rows of the dataset that the latest rollout of this process answers, `prompt` among their keys.
        self.rollout_rows: list[dict] = []
        self._loss: Any = None  # the `_Loss` being computed
        self._sums: dict[str, dict] = {"train": {}, "eval": {}}  # of metrics, see `log_means`
        self._step_inputs: list[dict] = []  # micro-batches of the optimizer step under way
        self._resume_from: str | None = None
        self._credit_log: CreditLog | None = None
        if isinstance(args, CreditLogConfig) and args.log_credit:
            self._credit_log = CreditLog(args, self.accelerator, self._tokenizer, self._name)
        self.add_callback(_BeginTraining(self))

    # --- Hooks

    def assign_credit(self, rollout: dict, rewards: torch.Tensor) -> dict:
        """
        Say what the credit of a rollout is.

        Args:
            rollout (`dict`):
                TRL's rollout of this process, `advantages` of shape `(B,)` among it.
            rewards (`torch.Tensor`):
                Weighted sum of the rewards as the reward functions gave them, shape `(B,)`; NaN where they gave none.

        Returns:
            `dict`: The rollout with other `advantages`, `(B,)` or `(B, T)`, and any further tensors whose first
            dimension is `B`: they are shuffled and split along with it.
        """
        return rollout

    def shape_loss(self, terms: LossTerms, mode: str) -> LossTerms:
        """
        Say what the policy loss is to see.

        Only the policy term follows: KL penalty, entropy bonus, off-policy mask and sampler correction keep the true
        log-probabilities.

        Args:
            terms (`LossTerms`):
                The terms of GRPO.
            mode (`str`):
                `"train"` or `"eval"`.

        Returns:
            `LossTerms`: Those with another `log_ratio` or `advantages`, or the very same object for no change.
        """
        return terms

    def extra_loss(self, terms: LossTerms, inputs: dict, mode: str) -> torch.Tensor | None:
        """
        Say what else the policy is to learn.

        Args:
            terms (`LossTerms`):
                The terms of GRPO.
            inputs (`dict`):
                The micro-batch.
            mode (`str`):
                `"train"` or `"eval"`.

        Returns:
            `torch.Tensor`: A further term of the loss, a scalar with gradient, or `None`. Terms of an optimizer step's
            micro-batches are added, and those of processes averaged.
        """
        return None

    def begin_step(self, micro_batches: list[dict], mode: str) -> None:
        """Called with all micro-batches of an optimizer step before the first of them is trained on; add what needs
        to be known of them together. In evaluation every batch is a step of its own."""

    def finish_step(self, micro_batches: list[dict]) -> None:
        """Called with the same when the policy's gradient is complete, before its optimizer steps."""

    def begin_training(self, checkpoint: str | None) -> None:
        """Called when the policy is on its devices, before its first step; with a checkpoint when the run resumes."""

    def save_networks(self, folder: Path) -> None:
        """Called on every process when the policy is saved: save other networks beside it."""

    def save_training_state(self, folder: Path) -> None:
        """Called on every process when a checkpoint is made: save what a resumed run needs."""

    # --- Services for the hooks

    def log_value(self, mode: str, name: str, value: float) -> None:
        """Log a number that is the same on all processes; the log shows the mean of those since the last one."""
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

    def token_mean_over_step(self, micro_batches: list[dict], mode: str) -> None:
        """
        Make the token mean of the policy loss exact. TRL divides by the tokens of the generation batch, shared out
        evenly over its optimizer steps; from here on by those of this very step, over micro-batches and processes.
        """
        if mode == "train":
            tokens = self.total(torch.stack([_trained_tokens(inputs).sum() for inputs in micro_batches]).sum())
            for inputs in micro_batches:
                inputs["num_items_in_batch"] = tokens * (self._rollout_parts / len(micro_batches))

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        return self.accelerator.reduce(x, reduction="sum")

    def trained_tokens(self, inputs: dict) -> torch.Tensor:
        """Tokens that the policy chose and is trained on, shape `(B, T)`, boolean."""
        return _trained_tokens(inputs)

    def is_cut_off(self, rollout: dict) -> torch.Tensor:
        """Which completions ended for want of room, not with an EOS token, shape `(B,)`; False where all is masked."""
        mask = rollout["completion_mask"].bool()
        last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
        last_ids = rollout["completion_ids"].gather(1, last)
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last_ids.device)
        return ~torch.isin(last_ids, ends).squeeze(1) & mask.any(1)

    def rewards_where_they_fall(self, rollout: dict, rewards: torch.Tensor) -> torch.Tensor:
        """
        The rewards of a rollout on its tokens.

        Returns:
            `torch.Tensor`: `rewards` itself, shape `(B,)`, if all reward functions gave one number for a completion;
            else `(B, T)`, with these numbers at the last trained token.
        """
        if not any(self._token_scores.values()):
            return rewards
        mask = _trained_tokens(rollout)
        on_tokens = torch.zeros(mask.shape, device=mask.device)
        for name, weight in zip(self.reward_func_names, self.reward_weights.tolist(), strict=True):
            for row, scores in self._token_scores.get(name, {}).items():
                on_tokens[row, : len(scores)] += weight * torch.tensor(scores, device=mask.device)
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        rest = torch.nan_to_num(rewards) - on_tokens.sum(1)
        on_tokens[torch.arange(len(mask), device=mask.device), last] += rest
        return on_tokens

    def rollouts(self, skip: int = 0, checkpoint: str | None = None):
        """
        Rollouts of the policy as it is, over and over the training data, without end.

        Args:
            skip (`int`, *optional*, defaults to `0`):
                How many to leave out at the start; none of them is generated.
            checkpoint (`str`, *optional*):
                Begin with its random numbers.

        Yields:
            `list[list[dict]]`: The micro-batches of each optimizer step that a rollout is enough for.
        """
        repeats = self._rollout_parts * self.num_iterations
        loader = self.get_train_dataloader()
        for epoch in itertools.count():
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            batches = itertools.islice(iter(loader), 0, None, repeats)
            empty = True
            while True:
                with torch.random.fork_rng(devices=[]):  # a loader draws a seed that it has no use for
                    batch = next(batches, None)
                if batch is None:
                    break
                empty = False
                if skip:
                    skip -= 1
                    continue
                if checkpoint is not None:
                    self._load_rng_state(checkpoint)
                    checkpoint = None
                self.model.train()
                rollout: Any = shuffle_sequence_dict(self._generate_and_score_completions(batch))
                parts = split_tensor_dict(rollout, self._rollout_parts)
                yield self._steps_of(parts)
            if empty:
                raise ValueError("The training data hold fewer prompts than one rollout needs.")

    def log_means(self, mode: str, sums_and_counts: dict[str, tuple]) -> None:
        """
        Log `sum / count` of each metric, over all micro-batches and processes since the last log: a mean over tokens,
        not one over micro-batches. A metric that counts nothing is left out.
        """
        for name, sum_and_count in sums_and_counts.items():
            pair = torch.stack([torch.as_tensor(x, dtype=torch.float32).detach() for x in sum_and_count])
            self._sums[mode][name] = self._sums[mode].get(name, 0) + pair.to(self.accelerator.device)

    @torch.no_grad()
    def eos_prob(self, terms: LossTerms) -> torch.Tensor | None:
        """
        Probability that the policy ends the completion at each state, shape `(B, T)`.

        It comes from the hidden states of the loss's own forward pass: the log-probability of the sampled token is
        known, so an EOS logit less that token's logit is all that is missing, and no second pass over the vocabulary
        is needed. `None` for architectures that transform their logits (Gemma 2, Cohere, Granite, ...) and where the
        hidden states are out of reach (a compiled model).
        """
        model = self._causal_lm()
        config = model.config.get_text_config()
        transformed = any(getattr(config, name, None) is not None for name in _LOGIT_TRANSFORMS)
        if transformed or self._loss.hidden_states is None:
            return None
        ids = self._loss.inputs["completion_ids"]
        head = model.get_output_embeddings()
        with maybe_gather_lm_head_ctx(head.weight, head.bias), torch.autocast(ids.device.type, enabled=False):
            weight, bias = (w.full_tensor() if isinstance(w, DTensor) else w for w in (head.weight, head.bias))
            gaps = []
            # In small pieces, for memory's sake: this is when the activations of the whole forward pass are alive.
            for row, tokens in enumerate(ids):
                states = self._loss.hidden_states[row, -len(tokens) - 1 : -1]
                for state, token in zip(states.split(256), tokens.split(256), strict=True):
                    eos_logit = F.linear(state, *_rows(weight, bias, self.eos_token_ids, state.dtype))
                    token_weight, token_bias = _rows(weight, bias, token, state.dtype)
                    token_logit = (state * token_weight).sum(-1) + (0 if token_bias is None else token_bias)
                    gaps.append((eos_logit - token_logit.unsqueeze(-1)).float())
            gap = torch.cat(gaps).view(*ids.shape, -1) / self.temperature  # (B, T, EOS ids)
        return (terms.logps.detach().float().unsqueeze(-1) + gap).clamp(max=0).exp().sum(-1).clamp(max=1)

    @contextmanager
    def unwrapped_for_generation(self, module: nn.Module, checkpointing_kwargs: dict | None = None):
        """
        A network trained beside the policy as `generate` needs it, which is how TRL prepares the policy.

        Args:
            module (`nn.Module`):
                The network as it is wrapped.
            checkpointing_kwargs (`dict`, *optional*):
                Those of its gradient checkpointing, which is off meanwhile.
        """
        with unwrap_model_for_generation(
            module,  # type: ignore[arg-type]
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=checkpointing_kwargs,
        ) as network:
            yield network

    def vllm_beside(self, network: nn.Module, processing_class, **settings) -> VLLMGeneration:
        """
        vLLM for a network trained beside the policy, with the policy's parallelism and sleep mode. Call `sync_weights`
        before `generate` whenever the network has moved, and both on every process, with as many prompts.

        Args:
            network (`nn.Module`):
                The network, on its devices.
            processing_class (`PreTrainedTokenizerBase`):
                Its tokenizer.
            settings:
                Further arguments of [`~trl.generation.vllm_generation.VLLMGeneration`].
        """
        return VLLMGeneration(
            model=network,  # type: ignore[arg-type]
            accelerator=self.accelerator,
            processing_class=processing_class,
            server_timeout=self.args.vllm_server_timeout,
            tensor_parallel_size=self.args.vllm_tensor_parallel_size,
            enable_sleep_mode=self.args.vllm_enable_sleep_mode,
            model_impl=self.args.vllm_model_impl,
            trust_remote_code=self.args.trust_remote_code,
            **settings,
        )

    # --- Wrapped methods of TRL

    def _tokenize_prompts(self, prompts):
        tokenized = super()._tokenize_prompts(prompts)
        context = getattr(self._causal_lm().config.get_text_config(), "max_position_embeddings", None)
        for ids, prompt in zip(tokenized[0], prompts, strict=True):
            if context is not None and len(ids) >= context:
                raise ValueError(
                    f"A prompt has {len(ids)} tokens, and the model's context of {context} leaves no room for a "
                    f"completion. Shorten it or drop it from the dataset. It begins: {str(prompt)[:200]!r}"
                )
        return tokenized

    def _calculate_rewards(self, *args, **kwargs):
        for scores_of_rows in self._token_scores.values():
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
        self.rollout_rows = inputs
        rollout = super()._generate_and_score_completions(inputs, *args, **kwargs)
        rewards = (self._scores * self.reward_weights.to(self._scores.device)).nansum(dim=1)
        rewards[self._scores.isnan().all(dim=1)] = torch.nan
        start = self.accelerator.process_index * len(inputs)
        own = slice(start, start + len(inputs))
        if self._credit_log is not None and self._mode == "train":
            scores = dict(zip(self.reward_func_names, self._scores[own].unbind(1), strict=True))
            losses = self._rollout_parts * self.num_iterations
            self._credit_log.begin_rollout(self.state.global_step, rollout, rewards[own], scores, losses)
        rollout = self.assign_credit(rollout, rewards[own])
        self.add_credit("advantage", rollout["advantages"])

        # The completions table shows one advantage a completion; TRL has filled it with those it computed itself.
        advantages = rollout["advantages"]
        if advantages.dim() == 2:
            mask = _trained_tokens(rollout)
            advantages = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
        advantages = self.accelerator.gather(advantages).tolist()
        table: Any = self._logs["advantages"]
        for _ in range(min(len(advantages), len(table))):
            table.pop()
        table.extend(advantages)
        return rollout

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._loss is None:  # of the old or the reference policy
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._loss.outputs is None:
            with self._keep_hidden_states():
                self._loss.outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            # TRL reads the terms of its loss from the inputs after this call: the place to put others.
            self._shape_inputs(self._loss.inputs, logps=self._loss.outputs[0])
        return self._loss.outputs

    def _compute_loss(self, model, inputs):
        # A shallow copy, since later iterations use the rollout again.
        self._loss = _Loss(inputs=dict(inputs), beta=self.beta)
        try:
            loss = super()._compute_loss(model, self._loss.inputs)
            if self._loss.ratio_is_shaped:
                self._set_shaped_metrics_apart()
                if self._kl_sees_ratio:
                    loss = loss + self._kl_penalty(model, inputs)
            extra = self.extra_loss(self._loss.terms, self._loss.inputs, self._mode)
            if extra is not None:
                loss = loss + extra
            if self.logs_credit:
                logps, entropies, _ = self._loss.outputs
                self.add_credit("logp", logps)
                self.add_credit("entropy", entropies)
                self.add_credit("ratio", self._loss.terms.log_ratio.detach().exp())
        finally:
            self.beta = self._loss.beta
            self._loss = None
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss of step {self.state.global_step} is {loss.item()}: training stops here rather than go on "
                "with broken weights; checkpoints are as they were. Usual causes: a learning rate that is too high, "
                "ratios far from 1 (lower `num_iterations`), float16."
            )
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        # A loss can be finite and its gradient not. (A gradient scaler, with float16, skips such steps by itself.)
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient norm of step {self.state.global_step} is {float(norm)}: training stops here rather than "
                "step to broken weights; checkpoints are as they were."
            )
        return norm

    def log(self, *args, **kwargs):
        """As TRL's, with the metrics of `log_means`."""
        if sums := self._sums[self._mode]:
            totals = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
            for name, (total, count) in zip(sums, totals, strict=True):
                if count:
                    self._metrics[self._mode][name] = [total / count]
            sums.clear()
        super().log(*args, **kwargs)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._mode == "eval":
            self.begin_step([inputs], "eval")
            return inputs
        if self._buffered_inputs is not before:
            for step in self._steps_of(self._buffered_inputs):
                self.begin_step(step, "train")
        self._step_inputs.append(inputs)
        return inputs

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            step, self._step_inputs = self._step_inputs, []
            self.finish_step(step)
        if self._credit_log is not None:
            self._credit_log.after_loss()
        return loss

    def _get_train_sampler(self, *args, **kwargs):
        return _ResumableSampler(super()._get_train_sampler(*args, **kwargs), self)

    def save_model(self, output_dir=None, _internal_call=False):
        # Before TRL's, which ends with the push to the Hub.
        self.save_networks(Path(output_dir or str(self.args.output_dir)))
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        if not self.args.save_only_model:
            # Before TRL's, which pushes checkpoints, and by which a checkpoint is told to be complete.
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.save_training_state(folder)
        super()._save_checkpoint(model, trial)

    def save_checkpoint(self) -> None:
        """Make a checkpoint of the run as it is now."""
        self._save_checkpoint(self.model, trial=None)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        others = [name for name in self.folders_of_networks if (Path(resume_from_checkpoint) / name).is_dir()]
        if not others or not is_peft_model(self.accelerator.unwrap_model(self.model)):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # `Trainer` takes every folder with an adapter in it for one of the policy's: show it the checkpoint without.
        with TemporaryDirectory() as view:
            for path in Path(resume_from_checkpoint).resolve().iterdir():
                if path.name not in others:
                    (Path(view) / path.name).symlink_to(path)
            return super()._load_from_checkpoint(view, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resume_from = checkpoint

    def create_model_card(self, *args, **kwargs):
        """As TRL's, with the settings that say how credit was assigned."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_credit_settings(Path(str(self.args.output_dir), "README.md"), self.args, CreditLogConfig)

    # --- Inside the wrapped methods

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _rollout_parts(self) -> int:
        assert self.args.steps_per_generation is not None  # set by `GRPOConfig`
        return self.args.steps_per_generation

    def _steps_of(self, micro_batches: list[dict]) -> list[list[dict]]:
        size = self.args.gradient_accumulation_steps
        return [micro_batches[start : start + size] for start in range(0, len(micro_batches), size)]

    def _token_scores_of(self, name: str) -> dict | None:
        return self._token_scores.setdefault(name, {}) if self.takes_token_rewards else None

    @property
    def _kl_sees_ratio(self) -> bool:
        # TRL's bias-corrected KL is multiplied by the ratio of the policy term, whichever that is.
        return self._loss.beta != 0.0 and self.args.use_bias_correction_kl

    def _causal_lm(self):
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    @contextmanager
    def _keep_hidden_states(self):
        def keep(module, args, output):
            hidden_states = getattr(output, "last_hidden_state", None)
            self._loss.hidden_states = None if hidden_states is None else hidden_states.detach()

        handle = self._causal_lm().base_model.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _shape_inputs(self, inputs: dict, logps: torch.Tensor) -> None:
        old_logps = inputs.get("old_per_token_logps")
        if old_logps is None:  # the update starts from this very policy
            old_logps = logps.detach()
        advantages = inputs["advantages"]
        terms = LossTerms(
            logps=logps,
            log_ratio=logps.float() - old_logps.float(),
            advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
            mask=_trained_tokens(inputs),
        )
        self._loss.terms = terms
        shaped = self.shape_loss(terms, self._mode)
        if shaped is terms:
            return
        inputs["advantages"] = shaped.advantages
        if shaped.log_ratio is terms.log_ratio:
            return
        # TRL forms `logps - old_per_token_logps`: this makes that difference the shaped one, gradient included, and
        # leaves `logps` true for all other terms.
        inputs["old_per_token_logps"] = logps - shaped.log_ratio
        if self.off_policy_mask_threshold is not None:
            inputs.setdefault("sampling_per_token_logps", old_logps)
        self._loss.ratio_is_shaped = True
        if self._kl_sees_ratio:
            self.beta = 0.0
        self._loss.true_ratio_metrics = self._clip_ratio(terms)

    def _clip_ratio(self, terms: LossTerms) -> dict[str, tuple]:
        """How many of the true ratios are outside the clip range, under TRL's names."""
        log_ratio, counted = torch.where(terms.mask, terms.log_ratio.detach(), 0), terms.mask
        if self.importance_sampling_level == "sequence":  # one ratio a completion
            log_ratio = log_ratio.sum(1, keepdim=True) / terms.mask.sum(1, keepdim=True).clamp(min=1)
            counted = torch.ones_like(log_ratio, dtype=torch.bool)
        ratio, count = log_ratio.exp(), counted.sum()
        if self.loss_type == "cispo":
            return {"cispo_clip_ratio": (((ratio > self.epsilon_high) & (terms.advantages > 0) & counted).sum(), count)}
        if self.loss_type == "sapo":  # a soft gate
            return {}
        low = (ratio < 1 - self.epsilon_low) & (terms.advantages < 0) & counted
        high = (ratio > 1 + self.epsilon_high) & (terms.advantages > 0) & counted
        return {
            "clip_ratio/low_mean": (low.sum(), count),
            "clip_ratio/high_mean": (high.sum(), count),
            "clip_ratio/region_mean": ((low | high).sum(), count),
        }

    def _set_shaped_metrics_apart(self) -> None:
        metrics = self._metrics[self._mode]
        for name in [name for name in metrics if "clip_ratio" in name and not name.startswith(self.shaped_prefix)]:
            metrics[f"{self.shaped_prefix}/{name}"].append(metrics[name].pop())
            if not metrics[name]:
                del metrics[name]
        self.log_means(self._mode, self._loss.true_ratio_metrics)

    def _kl_penalty(self, model, inputs: dict) -> torch.Tensor:
        """TRL's KL term with the true ratio: its loss again, on the same forward pass, with a policy term of zero."""
        metrics: dict[str, dict] = {self._mode: defaultdict(list)}
        changes = {
            "beta": self._loss.beta,
            "aux_loss_enabled": False,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "_entropy_bonus_enabled": False,
            "_metrics": metrics,
        }
        kept = {name: getattr(self, name) for name in changes}
        self.__dict__.update(changes)
        try:
            loss = super()._compute_loss(model, {**inputs, "advantages": torch.zeros_like(inputs["advantages"])})
        finally:
            self.__dict__.update(kept)
        self._metrics[self._mode]["kl"].extend(metrics[self._mode]["kl"])
        return loss


@dataclass
class _Loss:
    """What is known of a loss while it is computed."""

    inputs: dict
    beta: float
    terms: LossTerms | None = None
    outputs: tuple | None = None  # log-probabilities, entropies, auxiliary loss of the forward pass
    hidden_states: torch.Tensor | None = None
    ratio_is_shaped: bool = False
    true_ratio_metrics: dict = field(default_factory=dict)


def _trained_tokens(inputs: dict) -> torch.Tensor:
    """Tokens that the policy chose and is trained on, shape `(B, T)`, boolean."""
    mask = inputs["completion_mask"]
    return (mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]).bool()


def _rows(weight, bias, index, dtype):
    return weight[index].to(dtype), None if bias is None else bias[index].to(dtype)


class _BeginTraining(TrainerCallback):
    def __init__(self, trainer: CreditTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        checkpoint, self.trainer._resume_from = self.trainer._resume_from, None
        self.trainer._step_inputs = []
        if self.trainer._credit_log is not None:
            self.trainer._credit_log.begin_training(resumed=checkpoint is not None)
        self.trainer.begin_training(checkpoint)

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer._credit_log is not None:
            self.trainer._credit_log.write()


class _ResumableSampler(Sampler):
    """
    TRL's sampler, with the order of a resumed run's epoch that of the run itself: its random numbers go on from epoch
    to epoch, and TRL begins with those of the first.
    """

    def __init__(self, sampler: Sampler, trainer: CreditTrainer):
        self.sampler, self.trainer, self.epochs_begun = sampler, trainer, 0

    def __len__(self):
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self):
        while self.epochs_begun < int(self.trainer.state.epoch or 0):
            next(iter(self.sampler), None)
            self.epochs_begun += 1
        self.epochs_begun += 1
        return iter(self.sampler)


class _SingleGeneration(int):
    """1, which `GRPOConfig` does not take for too few."""

    def __lt__(self, other):
        return False


@contextmanager
def single_generation_allowed(config: GRPOConfig):
    """Around `GRPOConfig.__post_init__`: its refusal of one completion per prompt is for group baselines."""
    single = config.num_generations == 1
    if single:
        config.num_generations = _SingleGeneration(1)
    try:
        yield
    finally:
        if single:
            config.num_generations = 1


def critic_source(model):
    """What a copy of a policy's checkpoint is loaded from: its path or Hub id, or else the model itself."""
    if isinstance(model, str):
        return model
    base = model.get_base_model() if is_peft_model(model) else model
    return get_config_model_id(base.config) or base


def _checked_reward_func(func, name: str, token_scores: dict | None = None):
    """
    `func`, with an error that says which reward is not one. TRL itself checks their number. Rewards per token go to
    `token_scores`, if there is one, and their sum to TRL.
    """

    def check_tokens(row, scores, completion_ids):
        scores = [float(score) for score in scores]
        if completion_ids is not None and len(scores) != len(completion_ids[row]):
            raise ValueError(
                f"Reward function {name!r} returned {len(scores)} rewards for the tokens of completion {row}, which "
                f"has {len(completion_ids[row])}. Return one reward per token of `completion_ids`, or one number."
            )
        assert token_scores is not None
        token_scores[row] = scores
        return sum(scores)

    def check(rewards, completion_ids=None):
        if isinstance(rewards, list) and token_scores is not None:
            rewards = [
                check_tokens(row, reward, completion_ids) if isinstance(reward, (list, tuple)) else reward
                for row, reward in enumerate(rewards)
            ]
        one_each = isinstance(rewards, Iterable) and not isinstance(rewards, (str, dict))
        if not one_each or getattr(rewards, "ndim", 1) != 1:
            raise TypeError(
                f"Reward function {name!r} returned {rewards!r}. It must return a list with one number, or None, for "
                "each completion."
            )
        rewards = list(rewards)  # a generator can be read only once
        for row, reward in enumerate(rewards):
            number = isinstance(reward, Real) or (hasattr(reward, "item") and torch.as_tensor(reward).numel() == 1)
            if not (number or reward is None):
                raise TypeError(
                    f"Reward function {name!r} returned {reward!r} ({type(reward).__name__}) for completion {row}. A "
                    "reward must be a finite number, or None for a completion that it does not score."
                )
            if number and math.isnan(reward):
                logger.warning(f"Reward function {name!r} returned NaN for completion {row}: it counts as not scored.")
        return rewards

    if is_async_callable(func):

        @functools.wraps(func)
        async def checked(*args, **kwargs):
            return check(await func(*args, **kwargs), kwargs.get("completion_ids"))
    else:

        @functools.wraps(func)
        def checked(*args, **kwargs):
            return check(func(*args, **kwargs), kwargs.get("completion_ids"))

    return checked


def _checked_rollout_func(func):
    """`func`, with an error for a completion of no tokens, which has no last state to score."""

    @functools.wraps(func)
    def checked(prompts, trainer):
        output = func(prompts, trainer)
        if not isinstance(output, dict):
            raise TypeError(
                f"`rollout_func` returned {output!r}. It must return a dict of lists, `completion_ids` among them."
            )
        for row, ids in enumerate(output.get("completion_ids", ())):
            if len(ids) == 0:
                raise ValueError(
                    f"`rollout_func` returned an empty completion for prompt {row}. Each must have at least one token, "
                    "e.g. EOS alone."
                )
        return output

    return checked


# --- The command line


def split_launch_arguments(parser, argv: list[str]) -> tuple[list[str], list[str]]:
    """
    Tell the arguments of `accelerate launch` from those of a training script, and check the latter.

    Args:
        parser ([`~trl.TrlParser`]):
            The script's parser.
        argv (`list[str]`):
            Arguments of both, among them any `--config` file, which may hold both too.

    Returns:
        `tuple[list[str], list[str]]`: Those of `accelerate launch`, `--accelerate_config` resolved, and the script's.
    """
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence

    *_, from_file, from_argv = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    return resolve_accelerate_config_argument(from_file + from_argv), _subtract_subsequence(argv, from_argv)


def run_grpo_script(trainer_class: type[GRPOTrainer], *args) -> None:
    """
    Run the script of `trl grpo` with another trainer: datasets, rewards, quantization, PEFT, resuming and the Hub are
    TRL's code.

    Args:
        trainer_class (`type[GRPOTrainer]`):
            The trainer.
        args:
            The script's arguments as its parser returns them.
    """
    from trl.scripts.grpo import main

    _run_script(main, "GRPOTrainer", trainer_class, *args)


def run_sft_script(trainer_class: type, *args) -> None:
    """The same with the script of `trl sft` and a subclass of [`~trl.SFTTrainer`]."""
    from trl.scripts.sft import main

    _run_script(main, "SFTTrainer", trainer_class, *args)


def _run_script(main, name: str, trainer_class: type, *args) -> None:
    import trl

    # `main` imports the trainer from `trl` when it is called. If it got it in any other way, it would train TRL's own
    # without a word.
    if name not in main.__code__.co_varnames:
        raise ImportError(f"`{main.__module__}.main` no longer imports `{name}` when it is called.")
    original = getattr(trl, name)
    setattr(trl, name, trainer_class)
    try:
        main(*args)
    finally:
        setattr(trl, name, original)
