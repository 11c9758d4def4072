"""A trust region by mask in the place of TRL's clipping."""

from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

from ..credit.trust_region import within_divergence, within_ratios
from ..options import Options, above, one_of


# TRL's losses that are a mean of ratio times advantage, and differ in what the mean is over.
MASKED_LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")
# δ where none is given: SkyRL's, which says that the paper recommends them.
_THRESHOLDS = {"dppo_tv": 0.2, "dppo_kl": 0.05}
# Of a ratio that pulls the policy back to its sampler, which no mask bounds: exp(20) is beyond all that still is one.
_MAX_LOG_RATIO = 20.0


@dataclass
class TrustRegionConfig(Options, GRPOConfig):
    r"""
    The part of [`~trl_credit.seam.CreditConfig`] that says what keeps the policy close to what sampled its completions.

    Args:
        trust_region (`str`, *optional*, defaults to `"clip"`):
            `"clip"`: TRL's clipping, or another bound of `loss_type`. Or a mask, with the ratio to the sampler itself
            in the loss, so that TRL's `vllm_importance_sampling_correction` is off: `"dis"` leaves out tokens whose
            ratio is not within 1 - `epsilon` and 1 + `epsilon_high`; `"dppo_tv"` and `"dppo_kl"` those that are
            further than `trust_region_threshold` from the sampler and that the update would push further away.
        trust_region_threshold (`float`, *optional*):
            Highest divergence δ of a token with DPPO. Default: 0.2 for the total variation, 0.05 for the KL.
    """

    trust_region: str = field(default="clip", metadata=one_of("clip", "dis", "dppo_tv", "dppo_kl"))
    trust_region_threshold: float | None = field(default=None, metadata=above(0))

    def check_trust_region(self) -> None:
        """Raise `ValueError` for an option that a trust region by mask leaves without effect or cannot have."""
        name, region = type(self).__name__, self.trust_region
        without_effect: list[tuple[str, object]] = []
        if region not in _THRESHOLDS:
            without_effect += [("trust_region_threshold", None)]
        else:
            without_effect += [(option, self._default(option)) for option in ("epsilon", "epsilon_high")]
        if region != "clip":
            without_effect += [("delta", None)]
        for option, default in without_effect:
            if getattr(self, option) != default:
                raise ValueError(
                    f"{name}: `{option}={getattr(self, option)!r}` has no effect with `trust_region={region!r}`. "
                    f"Leave it at {default!r}."
                )
        if region == "clip":
            return
        if self.loss_type not in MASKED_LOSS_TYPES:
            raise ValueError(
                f"{name}: `loss_type={self.loss_type!r}` bounds ratios in a way of its own, which "
                f"`trust_region={region!r}` would replace. Choose one of {MASKED_LOSS_TYPES}."
            )
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"{name}: `importance_sampling_level={self.importance_sampling_level!r}` gives a completion one ratio, "
                f"but `trust_region={region!r}` judges each token by its own. Leave it at 'token'."
            )
        self.vllm_importance_sampling_correction = False  # the ratio to the sampler contains it


def trusted_advantages(
    config: TrustRegionConfig,
    logps: torch.Tensor,
    sampler_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, tuple]]:
    r"""
    \( M_t r_t A_t \), with r the ratio of the policy to its sampler, counted once, and M the mask of the trust region.
    The gradient of \( -\sum M r A \) is that of \( -\sum \mathrm{sg}(M r A) \log \pi \).

    Args:
        config ([`TrustRegionConfig`]):
            `trust_region`, its threshold, `epsilon` and `epsilon_high`.
        logps, sampler_logps (`torch.Tensor`):
            Log-probabilities of the tokens under the policy and under what sampled them, shape `(B, T)`.
        advantages (`torch.Tensor`):
            Shape `(B, 1)` or `(B, T)`.
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`, boolean.

    Returns:
        `tuple[torch.Tensor, dict]`: What to multiply log π by, shape `(B, T)`, without gradient; and the shares of
        masked tokens by side, for [`CreditTrainer.log_means`].
    """
    logps, sampler_logps = (torch.where(mask, x.detach().float(), 0) for x in (logps, sampler_logps))
    log_ratio = logps - sampler_logps
    if config.trust_region == "dis":
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        counted = within_ratios(log_ratio, config.epsilon, high)
    else:
        threshold = config.trust_region_threshold
        threshold = _THRESHOLDS[config.trust_region] if threshold is None else threshold
        kind = config.trust_region.removeprefix("dppo_")
        counted = within_divergence(logps, sampler_logps, advantages, threshold, kind)
    ratio = log_ratio.clamp(max=_MAX_LOG_RATIO).exp()
    left_out = mask & ~counted
    metrics = {
        "trust_region/masked_low": ((left_out & (log_ratio < 0)).sum(), mask.sum()),
        "trust_region/masked_high": ((left_out & (log_ratio > 0)).sum(), mask.sum()),
        "trust_region/ratio_mean": (torch.where(mask, ratio, 0).sum(), mask.sum()),
    }
    return torch.where(mask & counted, ratio * advantages, 0), metrics
