from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...credit.boundaries import first_tokens
from ...credit.bounded_values import position_in_range
from ...credit.calibration import brier_score, calibration_sums, expected_calibration_error
from ...credit.fit import explained_variance, fit_sums
from ...credit.value_loss import binary_cross_entropy, squared_error
from ...critics.card import loading_code
from ...critics.facts import CriticFacts, fingerprint
from ...critics.prompt import PromptCritic, load_critic_tokenizer, read_prompts
from ...critics.refusals import refuse_other_vocabulary
from ..critic.probe_trainer import ProbeTrainer
from ..critic.reward_range import RewardRange
from ..value_report import extremes
from .sppo_config import SPPOConfig


class SPPOTrainer(ProbeTrainer):
    """
    Trainer for sequence-level PPO (SPPO): one rollout per prompt, with a critic's value of the prompt alone as the
    baseline.

    The method was introduced in [SPPO: Sequence-Level PPO for Long-Horizon Reasoning
    Tasks](https://huggingface.co/papers/2604.08865). Arguments are those of [`~trl.GRPOTrainer`], with `args` a
    [`SPPOConfig`], and three more.

    Args:
        critic (`str`, `Path` or `PreTrainedModel`, *optional*):
            What the critic starts from: a path or Hub id of a causal LM, a reward model (its head is kept) or a critic;
            or a model in memory; or `"probe"` for a probe critic, a small head on what the reference makes of the
            prompts anyway. Any size and architecture will do. Default: the policy's checkpoint, with a fresh head.
        critic_processing_class (`PreTrainedTokenizerBase`, *optional*):
            The critic's tokenizer, with its chat template. Default: that of the critic's checkpoint, or the policy's if
            the critic is not given by path. With the policy's tokenizer, the critic reads exactly what the policy read.
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
@article{wang2026sppo,
    title        = {{SPPO: Sequence-Level PPO for Long-Horizon Reasoning Tasks}},
    author       = {Tianyi Wang and Yixia Li and Long Li and Yibiao Chen and Shaohan Huang and Yun Chen and others},
    year         = 2026,
    eprint       = {arXiv:2604.08865},
}""",
    }
    args: SPPOConfig
    config_class = SPPOConfig
    critic_kind = "prompt"
    takes_any_reward = "to 'running', or `critic_loss='mse'`, which takes any"
    rollout_keys = {"values": "(B,)", "critic_prompts": "(B, P)", "critic_targets": "(B,)"}

    def __init__(self, *args, critic_processing_class=None, **kwargs):
        self._critic_processing_class = critic_processing_class
        super().__init__(*args, **kwargs)
        # Sums over the predictions since the last log, see `fit_sums` and `calibration_sums`.
        self._fit: dict[str, torch.Tensor] = {}
        self._calibration: dict[str, torch.Tensor] = {}

    # --- The critic

    @property
    def critic_processing_class(self):
        """The critic's tokenizer: its own, or else the policy's."""
        return self.processing_class if self._critic_processing_class is None else self._critic_processing_class

    def make_critic(self, policy, critic, peft_config) -> nn.Module:
        self._critic_processing_class = self._tokenizer_of_its_own(critic)
        network = self.make_value_model(policy, critic, peft_config)
        if self._critic_processing_class is None and not self.args.critic_share_base:
            reader = self.accelerator.unwrap_model(self.model)
            refuse_other_vocabulary(network, critic, reader, self.processing_class)
        return network

    def _tokenizer_of_its_own(self, source: Any) -> Any:
        """The tokenizer with which the critic reads prompts; `None` if it reads what the policy has read."""
        tokenizer = self._critic_processing_class
        if tokenizer is not None and self.args.critic_share_base:
            raise ValueError(
                "`critic_processing_class` has no effect with `critic_share_base=True`: the policy's base reads the "
                "policy's tokens. Drop one of them."
            )
        if tokenizer is None and not (source is None or isinstance(source, nn.Module) or self.args.critic_share_base):
            tokenizer = load_critic_tokenizer(source, self.args.critic_model_init_kwargs)  # type: ignore[arg-type]
            facts = self._source_facts
            if facts is not None and not facts.own_tokenizer and facts.tokenizer == fingerprint(self.processing_class):
                return None  # it has read what this policy reads
        if tokenizer is self.processing_class:
            return None
        if tokenizer is not None and self.environment_factories is not None:
            raise ValueError(
                "`environment_factory` adds to the prompts what a critic with a tokenizer of its own does not see. "
                "Leave `critic` out; or, if the critic knows the policy's tokens, pass one tokenizer as both "
                "`processing_class` and `critic_processing_class`."
            )
        return tokenizer

    @property
    def value_range(self) -> RewardRange | None:
        return super().value_range if self.args.critic_loss == "bce" else None

    def critic_settings(self) -> dict[str, Any]:
        names = ("critic_loss", "critic_prompt_template")
        return {**super().critic_settings(), **{name: getattr(self.args, name) for name in names}}

    def critic_facts(self) -> CriticFacts:
        return replace(super().critic_facts(), template_kwargs=self.args.chat_template_kwargs)  # type: ignore[arg-type]

    def make_critic_reader(self, runner) -> PromptCritic:
        own = (
            self._critic_processing_class if self.args.critic_prompt_template is None else self.critic_processing_class
        )
        of_policy = self.args.per_device_train_batch_size * (self.max_completion_length or 0)
        return PromptCritic(
            runner,
            own,
            self.args.critic_loss,
            self.value_range or (0.0, 1.0),
            batch_size=self.sequences_at_once,
            batch_tokens=self.args.critic_update_batch_tokens or of_policy,
            tools=self.tools,
            template_kwargs=self.args.chat_template_kwargs,  # type: ignore[arg-type]
            prompt_template=self.args.critic_prompt_template,
        )

    def critic_loss(self, network: nn.Module, inputs: dict) -> torch.Tensor:
        outputs = read_prompts(network, inputs["prompts"])[inputs["prompt_of_target"]]
        loss = binary_cross_entropy if self.args.critic_loss == "bce" else squared_error
        return loss(outputs, inputs["targets"]).sum()

    def critic_count(self, inputs: dict) -> torch.Tensor:
        return torch.tensor(len(inputs["targets"]))

    def critic_batches(self, micro_batches: list[dict]) -> list[dict]:
        """The prompts of an optimizer step, each prompt once, with all its targets."""
        prompts, targets = (
            self.accelerator.gather(torch.cat([inputs[name] for inputs in micro_batches]))
            for name in ("critic_prompts", "critic_targets")
        )
        scored = targets.isfinite()
        distinct, prompt_of_target = prompts[scored].unique(dim=0, return_inverse=True)
        batches = []
        for index in self.critic_reader.batches(distinct):
            target, prompt = (prompt_of_target.unsqueeze(1) == index).nonzero(as_tuple=True)
            batches.append({"prompts": distinct[index], "prompt_of_target": prompt, "targets": targets[scored][target]})
        return batches

    def describe_critic(self) -> str:
        return (
            "A value model of prompts: at the last token of a prompt, in the chat template of its tokenizer and with "
            "the generation\nprompt, it gives the reward that a completion of the policy is expected to get.\n\n"
            f"```python\n{loading_code(self.critic)}\noutput = critic(input_ids).logits[0, -1, 0]\n"
            f"value = {self._values_as_code('output')}\n```"
        )

    # --- Credit

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        critic = self.of_critic
        self.keep_in_range(rollout, rewards, mode, critic.takes_any_reward)
        self.start_head(rewards, mode)
        values, prompts = critic.prompt_values(rollout, mode)
        counted = rewards.isfinite() & self.trained_tokens(rollout).any(1)
        critic.measure(values, rewards, counted, mode)
        self._report(mode, values, rewards, counted)
        advantages = critic.lean((rewards - values).unsqueeze(1), rewards, rollout, mode).squeeze(1)
        there = counted.unsqueeze(1) & critic.time_steps(rollout, mode)
        critic.learn(rollout, rewards.unsqueeze(1).expand_as(there), there, mode)
        self.add_credit("value", values)
        self.add_column("value", values.tolist())
        return {
            **rollout,
            "values": values,
            **prompts,
            "advantages": torch.where(counted, advantages, 0),
            "critic_targets": torch.where(counted, self._targets(rewards), torch.nan),
        }

    def prompt_values(self, rollout: dict, mode: str) -> tuple[torch.Tensor, dict]:
        """Values of a rollout's prompts, shape `(B,)`, and the prompts as the critic has read them, for its update."""
        prompts, is_cut = self.critic_reader.prompts(self.with_prompts(rollout))
        self.log_means(mode, {"critic/cut_prompts": (is_cut.sum(), len(is_cut))})
        return self.critic_reader.prompt_values(prompts), {"critic_prompts": prompts}

    def time_steps(self, rollout: dict, mode: str) -> torch.Tensor:
        """The first token: a completion is one step of the credit. Shape `(B, T)`, boolean."""
        return first_tokens(rollout["completion_mask"])

    def critic_fit(self, rollout: dict, rewards: torch.Tensor) -> torch.Tensor:
        values = self.critic_reader.prompt_values(self.critic_reader.prompts(self.with_prompts(rollout))[0])
        counted = rewards.isfinite() & self.trained_tokens(rollout).any(1)
        return fit_sums(values.unsqueeze(1), rewards.unsqueeze(1), counted.unsqueeze(1))

    def _targets(self, rewards: torch.Tensor) -> torch.Tensor:
        """What the critic should predict: rewards mapped from their range to [0, 1], or as they are."""
        return rewards if self.value_range is None else position_in_range(rewards, self.value_range)

    # --- What is logged

    def _report(self, mode, values, rewards, counted) -> None:
        low, high = self.value_range or (0.0, 0.0)
        fit = fit_sums(values.unsqueeze(1), rewards.unsqueeze(1), counted.unsqueeze(1))
        self._fit[mode] = self._fit.get(mode, 0) + fit.sum(0)
        self.explained_variance = explained_variance(self.accelerator.gather(fit))
        least, most = extremes(self, values, counted)
        self.log_value(mode, "critic/value_min", least)
        self.log_value(mode, "critic/value_max", most)
        right = counted & self.is_right(rewards, (low + high) / 2)
        wrong = counted & ~right
        self.log_means(
            mode,
            {
                "critic/value_mean": (torch.where(counted, values, 0).sum(), counted.sum()),
                "critic/value_right": (torch.where(right, values, 0).sum(), right.sum()),
                "critic/value_wrong": (torch.where(wrong, values, 0).sum(), wrong.sum()),
            },
        )
        if self.value_range is not None:
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
