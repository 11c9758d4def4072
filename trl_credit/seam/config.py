"""The base of every configuration."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from ..options import at_least, unless
from .trust_region import TrustRegionConfig


# TRL's loss types that are a function of a ratio and an advantage per token.
TOKEN_LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo")
# What `restricted` is where tokens have advantages of their own.
PER_TOKEN: dict[str, tuple[tuple, str]] = {
    "loss_type": (TOKEN_LOSS_TYPES, "is no loss with a ratio and an advantage per token"),
    "importance_sampling_level": (
        ("token",),
        "gives a completion one ratio, but its tokens have advantages of their own",
    ),
}
# And where no group of completions takes part in them.
NO_GROUP: dict[str, tuple[tuple, str]] = {
    name: (only, "has no effect: advantages do not come from a group of completions")
    for name, only in (("scale_rewards", ("none",)), ("multi_objective_aggregation", ("sum_then_normalize",)))
}


@dataclass
class CreditConfig(TrustRegionConfig):
    r"""
    The base of every configuration of this package: what all trainers share. This class includes only the parameters of
    the credit log. For those of the trust region, refer to [`~trl_credit.seam.trust_region.TrustRegionConfig`], for all
    others to [`~trl.GRPOConfig`].

    Args:
        log_credit (`bool`, *optional*, defaults to `False`):
            Write the credit of each token to parquet files in the folder `_credit` of `output_dir`, to be viewed with
            `trl-credit inspect`. The folder is not pushed to the Hub.
        log_credit_steps (`int`, *optional*, defaults to `50`):
            Write one rollout every this many optimizer steps.
        log_credit_completions (`int`, *optional*, defaults to `16`):
            How many completions of a rollout to write: the first ones, so that those of a prompt stay together.
    """

    # Whether the token mean of the policy's loss is exact, over the tokens of the very optimizer step; else TRL's.
    exact_token_mean: ClassVar[bool] = True
    # Whether one completion of each prompt is enough: not where credit comes from comparing them.
    allows_single_generation: ClassVar[bool] = True

    log_credit: bool = False
    log_credit_steps: int = field(default=50, metadata=at_least(1) | unless(log_credit=False))
    log_credit_completions: int = field(default=16, metadata=at_least(1) | unless(log_credit=False))

    def __post_init__(self):
        self.check_options()
        fewest, why = (1, "") if self.allows_single_generation else (2, ": credit comes from comparing completions")
        if self.num_generations is not None and self.num_generations < fewest:
            raise ValueError(
                f"{type(self).__name__}: `num_generations` must be at least {fewest}, got {self.num_generations}{why}."
            )
        with _single_generation_allowed(self):
            super().__post_init__()
        self.check_restricted()
        self.check_trust_region()
        if self.exact_token_mean:
            self._refuse_uneven_steps()

    def _refuse_uneven_steps(self):
        assert self.steps_per_generation is not None  # set by `GRPOConfig`
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"{type(self).__name__}: `gradient_accumulation_steps` ({self.gradient_accumulation_steps}) must "
                f"divide `steps_per_generation` ({self.steps_per_generation}): losses are means over all tokens of an "
                "optimizer step, which must be known when it begins. Leave `steps_per_generation` unset, or make it a "
                "multiple."
            )


class _SingleGeneration(int):
    """1, which `GRPOConfig` does not take for too few."""

    def __lt__(self, other):
        return False


@contextmanager
def _single_generation_allowed(config: CreditConfig):
    """Around `GRPOConfig.__post_init__`: its refusal of one completion per prompt is for group baselines."""
    single = config.num_generations == 1 and config.allows_single_generation
    if single:
        config.num_generations = _SingleGeneration(1)
    try:
        yield
    finally:
        if single:
            config.num_generations = 1
