from dataclasses import dataclass, field

from ...options import at_least, unless
from ...seam.config import NO_GROUP, PER_TOKEN, CreditConfig
from ...segmenting import DelimiterSegmenter


@dataclass
class VinePPOConfig(CreditConfig):
    r"""
    Configuration class for the [`VinePPOTrainer`].

    This class includes only the parameters that are specific to VinePPO. For those of the credit log, refer to
    [`~trl_credit.seam.CreditConfig`], for all others to [`~trl.GRPOConfig`].

    Args:
        vine_continuations (`int`, *optional*, defaults to `9`):
            Number of continuations K sampled from each state; the state's value is their mean reward.
        vine_batch_tokens (`int`, *optional*, defaults to `65536`):
            Tokens per batch of continuations, including padding and the prefixes that are continued. vLLM and
            continuous batching split the work themselves.
        segment_min_length (`int`, *optional*, defaults to `40`):
            Shortest segment of a completion, in tokens; a completion may be shorter.
        segment_target_length (`int`, *optional*, defaults to `120`):
            Preferred length of a segment.
        segment_max_length (`int`, *optional*, defaults to `240`):
            Length at which a segment ends in any case.
        max_segments (`int`, *optional*):
            Maximum number of segments of a completion, and so of states to sample from; in longer completions the
            segments grow. Default: no limit.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            Only `"none"`: there is no group baseline to scale.
    """

    restricted = NO_GROUP | PER_TOKEN

    vine_continuations: int = field(default=9, metadata=at_least(1))
    vine_batch_tokens: int = field(
        default=65536, metadata=at_least(1) | unless(use_vllm=True, use_transformers_continuous_batching=True)
    )
    segment_min_length: int = field(default=40, metadata=at_least(1))
    segment_target_length: int = field(default=120, metadata=at_least(1))
    segment_max_length: int = field(default=240, metadata=at_least(1))
    max_segments: int | None = field(default=None, metadata=at_least(1))
    scale_rewards: str = "none"

    def __post_init__(self):
        super().__post_init__()
        DelimiterSegmenter.of(self)  # refuses lengths that contradict each other
