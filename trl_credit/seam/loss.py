"""The policy's loss: what a trainer may change inside TRL's."""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .reference import ReferenceSeam
from .trust_region import trusted_advantages


# Config fields by which an architecture transforms its logits after the LM head.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)
# Tokens whose hidden states [`eos_prob`] multiplies with the weights of their logits at a time.
_TOKENS_AT_A_TIME = 4096


@dataclass
class LossTerms:
    """
    The ingredients of the policy loss, for one micro-batch.

    Args:
        logps (`torch.Tensor`):
            Log-probabilities of the completion's tokens under the policy, shape `(B, T)`, with gradient.
        log_ratio (`torch.Tensor`):
            `logps` minus the log-probabilities under the policy that the update started from, shape `(B, T)`, float32,
            with gradient.
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


def trained_tokens(inputs: dict) -> torch.Tensor:
    """Tokens that the policy chose and is trained on, shape `(B, T)`, boolean."""
    mask = inputs["completion_mask"]
    return (mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]).bool()


class LossSeam(ReferenceSeam):
    """The part of [`CreditTrainer`] that changes the loss."""

    # Metrics that TRL takes of a ratio which `shape_loss` has changed go under this name, apart from those of the true
    # ratio.
    shaped_prefix = "shaped"
    # Whether log-probabilities of the old and the reference policy are computed with a rollout.
    _scores_tokens = True

    def shape_loss(self, terms: LossTerms, mode: str) -> LossTerms:
        """
        Decide what the policy loss sees.

        This affects only the policy term: KL penalty, entropy bonus, off-policy mask and sampler correction keep the
        true log-probabilities.

        Args:
            terms (`LossTerms`):
                The terms of GRPO.
            mode (`str`):
                `"train"` or `"eval"`.

        Returns:
            `LossTerms`: The terms with another `log_ratio` or `advantages`, or the same object for no change.
        """
        return terms

    def extra_loss(self, terms: LossTerms, inputs: dict, mode: str) -> torch.Tensor | None:
        """
        Add a term to the policy's loss.

        Args:
            terms (`LossTerms`):
                The terms of GRPO.
            inputs (`dict`):
                The micro-batch.
            mode (`str`):
                `"train"` or `"eval"`.

        Returns:
            `torch.Tensor`: A further term of the loss, a scalar with gradient, or `None`. Terms are summed over the
            micro-batches of an optimizer step and averaged over processes.
        """
        return None

    @torch.no_grad()
    def eos_prob(self, terms: LossTerms) -> torch.Tensor | None:
        """
        Probability that the policy ends the completion at each state, shape `(B, T)`.

        It comes from the hidden states of the loss's own forward pass: the log-probability of the sampled token is
        known, so only the EOS logit minus that token's logit is missing, and no second pass over the vocabulary is
        needed. `None` for architectures that transform their logits (Gemma 2, Cohere, Granite, ...) and where the
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
            end_weight, end_bias = _rows(weight, bias, torch.tensor(self.eos_token_ids, device=ids.device))
            states = self._loss.hidden_states[:, -ids.shape[1] - 1 : -1]
            gaps = []
            # In pieces, for memory's sake: this is when the activations of the whole forward pass are alive.
            length = max(_TOKENS_AT_A_TIME // max(len(ids), 1), 1)
            for state, token in zip(states.split(length, dim=1), ids.split(length, dim=1), strict=True):
                eos_logit = F.linear(
                    state, end_weight.to(state.dtype), None if end_bias is None else end_bias.to(state.dtype)
                )
                token_weight, token_bias = _rows(weight, bias, token)
                token_logit = (state * token_weight.to(state.dtype)).sum(-1, keepdim=True)
                if token_bias is not None:
                    token_logit = token_logit + token_bias.to(state.dtype).unsqueeze(-1)
                gaps.append((eos_logit - token_logit).float())
            gap = torch.cat(gaps, dim=1) / self.temperature  # (B, T, EOS ids)
        return (terms.logps.detach().float().unsqueeze(-1) + gap).clamp(max=0).exp().sum(-1).clamp(max=1)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._loss is None and not self._scores_tokens:
            return None, None, None
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

    @property
    def _kl_sees_ratio(self) -> bool:
        # TRL's bias-corrected KL is multiplied by the ratio of the policy term, whichever that is.
        return self._loss.beta != 0.0 and self.args.use_bias_correction_kl

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
            mask=trained_tokens(inputs),
        )
        self._loss.terms = terms
        shaped = self.shape_loss(terms, self._mode)
        if self.args.trust_region != "clip":
            shaped = self._in_trust_region(shaped, inputs.get("sampling_per_token_logps"), old_logps)
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
        self._loss.true_ratio_metrics = {} if self.args.trust_region != "clip" else self._clip_ratio(terms)

    def _in_trust_region(self, terms: LossTerms, sampler_logps, old_logps: torch.Tensor) -> LossTerms:
        """
        Terms whose ratio is 1, with the gradient of log π, which no clipping reaches; the ratio to the sampler and the
        mask of the trust region are in the advantages.
        """
        if terms.log_ratio is not self._loss.terms.log_ratio:
            raise ValueError(
                f"`trust_region={self.args.trust_region!r}` has a ratio of its own, but {type(self).__name__} shapes "
                "the log-ratio in `shape_loss`. Leave it at 'clip'."
            )
        # vLLM knows none of some tokens; without an engine of its own the policy that the update started from is it.
        known = old_logps if sampler_logps is None else torch.where(sampler_logps.isnan(), old_logps, sampler_logps)
        advantages, metrics = trusted_advantages(self.args, terms.logps, known, terms.advantages, terms.mask)
        self.log_means(self._mode, metrics)
        logps = terms.logps.float()
        return terms.replace(log_ratio=logps - logps.detach(), advantages=advantages)

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
            value = metrics[name].pop()
            if self.args.trust_region == "clip":  # else nothing is clipped
                metrics[f"{self.shaped_prefix}/{name}"].append(value)
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


def _rows(weight, bias, index):
    return F.embedding(index, weight), None if bias is None else bias[index]
