from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...credit.boundaries import held, turn_starts
from ...credit.bounded_values import bounded_values, position_in_range
from ...credit.fit import fit_sums
from ...credit.gae import gae, length_adaptive_lambda, monte_carlo_returns, relative_position_lambda, whiten
from ...credit.value_loss import binary_cross_entropy, clip_share, squared_error
from ...critics.critic import Critic
from ...critics.facts import CriticFacts
from ...critics.token import READ, TokenCritic, read_values
from ...seam import LossTerms
from ..critic.probe_config import MEASURED
from ..critic.probe_trainer import ProbeTrainer
from ..critic.reward_range import RewardRange
from ..value_report import extremes, fit_report, value_means, values_in_short
from .vapo_config import VAPOConfig


class VAPOTrainer(ProbeTrainer):
    """
    Trainer for VAPO: policy optimization with token-level advantages from a learned critic. VC-PPO and PPO are special
    cases.

    The method was introduced in [VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning
    Tasks](https://huggingface.co/papers/2504.05118). Arguments are those of [`~trl.GRPOTrainer`], with `args` a
    [`VAPOConfig`], and three more.

    Args:
        critic (`str`, `Path` or `PreTrainedModel`, *optional*):
            What the critic starts from: a path or Hub id of a causal LM, a reward model (its head is kept) or a critic;
            or a model in memory; or `"probe"` for a probe critic, a small head on what the reference makes of the
            rollouts anyway. Default: the policy's checkpoint, with a fresh head.
        critic_peft_config (`~peft.PeftConfig`, *optional*):
            Train adapters and the head of the critic instead of all its weights.
        segmenter ([`~trl_credit.segmenting.Segmenter`], *optional*):
            Divides completions into segments, for a probe critic with `probe_boundaries="segments"`. Default: a
            [`~trl_credit.segmenting.DelimiterSegmenter`].

    Example:

    ```python
    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from trl_credit import VAPOConfig, VAPOTrainer

    trainer = VAPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=VAPOConfig("Qwen2.5-0.5B-VAPO"),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-credit", "vapo"]
    _name = "VAPO"
    _paper = {
        "title": "VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks",
        "id": "2504.05118",
        # docstyle-ignore
        "citation": """\
