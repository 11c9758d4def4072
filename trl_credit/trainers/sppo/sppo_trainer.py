import math
from functools import partial
from typing import Any

import torch
from torch import nn

from ...credit.calibration import brier_score, calibration_sums, expected_calibration_error
from ...credit.fit import explained_variance, fit_sums
from ...credit.value_loss import binary_cross_entropy, squared_error
from ...critics.card import loading_code
from ...critics.prompt import PAD, load_critic_tokenizer, pad_prompts, read_prompts, tokenize_prompts
from ...critics.token import refuse_images
from ..critic.critic_trainer import CriticTrainer
from ..critic.value_report import extremes
from .sppo_config import SPPOConfig


class SPPOTrainer(CriticTrainer):
    """
    Trainer for sequence-level PPO (SPPO): one rollout per prompt, with the value that a critic gives the prompt alone
    for its baseline.

    The method was introduced in [SPPO: Sequence-Level PPO for Long-Horizon Reasoning
    Tasks](https://huggingface.co/papers/2604.08865). Arguments are those of [`~trl.GRPOTrainer`], with `args` a
    [`SPPOConfig`], and three more.

    Args:
        critic (`str`, `Path` or `PreTrainedModel`, *optional*):
            What the critic starts from: a path or Hub id of a causal LM, of a reward model (its head is kept) or of a
            critic, or a model, of any size and architecture. Default: the policy's checkpoint, with a fresh head.
        critic_processing_class (`PreTrainedTokenizerBase`, *optional*):
            The critic's tokenizer, with its chat template. Default: that of the critic's checkpoint, or the policy's if
            the critic is not given by path. With the policy's the critic reads exactly what the policy has read.
        critic_peft_config (`~peft.PeftConfig`, *optional*):
            Train adapters and the head of the critic instead of all its weights.

    Example:

    ```python
    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from trl_credit import SPPOConfig, SPPOTrainer

    trainer = SPPOTrainer(
        model="Qwen/Qwen2.5-1.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=SPPOConfig("Qwen2.5-1.5B-SPPO"),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        critic="Qwen/Qwen2.5-0.5B-Instruct",
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-credit", "sppo"]
    _name = "SPPO"
    _paper = {
        "title": "SPPO: Sequence-Level PPO for Long-Horizon Reasoning Tasks",
        "id": "2604.08865",
        # docstyle-ignore
        "citation": """\
