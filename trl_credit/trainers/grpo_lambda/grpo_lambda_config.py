from dataclasses import dataclass, field
from typing import ClassVar

from ...options import at_most, between, one_of, unless
from ...seam import CreditConfig


# TRL's loss types that are a function of a per-token ratio, which a trace can replace.
TRACED_LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo")


@dataclass
class GRPOLambdaConfig(CreditConfig):
    r"""
    Configuration class for the [`GRPOLambdaTrainer`].

    This class includes only the parameters that are specific to GRPO-λ. For those of the credit log, refer to
    [`~trl_credit.seam.CreditConfig`], for all others to [`~trl.GRPOConfig`].

    Args:
        trace_lambda (`float`, *optional*, defaults to `0.99`):
            Trace decay λ in [0, 1]. Together with `gamma` it sets a = γλ, by which the weight of a token in the ratios
            of later tokens decays. `0.0` gives GRPO, whatever the other trace options say.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount γ in [0, 1].
        trace_style (`str`, *optional*, defaults to `"recent"`):
            Which earlier tokens have the most weight in a token's ratio: `"recent"`, the ones just before it (eq. 1);
            `"both"`, those and the first ones of the completion (eq. 2).
        trace_update (`str`, *optional*, defaults to `"trace"`):
            `"trace"` traces the log-ratio inside the loss (algorithm 1, ε-trace); `"weight"` keeps the plain ratio and
            multiplies the loss of each token by its trace weight (algorithm 2, ε-weight).
        trace_floor (`float`, *optional*, defaults to `0.0`):
            Minimum weight of an earlier token in a trace, in [0, 1] (ε of eqs. 17 and 18).
        trace_normalization (`str`, *optional*, defaults to `"none"`):
            `"none"`, as in the paper, where early tokens can have 1 / (1 - a) times as much weight as in GRPO; `"mean"`
            divides the trace so that the weights average 1 over each completion.
        min_advantage (`float` or `None`, *optional*, defaults to `-0.1`):
            Lower clamp of the group-normalised advantage, at most 0. `None` turns it off.

    > [!NOTE]
    > `loss_type="vespo"` is refused: it weights whole sequences and has no per-token ratio to trace.
    """

    exact_token_mean: ClassVar[bool] = False  # TRL's, so that λ = 0 is GRPO
    allows_single_generation: ClassVar[bool] = False  # the baseline is the group's

    restricted = {"loss_type": (TRACED_LOSS_TYPES, "has no ratio per token to trace")}

    trace_lambda: float = field(default=0.99, metadata=between(0, 1))
    gamma: float = field(default=1.0, metadata=between(0, 1))
    trace_style: str = field(default="recent", metadata=one_of("recent", "both"))
    trace_update: str = field(default="trace", metadata=one_of("trace", "weight"))
    trace_floor: float = field(default=0.0, metadata=between(0, 1) | unless(trace_lambda=0, gamma=0))
    trace_normalization: str = field(default="none", metadata=one_of("none", "mean"))
    min_advantage: float | None = field(default=-0.1, metadata=at_most(0))

    def __post_init__(self):
        super().__post_init__()
        if self.trust_region != "clip" and self.trace_update == "trace" and self.trace_decay != 0:
            raise ValueError(
                f"GRPOLambdaConfig: `trust_region={self.trust_region!r}` judges each token by its own ratio, but "
                "`trace_update='trace'` mixes the ratios of tokens. Set `trace_update='weight'`, or leave it at 'clip'."
            )

    @property
    def trace_decay(self) -> float:
        """a = γλ, the factor by which a trace decays at each token."""
        return self.gamma * self.trace_lambda