@article{yue2025vapo,
    title        = {{VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks}},
    author       = {Yu Yue and Yufeng Yuan and Qiying Yu and Xiaochen Zuo and Ruofei Zhu and others},
    year         = 2025,
    eprint       = {arXiv:2504.05118},
}""",
    }
    args: VAPOConfig
    config_class = VAPOConfig
    critic_kind = "token"
    takes_any_reward = "to 'running', or to None with `critic_loss='mse'`, which takes any"
    takes_token_rewards = True
    rollout_keys = {
        "values": "(B, T)",
        "returns": "(B, T)",
        "critic_mask": "(B, T)",
        "positive": "(B, T)",
        "critic_prompt_ids": "(B, P)",
        "critic_prompt_mask": "(B, P)",
    }

    # Of an update that values are taken from: rows of all processes, and what the critic puts out for them.
    _read_by_update: list[dict[str, torch.Tensor]] | None = None

    # --- The critic

    def make_critic(self, policy, critic, peft_config) -> nn.Module:
        return self.make_value_model(policy, critic, peft_config)

    def make_critic_reader(self, runner) -> Critic:
        return TokenCritic(
            runner,
            batch_size=self.sequences_at_once,
            batch_tokens=self.args.critic_update_batch_tokens or 0,
            reward_range=self.value_range,
            prompt_template=self.args.critic_prompt_template,
            tokenizer=self.processing_class,
            tools=self.tools,
            template_kwargs=self.args.chat_template_kwargs,  # type: ignore[arg-type]
        )

    def critic_settings(self) -> dict[str, Any]:
        own = {"critic_prompt_template": self.args.critic_prompt_template}
        return {**super().critic_settings(), **own}

    def critic_facts(self) -> CriticFacts:
        return replace(super().critic_facts(), template_kwargs=self.args.chat_template_kwargs)  # type: ignore[arg-type]

    def critic_batches(self, micro_batches: list[dict]) -> list[dict]:
        names = [name for name in (*READ, "critic_mask", "returns", "values") if name in micro_batches[0]]
        rows = {
            name: torch.cat([inputs.get(f"critic_{name}", inputs[name]) for inputs in micro_batches]) for name in names
        }
        return self.critic_reader.batches(rows)

    def critic_loss(self, network: nn.Module, inputs: dict) -> torch.Tensor:
        mask = inputs["critic_mask"]
        outputs = read_values(network, inputs)
        if self._read_by_update is not None:
            self._read_by_update.append({"row": inputs["row"], "outputs": outputs.detach()})
        outputs = outputs[:, :-1]
        reward_range: Any = self.value_range
        values = bounded_values(outputs, reward_range)
        old_values = inputs.get("values", values.detach())
        clip_range = self._clip_range
        if self.args.critic_loss == "bce":
            loss = binary_cross_entropy(outputs, position_in_range(inputs["returns"], reward_range))
        else:
            loss = squared_error(values, inputs["returns"], old_values, clip_range)
        if clip_range is not None:
            clipped = clip_share(values, old_values, clip_range) & mask
            self.log_means("train", {"critic/clipped_values": (clipped.sum(), mask.sum())})
        # What is masked must not reach the sum even as 0 · NaN, but its values stay in the graph.
        return torch.where(mask, loss, 0).sum()

    def critic_count(self, inputs: dict) -> torch.Tensor:
        return inputs["critic_mask"].sum()

    @property
    def _clip_range(self) -> float | None:
        return self.args.critic_clip_range if self._pretraining["pretraining_done"] else None

    # --- Credit

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        critic = self.of_critic
        scored = rewards.isfinite()
        mask = self.trained_tokens(rollout) & scored.unsqueeze(1)
        steps = mask & critic.time_steps(rollout, mode)
        earned = torch.nan_to_num(self.rewards_where_they_fall(rollout, rewards))
        gamma = self.args.gamma
        monte_carlo = monte_carlo_returns(earned, steps, gamma)
        self.keep_in_range(rollout, rewards, mode, critic.takes_any_reward, monte_carlo[steps])
        self.start_head(rewards, mode)
        own_prompts = self.critic_reader.own_prompts(self.with_prompts(rollout))
        if mode == "train" and self.learns_on_arrival:
            states = self._learn(rollout, {**own_prompts, "critic_mask": steps, "returns": monte_carlo})
        else:
            states = self.state_values(rollout)
        values = torch.where(mask, held(states[:, :-1], steps), 0)
        ends = rollout["completion_mask"].sum(1, keepdim=True)
        cut_off = self.is_cut_off(rollout)
        bootstrap = None
        if self.args.truncation == "bootstrap":
            bootstrap = torch.where(cut_off, states.gather(1, ends).squeeze(1), 0)
        critic.measure(values, monte_carlo, steps, mode)
        if self.args.policy_lambda == MEASURED:
            critic.measure_changes(earned, values, monte_carlo, steps, mode)
        lam = self._policy_lambda(steps)
        advantages, _ = gae(earned, values, steps, gamma, lam, bootstrap)
        _, returns = gae(earned, values, steps, gamma, self.args.critic_lambda, bootstrap)
        if self.value_range is not None and not self.value_range.grows:
            self._refuse_returns_outside(returns, steps, self.value_range)
        right = self.is_right(rewards, self.args.positive_reward_threshold)
        self._report(mode, values, monte_carlo, steps, cut_off, right, lam)
        advantages = critic.lean(held(advantages, steps), rewards, rollout, mode)
        advantages = torch.where(mask, advantages, 0)
        critic.learn(rollout, returns, steps, mode)
        if self.args.whiten_advantages:
            advantages = whiten(advantages, mask, self.total)

        self.add_credit("value", values)
        if self.args.log_completions:
            self.add_column("values", values_in_short(values, self.trained_tokens(rollout)))
        return {
            **rollout,
            **{f"critic_{name}": ids for name, ids in own_prompts.items()},
            "values": values,
            "returns": returns,
            "advantages": advantages,
            "critic_mask": steps,
            "positive": mask & right.unsqueeze(1),
        }

    @property
    def learns_on_arrival(self) -> bool:
        """
        Whether the critic learns from a rollout as soon as it is there, in the same forward pass that values it: where
        it makes one update on each, and its targets need no values.
        """
        args = self.args
        return (
            bool(self._pretraining["pretraining_done"])
            and (args.critic_lambda == 1 and args.truncation == "terminal")
            and self._losses_of_rollout == args.gradient_accumulation_steps
            and args.critic_updates_per_step == 1
        )

    def finish_step(self, micro_batches: list[dict]) -> None:
        if not self.learns_on_arrival:
            super().finish_step(micro_batches)

    def _learn(self, rollout: dict, lesson: dict) -> torch.Tensor:
        """One update on a rollout; returns what `state_values` would have returned before it."""
        inputs = {**{name: rollout[name] for name in READ}, **lesson}
        read: list[dict[str, torch.Tensor]] = []
        self._read_by_update = read
        try:
            is_updated = self.update_critic([inputs]) is not None
        finally:
            self._read_by_update = None
        # Without an update no completion has both a reward and a token to train on.
        return self.critic_reader.values_as_read(read, rollout) if is_updated else self.state_values(rollout)

    def time_steps(self, rollout: dict, mode: str) -> torch.Tensor:
        """The tokens in whose states time steps of the credit begin, shape `(B, T)`, boolean."""
        mask = self.trained_tokens(rollout)
        return turn_starts(mask) if self.args.time_step == "turn" else mask

    def _refuse_returns_outside(self, returns: torch.Tensor, mask: torch.Tensor, reward_range: RewardRange) -> None:
        low, high = extremes(self, returns, mask)
        slack = 1e-5 * (reward_range[1] - reward_range[0])
        if low < reward_range[0] - slack or high > reward_range[1] + slack:
            raise ValueError(
                f"The critic's returns at step {self.state.global_step} go from {low:g} to {high:g}, outside of "
                f"`reward_range={list(reward_range)}`, though the rewards of whole completions do not. With rewards "
                "per token or `gamma` below 1, choose a range that holds what is still to come at every token, or "
                "'running', or set `reward_range=None` and `critic_loss='mse'`."
            )

    def critic_fit(self, rollout: dict, rewards: torch.Tensor) -> torch.Tensor:
        mask = self.time_steps(rollout, "train") & rewards.isfinite().unsqueeze(1)
        earned = torch.nan_to_num(self.rewards_where_they_fall(rollout, rewards))
        returns = monte_carlo_returns(earned, mask, self.args.gamma)
        if self.args.truncation == "bootstrap":  # what would have come after a cut is not known
            mask = mask & ~self.is_cut_off(rollout).unsqueeze(1)
        return fit_sums(self.state_values(rollout)[:, :-1], returns, mask)

    def _policy_lambda(self, mask: torch.Tensor) -> torch.Tensor:
        lengths = mask.sum(1)
        if self.args.policy_lambda == "length_adaptive":
            return length_adaptive_lambda(lengths, self.args.length_adaptive_alpha)
        if self.args.policy_lambda == MEASURED:
            return torch.full(lengths.shape, self.of_critic.measured_lambda, dtype=torch.float64, device=mask.device)
        if self.args.policy_lambda == "relative_position":
            return relative_position_lambda(lengths, self.args.relative_position_weight)
        return torch.full(lengths.shape, float(self.args.policy_lambda), dtype=torch.float64, device=mask.device)

    # --- The policy's loss

    def begin_step(self, micro_batches: list[dict], mode: str) -> None:
        positive = self.total(sum(inputs["positive"].sum() for inputs in micro_batches))
        for inputs in micro_batches:
            inputs["num_positive_tokens"] = positive

    def extra_loss(self, terms: LossTerms, inputs: dict, mode: str) -> torch.Tensor | None:
        if self.args.positive_lm_coef == 0:
            return None
        positive, tokens = inputs["positive"], inputs["num_positive_tokens"]
        nll = -torch.where(positive, terms.logps.float(), 0).sum()
        self.log_means(
            mode,
            {
                "positive_lm/loss": (nll, positive.sum()),
                "positive_lm/share": (positive.any(1).sum(), positive.shape[0]),
            },
        )
        # One mean over the positive tokens of the optimizer step: processes are averaged after this.
        return self.args.positive_lm_coef * nll * self.accelerator.num_processes / tokens.clamp(min=1)

    # --- What is logged

    def _report(self, mode, values, returns, mask, cut_off, right, lam) -> None:
        known = mask
        if self.args.truncation == "bootstrap":  # what would have come after a cut is not known
            known = mask & ~cut_off.unsqueeze(1)
        generations = self.num_generations if mode == "train" else self.num_generations_eval
        fit = fit_report(self, values, returns, known, generations or 1)
        self.explained_variance = fit["explained_variance"]
        low, high = extremes(self, values, mask)
        lam_low, lam_high = extremes(self, lam, mask.any(1))
        for name, value in {
            **{f"critic/{name}": value for name, value in fit.items()},
            "critic/value_min": low,
            "critic/value_max": high,
            "policy_lambda/min": lam_low,
            "policy_lambda/max": lam_high,
        }.items():
            self.log_value(mode, name, value)
        means = value_means(values, mask, right)
        rows = mask.any(1)
        self.log_means(
            mode,
            {
                **{f"critic/value_{name}": pair for name, pair in means.items()},
                "critic/return_mean": (torch.where(known, returns, 0).sum(), known.sum()),
                "policy_lambda/mean": (torch.where(rows, lam, 0).sum(), rows.sum()),
            },
        )