@article{sppo2026,
    title        = {{SPPO: Sequence-Level PPO for Long-Horizon Reasoning Tasks}},
    year         = 2026,
    eprint       = {arXiv:2604.08865},
}""",
    }
    args: SPPOConfig
    config_class = SPPOConfig

    def __init__(self, *args, critic=None, critic_processing_class=None, **kwargs):
        super().__init__(*args, critic=critic, **kwargs)
        source = critic if critic is not None else self.args.critic_model_name_or_path
        if critic_processing_class is not None and self.args.critic_share_base:
            raise ValueError(
                "`critic_processing_class` has no effect with `critic_share_base=True`: the policy's base reads the "
                "policy's tokens. Drop one of them."
            )
        if critic_processing_class is None and not (
            source is None or isinstance(source, nn.Module) or self.args.critic_share_base
        ):
            critic_processing_class = load_critic_tokenizer(source, self.args.critic_model_init_kwargs)  # type: ignore[arg-type]
        if critic_processing_class is self.processing_class:
            critic_processing_class = None  # it reads what the policy has read
        self._critic_processing_class = critic_processing_class
        if critic_processing_class is not None and self.environment_factories is not None:
            raise ValueError(
                "`environment_factory` adds to the prompts what a critic with a tokenizer of its own does not see. "
                "Leave `critic` out; or, if the critic knows the policy's tokens, pass one tokenizer as both "
                "`processing_class` and `critic_processing_class`."
            )
        # Sums over the predictions since the last log, see `fit_sums` and `calibration_sums`.
        self._fit: dict[str, torch.Tensor] = {}
        self._calibration: dict[str, torch.Tensor] = {}

    # --- The critic

    @property
    def critic_processing_class(self):
        """The critic's tokenizer: its own, or else the policy's."""
        return self.processing_class if self._critic_processing_class is None else self._critic_processing_class

    def make_critic(self, policy, critic, peft_config) -> nn.Module:
        initial_value = self.args.critic_initial_value
        assert initial_value is not None  # set by the config
        if self.args.critic_loss == "bce":
            low, high = self.args.reward_range
            initial_value = math.log((initial_value - low) / (high - initial_value))
        return self.make_value_model(policy, critic, peft_config, initial_value)

    def critic_loss(self, network: nn.Module, inputs: dict) -> torch.Tensor:
        outputs = read_prompts(network, inputs["prompts"])[inputs["prompt_of_target"]]
        loss = binary_cross_entropy if self.args.critic_loss == "bce" else squared_error
        return loss(outputs, inputs["targets"]).sum()

    def critic_count(self, inputs: dict) -> torch.Tensor:
        return torch.tensor(len(inputs["targets"]))

    def update_critic(self, micro_batches: list[dict], prefix: str = "critic") -> dict[str, float] | None:
        """One update on the prompts of an optimizer step, each of them once, with all its targets."""
        prompts, targets = (
            self.accelerator.gather(torch.cat([inputs[name] for inputs in micro_batches]))
            for name in ("critic_prompts", "critic_targets")
        )
        scored = targets.isfinite()
        distinct, prompt_of_target = prompts[scored].unique(dim=0, return_inverse=True)
        batches = []
        for index in self._share_of(len(distinct)):
            target, prompt = (prompt_of_target.unsqueeze(1) == index).nonzero(as_tuple=True)
            batches.append(
                {"prompts": _rows(distinct, index), "prompt_of_target": prompt, "targets": targets[scored][target]}
            )
        return super().update_critic(batches, prefix)

    def _share_of(self, count: int) -> list[torch.Tensor]:
        """
        Indices of this process's share of `count` things, in batches, as many and as large on every process. The last
        may be `count` or more: there to keep step with the others.
        """
        processes = self.accelerator.num_processes
        index = torch.arange(self.accelerator.process_index, processes * math.ceil(count / processes), processes)
        return list(index.to(self.accelerator.device).split(self.args.per_device_train_batch_size)) if count else []

    def describe_critic(self) -> str:
        value = "output"
        if self.args.critic_loss == "bce":
            low, high = self.args.reward_range
            value = f"{low:g} + {high - low:g} * output.sigmoid()"
        return (
            "A value model of prompts: at the last token of a prompt, in the chat template of its tokenizer and with "
            "the generation\nprompt, it gives the reward that a completion of the policy is expected to get.\n\n"
            f"```python\n{loading_code(self.critic)}\noutput = critic(input_ids).logits[0, -1, 0]\nvalue = {value}\n```"
        )

    # --- Credit

    def prompts_for_critic(self, rollout: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The prompts of a rollout in the critic's tokens.

        Args:
            rollout (`dict`):
                TRL's, whose prompts are those of `rollout_rows`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Prompts of shape `(B, P)`, padded on the left with -1, with the same P
            on every process; and which of them were cut to fit the critic's context, shape `(B,)`: what is left is
            their end.
        """
        refuse_images(rollout)
        if self._critic_processing_class is None:  # exactly what the policy has read
            prompts = torch.where(rollout["prompt_mask"].bool(), rollout["prompt_ids"], PAD)
        else:
            texts = [row["prompt"] for row in self.rollout_rows]
            template_kwargs: Any = self.args.chat_template_kwargs
            ids = tokenize_prompts(self._critic_processing_class, texts, self.tools, template_kwargs)
            prompts = pad_prompts(ids).to(self.accelerator.device)
        config = self.critic.config.get_text_config()
        if prompts.max() >= config.vocab_size:
            raise ValueError(
                f"A prompt has token {prompts.max().item()}, but the critic knows {config.vocab_size} tokens: "
                f"{type(self.critic_processing_class).__name__} is not its tokenizer. Pass its own as "
                "`critic_processing_class`."
            )
        context = getattr(config, "max_position_embeddings", None)
        is_cut = (prompts != PAD).sum(1) > (math.inf if context is None else context)
        prompts = prompts if context is None else prompts[:, -context:]
        return self.accelerator.pad_across_processes(prompts, dim=1, pad_index=PAD, pad_first=True), is_cut

    @torch.no_grad()
    def values(self, prompts: torch.Tensor) -> torch.Tensor:
        """
        The critic's values, in units of the reward. Each distinct prompt goes through the critic once, on one process.

        Args:
            prompts (`torch.Tensor`):
                Of [`prompts_for_critic`], shape `(B, P)`.

        Returns:
            `torch.Tensor`: Shape `(B,)`.
        """
        everywhere = self.accelerator.gather(prompts)
        distinct, prompt_of_row = everywhere.unique(dim=0, return_inverse=True)
        shares = self._share_of(len(distinct))
        outputs = torch.cat([self.engine.evaluate(partial(_read, _rows(distinct, index))) for index in shares])
        # A process has every n-th prompt.
        outputs = self.accelerator.gather(outputs).view(self.accelerator.num_processes, -1).T.flatten()
        start = self.accelerator.process_index * len(prompts)
        outputs = outputs[prompt_of_row[start : start + len(prompts)]]
        if self.args.critic_loss == "mse":
            return outputs
        low, high = self.args.reward_range
        return low + (high - low) * outputs.sigmoid()

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        targets = self._targets(rewards)
        prompts, is_cut = self.prompts_for_critic(rollout)
        values = self.values(prompts)
        counted = rewards.isfinite() & self.trained_tokens(rollout).any(1)
        self._report(mode, values, rewards, counted, is_cut)
        self.add_credit("value", values)
        self.add_column("value", values.tolist())
        return {
            **rollout,
            "values": values,
            "advantages": torch.where(counted, rewards - values, 0),
            "critic_prompts": prompts,
            "critic_targets": torch.where(counted, targets, torch.nan),
        }

    def _targets(self, rewards: torch.Tensor) -> torch.Tensor:
        """What the critic is to predict: rewards as parts of their range, or as they are."""
        if self.args.critic_loss == "mse":
            return rewards
        low, high = self.args.reward_range
        everywhere = self.accelerator.gather(rewards)  # so that all processes stop
        slack = 1e-5 * (high - low)  # for sums of weighted rewards
        outside = ((everywhere < low - slack) | (everywhere > high + slack)).nonzero()
        if len(outside):
            row = outside[0].item()
            parts = ", ".join(
                f"{name!r} gave {score:g} with weight {weight:g}"
                for name, score, weight in zip(
                    self.reward_func_names, self._scores[row].tolist(), self.reward_weights.tolist(), strict=True
                )
            )
            raise ValueError(
                f"The reward {everywhere[row].item():g} of completion {row} at step {self.state.global_step} lies "
                f"outside `reward_range={self.args.reward_range}` ({parts}): `critic_loss='bce'` needs to know the "
                "lowest and the highest reward. Set `reward_range` to them, or `critic_loss='mse'`, which takes any."
            )
        return ((rewards - low) / (high - low)).clamp(0, 1)

    # --- What is logged

    def _report(self, mode, values, rewards, counted, is_cut) -> None:
        bounded = self.args.critic_loss == "bce"
        low, high = self.args.reward_range if bounded else (0.0, 0.0)
        fit = fit_sums(values.unsqueeze(1), rewards.unsqueeze(1), counted.unsqueeze(1))
        self._fit[mode] = self._fit.get(mode, 0) + fit.sum(0)
        self.explained_variance = explained_variance(self.accelerator.gather(fit))
        least, most = extremes(self, values, counted)
        self.log_value(mode, "critic/value_min", least)
        self.log_value(mode, "critic/value_max", most)
        right = counted & (rewards > (low + high) / 2)
        wrong = counted & ~right
        self.log_means(
            mode,
            {
                "critic/value_mean": (torch.where(counted, values, 0).sum(), counted.sum()),
                "critic/value_right": (torch.where(right, values, 0).sum(), right.sum()),
                "critic/value_wrong": (torch.where(wrong, values, 0).sum(), wrong.sum()),
                "critic/cut_prompts": (is_cut.sum(), len(is_cut)),
            },
        )
        if bounded:
            scale = high - low
            sums = calibration_sums((values - low) / scale, (rewards - low) / scale, counted)
            self._calibration[mode] = self._calibration.get(mode, 0) + sums

    def begin_log(self, mode: str) -> None:
        if mode in self._fit:
            fit = self.total(self._fit.pop(mode)).unsqueeze(0)
            self.log_value(mode, "critic/explained_variance", explained_variance(fit))
        if mode in self._calibration:
            sums = self.total(self._calibration.pop(mode))
            if sums[:, 0].any():
                self.log_value(mode, "critic/brier", brier_score(sums))
                self.log_value(mode, "critic/ece", expected_calibration_error(sums))
            for decile, (count, _, outcomes, _) in enumerate(sums.tolist()):
                self.log_value(mode, f"critic/decile_{decile}/count", count)
                if count:
                    self.log_value(mode, f"critic/decile_{decile}/reward", outcomes / count)


def _read(prompts: torch.Tensor, network: nn.Module) -> torch.Tensor:
    return read_prompts(network, prompts)


def _rows(x: torch.Tensor, index: torch.Tensor) -> Any:
    return x[index.clamp(max=len(x) - 1)]
