from typing import Any

import torch

from ...credit.lemma import value_gap_bound
from ...credit.traces import adjoint_trace, eligibility_trace
from ...seam import CreditTrainer, LossTerms
from .grpo_lambda_config import GRPOLambdaConfig


# exp(20) is far outside any clip range; beyond it the loss of a negative advantage only heads for infinity. Below
# exp(-20) a term is nothing, and CISPO divides by the ratio, which must not become 0.
_MAX_LOG_RATIO = 20.0


class GRPOLambdaTrainer(CreditTrainer):
    """
    Trainer for GRPO-λ: GRPO with token-level credit from eligibility traces over log-probabilities, and no critic.

    The method was introduced in [GRPO-λ: Credit Assignment improves LLM
    Reasoning](https://huggingface.co/papers/2510.00194). Arguments are those of [`~trl.GRPOTrainer`], with `args` a
    [`GRPOLambdaConfig`].

    Example:

    ```python
    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer

    trainer = GRPOLambdaTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=GRPOLambdaConfig("Qwen2.5-0.5B-GRPO-lambda", trace_lambda=0.99),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-credit", "grpo-lambda"]
    _name = "GRPO-λ"
    _paper = {
        "title": "GRPO-λ: Credit Assignment improves LLM Reasoning",
        "id": "2510.00194",
        # docstyle-ignore
        "citation": """\
@article{parthasarathi2025grpolambda,
    title        = {{GRPO-$\\lambda$: Credit Assignment improves LLM Reasoning}},
    author       = {Prasanna Parthasarathi and Mathieu Reymond and Boxing Chen and Yufei Cui and Sarath Chandar},
    year         = 2025,
    eprint       = {arXiv:2510.00194},
}""",
    }
    args: GRPOLambdaConfig
    config_class = GRPOLambdaConfig
    shaped_prefix = "trace"

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        if self.args.min_advantage is not None:
            rollout["advantages"] = rollout["advantages"].clamp(min=self.args.min_advantage)
        return rollout

    def shape_loss(self, terms: LossTerms, mode: str) -> LossTerms:
        decay = self.args.trace_decay
        if decay == 0:  # GRPO
            return terms
        trace: dict[str, Any] = {
            "mask": terms.mask,
            "decay": decay,
            "style": self.args.trace_style,
            "floor": self.args.trace_floor,
            "normalization": self.args.trace_normalization,
        }
        if self.args.trace_update == "weight":
            # Algorithm 2. 1 + σ(log π - 1) is a soft clamp of log π, and keeps its gradient.
            weights = eligibility_trace(torch.ones_like(terms.log_ratio), **trace)
            weights = weights * (1 + torch.sigmoid(terms.logps.float() - 1))
            shaped = terms.replace(advantages=terms.advantages * weights)
        else:
            weights = adjoint_trace(torch.ones_like(terms.log_ratio), **trace)
            log_ratio = eligibility_trace(terms.log_ratio, **trace).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
            shaped = terms.replace(log_ratio=log_ratio)
            if self.loss_type == "cispo":
                shaped = shaped.replace(advantages=terms.advantages * self._cispo_weights(log_ratio, weights, trace))
        self._log_trace(terms, weights.detach(), mode)
        return shaped

    def _cispo_weights(self, log_ratio: torch.Tensor, weights: torch.Tensor, trace: dict) -> torch.Tensor:
        """
        CISPO's ratio c carries no gradient: it multiplies log π. With a trace the loss is
        \\( -\\sum_t c_t A (S \\log\\pi)_t = -\\sum_j A (S^\\top c)_j \\log\\pi_j \\), and TRL multiplies by c_j itself.
        """
        if self.importance_sampling_level == "sequence":  # one c for all tokens
            return weights
        clipped = log_ratio.detach().exp().clamp(max=self.epsilon_high)
        return adjoint_trace(clipped, **trace) / clipped

    @torch.no_grad()
    def _log_trace(self, terms: LossTerms, weights: torch.Tensor, mode: str) -> None:
        self.add_credit("weight", weights)
        mask = terms.mask
        tokens, rows = mask.sum(), mask.any(1)
        number = rows.sum()
        first = mask.int().argmax(1, keepdim=True)
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1, keepdim=True)

        def at(values, column):  # (B, T), (B, 1) -> sum over the rows that have trained tokens, their number
            return (values.gather(1, column).squeeze(1) * rows).sum(), number

        x = torch.where(mask, terms.log_ratio, 0)
        metrics = {
            "trace/weight_first": at(weights, first),
            "trace/weight_mean": ((weights * mask).sum(), tokens),
            "trace/weight_last": at(weights, last),
            "approx_kl": ((x.exp() - 1 - x).sum(), tokens),
        }
        eos_prob = self.eos_prob(terms)
        if eos_prob is not None:
            bound = value_gap_bound(eos_prob, mask)
            metrics["trace/value_gap_bound_mean"] = ((bound * mask).sum(), tokens)
            metrics["trace/value_gap_bound_last"] = at(bound, last)
        self.log_means(mode, metrics)
