"""Bytes of a forward and backward pass, at the moment when there are most of them."""

from dataclasses import dataclass

from .activations import Pass, Precision, backward_bytes, copies_bytes, layer_bytes, layer_input_bytes
from .logits import head_gradients_bytes, tile_bytes
from .shape import ModelShape
from .training import FLOAT32


@dataclass(frozen=True)
class Head:
    """
    The language-model head in a pass.

    Args:
        scored (`int`):
            Positions whose logits are computed.
        tile_words (`int`):
            Words of a tile.
        trained (`bool`):
            Whether its matrix has a gradient.
        on_cpu (`bool`):
            Whether tiles are folded in torch.
    """

    scored: int
    tile_words: int
    trained: bool
    on_cpu: bool


@dataclass(frozen=True)
class Moment:
    """Bytes at one moment of an update."""

    gradients: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.gradients + self.activations + self.logits


def worst_moment(
    shape: ModelShape,
    precision: Precision,
    of: Pass,
    gradients: float,
    accumulates: bool,
    checkpointing: bool,
    head: Head | None = None,
) -> Moment:
    """
    The moment of an update with most bytes: the end of a forward pass, the head's backward pass, that of the last
    layer, or that of the first.

    Args:
        shape ([`~trl_credit.planner.shape.ModelShape`]):
            The network.
        precision ([`~trl_credit.planner.activations.Precision`]):
            Its numbers.
        of ([`~trl_credit.planner.activations.Pass`]):
            The micro-batch.
        gradients (`float`):
            Bytes of its gradients once all are there.
        accumulates (`bool`):
            Whether they are there before the last micro-batch.
        checkpointing (`bool`):
            Whether layers are computed again in the backward pass.
        head ([`Head`], *optional*):
            Its language-model head. Default: one number for each token, which is next to nothing.
    """
    kept_by_layer = layer_input_bytes(shape, precision, of) if checkpointing else layer_bytes(shape, precision, of)
    mask = precision.compute * of.mask if of.own_mask else of.mask  # of truth values, a byte each
    last_norm = of.tokens * shape.hidden * (2 * FLOAT32 + precision.compute)
    kept = shape.layers * kept_by_layer + last_norm + mask
    in_layers = sum(inputs * outputs for inputs, outputs in shape.linear)
    copies = copies_bytes(in_layers, precision)
    layer = backward_bytes(shape, precision, of)
    if checkpointing:  # the layer is there again as a whole
        layer += layer_bytes(shape, precision, of) + copies / shape.layers
    before = gradients if accumulates else 0.0
    tile = own_gradients = waiting = 0.0
    if head is not None:
        tile = tile_bytes(head.scored, shape.vocab, precision.compute, head.tile_words, head.on_cpu)
        own_gradients = head_gradients_bytes(head.scored, shape.hidden, shape.vocab, head.trained)
        # That of a tied matrix waits for the embeddings' part of it, to the end.
        waiting = FLOAT32 * shape.embeddings * (head.trained and shape.tied)
    held = copies if not checkpointing else 0.0  # kept for the backward pass
    return max(
        Moment(before, kept + copies, tile),
        Moment(before, kept + held, tile + own_gradients),
        Moment(before, kept + held + layer, waiting),
        Moment(gradients, kept_by_layer + mask + layer, 2 * waiting),
        key=lambda moment: moment.total,
    )
