"""Trainers that only the benchmark needs: baselines, null hypotheses, and credit from values that are known."""

from dataclasses import dataclass, field

import torch

from trl_credit.credit.gae import gae
from trl_credit.credit.traces import adjoint_trace
from trl_credit.seam import CreditConfig, CreditTrainer, LossTerms
from trl_credit.trainers.vapo import VAPOTrainer
from trl_credit.trainers.vineppo import VinePPOTrainer

from .exact import exact_values, monte_carlo_values


def batch_mean_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """R less the mean of all, shape `(B,)`; 0 where there is no reward."""
    return torch.nan_to_num(rewards - rewards.nanmean())


def segmenter_of(task):
    """The segments of a task, as trainers ask for them."""
    return lambda token_ids, tokenizer, trainable=None: task.segment_ends(len(token_ids))


class BatchMeanTrainer(CreditTrainer):
    """The least that a critic must beat: the baseline is the mean reward of the rollout."""

    _name = "batch mean"
    config_class = CreditConfig

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        return {**rollout, "advantages": batch_mean_advantages(rewards)}


@dataclass
class PositionWeightsConfig(CreditConfig):
    """GRPO with the mean weights that GRPO-λ gives to positions."""

    exact_token_mean = False
    trace_lambda: float = 0.99
    trace_style: str = "recent"
    trace_normalization: str = "none"


class PositionWeightsTrainer(CreditTrainer):
    """The null hypothesis of GRPO-λ: each token weighs what its trace gives it in all, and nothing is traced."""

    _name = "GRPO, position weights"
    args: PositionWeightsConfig
    config_class = PositionWeightsConfig

    def shape_loss(self, terms: LossTerms, mode: str) -> LossTerms:
        weights = adjoint_trace(
            torch.ones_like(terms.logps, dtype=torch.float32),
            terms.mask,
            self.args.trace_lambda,
            style=self.args.trace_style,
            normalization=self.args.trace_normalization,
        )
        return terms.replace(advantages=terms.advantages * weights)


@dataclass
class OracleConfig(CreditConfig):
    """Credit from values that are known: `continuations=0` by the task's program, else by as many for each state."""

    policy_lambda: float = 0.0
    continuations: int = field(default=0)


class TaskVAPOTrainer(VAPOTrainer):
    """VAPO with a probe critic at the boundaries of the task's segments, if it is asked at segments at all."""

    def __init__(self, *args, task, **kwargs):
        if kwargs["args"].probe_boundaries == "segments":
            kwargs["segmenter"] = segmenter_of(task)
        super().__init__(*args, **kwargs)


class TaskVinePPOTrainer(VinePPOTrainer):
    """VinePPO on the segments of the task."""

    def __init__(self, model, reward_funcs, *args, task, **kwargs):
        self._spent = reward_funcs
        super().__init__(
            model,
            reward_funcs,
            *args,
            segmenter=segmenter_of(task),
            **kwargs,
        )

    def continue_from(self, states, rows):
        """As VinePPO's. What the states had written already was generated once, however often it is rewarded."""
        before = self._spent.tokens
        rewards, tokens, seconds = super().continue_from(states, rows)
        self._spent.tokens = before + tokens
        return rewards, tokens, seconds


class OracleTrainer(CreditTrainer):
    """What a critic without a fault would give."""

    _name = "oracle"
    args: OracleConfig
    config_class = OracleConfig

    def __init__(self, *args, task, **kwargs):
        self.task = task
        self.continuation_tokens = 0
        super().__init__(*args, **kwargs)

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        prompts, completions = rollout["prompt_ids"], rollout["completion_ids"]
        model = self.accelerator.unwrap_model(self.model)
        if self.args.continuations:
            generator = torch.Generator().manual_seed(self.args.seed + 1_000_003 * self.state.global_step)
            values, tokens = monte_carlo_values(
                model, self.task, prompts, completions, self.args.continuations, generator
            )
            self.continuation_tokens += tokens
        else:
            values = exact_values(model, self.task, prompts, completions)
        mask = self.trained_tokens(rollout)
        advantages, _ = gae(rewards, values[:, :-1], mask, lam=self.args.policy_lambda)
        return {**rollout, "advantages": advantages}
