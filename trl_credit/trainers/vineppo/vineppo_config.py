from dataclasses import dataclass, field

from ...seam import CreditConfig
from ...segmenting import DelimiterSegmenter
from ..vapo.vapo_config import TOKEN_LOSS_TYPES


@dataclass
class VinePPOConfig(CreditConfig):
    r"""
    Configuration class for the [`VinePPOTrainer`].

    This class includes only the parameters that are specific to VinePPO. For those of the credit log, refer to
    [`~trl_credit.seam.CreditConfig`], for all others to [`~trl.GRPOConfig`].

    Args:
        vine_continuations (`int`, *optional*, defaults to `9`):
            Continuations K sampled from each state; its value is their mean reward.
        vine_batch_tokens (`int`, *optional*, defaults to `65536`):
            Tokens of the continuations that are generated together, padding and what they continue included. vLLM and
            continuous batching divide the work themselves.
        segment_min_length (`int`, *optional*, defaults to `40`):
            Shortest segment of a completion, in tokens; a completion may be shorter.
        segment_target_length (`int`, *optional*, defaults to `120`):
            Preferred length of a segment.
        segment_max_length (`int`, *optional*, defaults to `240`):
            Length at which a segment ends in any case.
        max_segments (`int`, *optional*):
            Most segments of a completion, and so most states to sample from. Segments of a longer one are longer.
            Default: no limit.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            Only `"none"`: there is no group baseline to scale.
    """

    vine_continuations: int = field(
        default=9,
        metadata={"help": "Continuations sampled from each state; its value is their mean reward."},
    )
    vine_batch_tokens: int = field(
        default=65536,
        metadata={"help": "Tokens of the continuations that transformers generates together."},
    )
    segment_min_length: int = field(default=40, metadata={"help": "Shortest segment of a completion, in tokens."})
    segment_target_length: int = field(default=120, metadata={"help": "Preferred length of a segment."})
    segment_max_length: int = field(default=240, metadata={"help": "Length at which a segment ends in any case."})
    max_segments: int | None = field(
        default=None, metadata={"help": "Most segments of a completion. Default: no limit."}
    )
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Only `none`: there is no group baseline to scale."},
    )

    def __post_init__(self):
        super().__post_init__()
        whole = ("vine_continuations", "vine_batch_tokens", "segment_min_length", "segment_target_length")
        for name in (*whole, "segment_max_length", "max_segments"):
            value = getattr(self, name)
            if name == "max_segments" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"VinePPOConfig: `{name}` must be a whole number of at least 1, got {value!r}.")
        try:
            self.make_segmenter()
        except ValueError as error:
            raise ValueError(f"VinePPOConfig: {error} They are `segment_min_length` and so on here.") from None
        default = type(self).__dataclass_fields__["vine_batch_tokens"].default
        for option in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(self, option) and self.vine_batch_tokens != default:
                raise ValueError(
                    f"VinePPOConfig: `vine_batch_tokens={self.vine_batch_tokens}` has no effect with `{option}=True`, "
                    "which divides the work itself."
                )
        if self.loss_type not in TOKEN_LOSS_TYPES:
            raise ValueError(
                f"VinePPOConfig: `loss_type={self.loss_type!r}` has no per-token advantage. Choose one of "
                f"{TOKEN_LOSS_TYPES}."
            )
        for name, only in (("scale_rewards", "none"), ("multi_objective_aggregation", "sum_then_normalize")):
            if getattr(self, name) != only:
                raise ValueError(
                    f"VinePPOConfig: `{name}={getattr(self, name)!r}` has no effect: advantages come from "
                    f"continuations of a completion, not from a group of completions. Leave it at {only!r}."
                )
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"VinePPOConfig: `importance_sampling_level={self.importance_sampling_level!r}` gives a completion one "
                "ratio, but its segments have advantages of their own. Use 'token'."
            )

    def make_segmenter(self) -> DelimiterSegmenter:
        """What divides completions into segments, unless the trainer is given another."""
        lengths = (self.segment_min_length, self.segment_target_length, self.segment_max_length)
        return DelimiterSegmenter(*lengths, self.max_segments)
