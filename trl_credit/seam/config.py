"""The base of every configuration."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from trl import GRPOConfig


@dataclass
class CreditConfig(GRPOConfig):
    r"""
    The base of every configuration of this package: what all trainers share. This class includes only the parameters of
    the credit log. For all others, refer to [`~trl.GRPOConfig`].

    Args:
        log_credit (`bool`, *optional*, defaults to `False`):
            Write what each token was given to parquet files in the folder `credit` of `output_dir`, to be looked at
            with `trl-credit inspect`.
        log_credit_steps (`int`, *optional*, defaults to `50`):
            Write a rollout every so many optimizer steps.
        log_credit_completions (`int`, *optional*, defaults to `16`):
            Completions of a rollout to write: its first ones, so that those of a prompt stay together.
    """

    # Whether the token mean of the policy's loss is exact, over the tokens of the very optimizer step; else TRL's.
    exact_token_mean: ClassVar[bool] = True
    # Whether one completion of each prompt is enough: not where credit comes from comparing them.
    allows_single_generation: ClassVar[bool] = True

    log_credit: bool = field(
        default=False,
        metadata={"help": "Write what each token was given to parquet files, for `trl-credit inspect`."},
    )
    log_credit_steps: int = field(
        default=50, metadata={"help": "Write a rollout every so many optimizer steps, with `log_credit`."}
    )
    log_credit_completions: int = field(
        default=16, metadata={"help": "Completions of a rollout to write, with `log_credit`."}
    )

    def __post_init__(self):
        name = type(self).__name__
        if self.num_generations is not None and self.num_generations < 1:
            raise ValueError(f"{name}: `num_generations` must be at least 1, got {self.num_generations}.")
        with _single_generation_allowed(self):
            super().__post_init__()
        if self.exact_token_mean:
            self._refuse_uneven_steps()
        for option in ("log_credit_steps", "log_credit_completions"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: `{option}` must be a whole number of at least 1, got {value!r}.")
            if not self.log_credit and value != type(self).__dataclass_fields__[option].default:
                raise ValueError(f"{name}: `{option}={value}` has no effect with `log_credit=False`.")

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
