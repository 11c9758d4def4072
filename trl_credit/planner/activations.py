"""Bytes that a forward pass keeps for its backward pass, in a decoder layer such as Qwen's and Llama's."""

from dataclasses import dataclass

from .shape import ModelShape
from .training import BFLOAT16, FLOAT32


@dataclass(frozen=True)
class Precision:
    """
    What numbers of a pass are made of.

    Args:
        weights (`int`):
            Bytes of a weight.
        compute (`int`):
            Bytes of a number that matrix products work on.
    """

    weights: int
    compute: int

    @property
    def is_autocast(self) -> bool:
        """Whether matrix products work on copies of weights and inputs."""
        return self.weights != self.compute


@dataclass(frozen=True)
class Pass:
    """
    A forward pass of a micro-batch.

    Args:
        rows, width (`int`):
            Its shape, padding included.
        masked (`bool`, *optional*, defaults to `True`):
            Whether attention has a mask, as it has where rows differ in length. Keys and values are then repeated for
            all heads.
        own_mask (`bool`, *optional*, defaults to `False`):
            Whether all layers share a mask of numbers. Otherwise each makes one of its own from that of truth values.
        lora_rank (`int`, *optional*, defaults to `0`):
            Rank of adapters, beside which norms are not trained; 0 for none.
    """

    rows: int
    width: int
    masked: bool = True
    own_mask: bool = False
    lora_rank: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the network reads."""
        return self.rows * self.width

    @property
    def trains_norms(self) -> bool:
        """Whether norms have gradients."""
        return not self.lora_rank

    @property
    def mask(self) -> int:
        """Numbers of a mask."""
        return self.rows * self.width**2 if self.masked else 0


def norm_bytes(shape: ModelShape, precision: Precision, readers: int, trained: bool) -> float:
    """
    Of one token in an RMS norm and in the inputs of the `readers` matrices that follow it.

    The norm works in float32: it keeps its input and the normalized states (the latter for the gradient of its weight).
    Autocast makes a copy of its output for every matrix.
    """
    if precision.is_autocast:  # the residual stream is float32
        return shape.hidden * (FLOAT32 + trained * FLOAT32 + readers * precision.compute)
    return shape.hidden * (FLOAT32 + trained * precision.compute + precision.compute)


def attention_bytes(shape: ModelShape, precision: Precision, masked: bool) -> float:
    """Of one token in fused attention: query, key, value, output, and a log-sum-exp for each head."""
    query = shape.heads * shape.head_dim
    key = query if masked else shape.kv_heads * shape.head_dim
    return precision.compute * (2 * query + 2 * key) + FLOAT32 * shape.heads


def feed_forward_bytes(shape: ModelShape, precision: Precision) -> float:
    """Of one token in a gated feed-forward layer: gate, its activation, up, and their product."""
    return precision.compute * 4 * shape.intermediate


def adapter_bytes(shape: ModelShape, precision: Precision, rank: int) -> float:
    """Of one token between the two matrices of all adapters of a layer."""
    return precision.compute * rank * len(shape.linear) / shape.layers


def layer_bytes(shape: ModelShape, precision: Precision, of: Pass) -> float:
    """What one layer keeps."""
    token = (
        norm_bytes(shape, precision, 3, of.trains_norms)  # read by query, key, value
        + attention_bytes(shape, precision, of.masked)
        + norm_bytes(shape, precision, 2, of.trains_norms)  # read by gate and up
        + feed_forward_bytes(shape, precision)
        + adapter_bytes(shape, precision, of.lora_rank)
    )
    mask = 0 if of.own_mask else precision.compute * of.mask
    return of.tokens * token + mask


def layer_input_bytes(shape: ModelShape, precision: Precision, of: Pass) -> float:
    """What checkpointing keeps of a layer: its input."""
    return of.tokens * shape.hidden * (FLOAT32 if precision.is_autocast else precision.compute)


def backward_bytes(shape: ModelShape, precision: Precision, of: Pass) -> float:
    """
    The most that the backward pass of a layer holds beyond what the layer keeps: two gradients in the width of the
    feed-forward layer, before what they are gradients of is dropped, and two in that of the residual stream.
    """
    residual = FLOAT32 if precision.is_autocast else precision.compute
    return of.tokens * (precision.compute * 2 * shape.intermediate + residual * 2 * shape.hidden)


def copies_bytes(parameters: float, precision: Precision) -> float:
    """Copies of weights that autocast makes, once a pass."""
    return BFLOAT16 * parameters if precision.is_autocast else 0.0
