"""Bytes of a trained network between its passes: weights, gradients, optimizer."""

from dataclasses import dataclass


FLOAT32, BFLOAT16 = 4, 2
ITEMSIZE = {"float32": FLOAT32, "bfloat16": BFLOAT16}
ADAM_MOMENTS = 2  # AdamW keeps a mean and a variance of each gradient
# DeepSpeed's defaults, in parameters: what it reduces at a time, and what ZeRO-3 may hold of gathered weights.
REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Training:
    """
    Bytes of a network that is trained, on one GPU.

    Args:
        weights (`float`):
            Its weights, the trained and the frozen.
        gradients (`float`):
            Gradients of the trained ones once all are there.
        optimizer (`float`):
            State of AdamW, and the float32 copy that DeepSpeed updates.
        gathered (`float`):
            Weights of other GPUs during a pass, and buffers in which gradients meet.
        step (`float`):
            What AdamW makes and drops in a step.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float = 0.0
    step: float = 0.0


def training(
    frozen: float,
    trained: float,
    itemsize: int,
    trained_itemsize: int,
    split: str,
    gpus: int,
    layer: float,
    head: float,
    accumulates_whole: bool = False,
    is_fused: bool = True,
    largest: float | None = None,
) -> Training:
    """
    What a network takes, by how it is spread over GPUs.

    Args:
        frozen, trained (`float`):
            Numbers of parameters.
        itemsize, trained_itemsize (`int`):
            Bytes of a frozen and of a trained weight, where no engine changes them.
        split (`str`):
            `"one"`, `"ddp"`, `"zero2"`, `"zero3"` or `"fsdp2"`.
        gpus (`int`):
            GPUs.
        layer, head (`float`):
            Parameters of a layer, and of embeddings or head, which are gathered as a whole.
        accumulates_whole (`bool`, *optional*, defaults to `False`):
            Whether FSDP2 keeps whole gradients until the last micro-batch, as `accelerate` has it do for the policy.
        is_fused (`bool`, *optional*, defaults to `True`):
            Whether AdamW makes its step in one kernel. Otherwise it makes a root of every variance first.
        largest (`float`, *optional*):
            Parameters of the largest matrix, where those roots are made matrix by matrix (on a CPU).

    Returns:
        [`Training`]: Bytes.
    """
    roots = 0.0 if is_fused else trained if largest is None else 2 * min(largest, trained)
    if split in ("one", "ddp"):
        gradients = trained * trained_itemsize
        return Training(
            weights=frozen * itemsize + gradients,
            gradients=gradients,
            optimizer=ADAM_MOMENTS * gradients,
            # DDP reduces gradients in buckets of its own, a second copy.
            gathered=gradients if split == "ddp" else 0.0,
            step=roots * trained_itemsize,
        )
    if split == "fsdp2":
        # Sharded in float32, gathered in bfloat16: the layer at work, the next one on its way, embeddings and head.
        whole = BFLOAT16 * trained if accumulates_whole else 0.0
        return Training(
            weights=FLOAT32 * (frozen + trained) / gpus,
            gradients=whole or FLOAT32 * trained / gpus,
            optimizer=ADAM_MOMENTS * FLOAT32 * trained / gpus,
            gathered=BFLOAT16 * (2 * layer + head),
            step=FLOAT32 * roots / gpus,
        )
    # ZeRO: weights and gradients in bfloat16, a float32 copy of the trained weights beside AdamW's moments.
    parameters = frozen + trained
    shards = gpus if split == "zero3" else 1
    if split == "zero3":
        gathered = BFLOAT16 * min(parameters, LIVE_PARAMETERS)
    else:
        gathered = BFLOAT16 * 2 * min(trained, REDUCE_BUCKET)
    return Training(
        weights=BFLOAT16 * parameters / shards,
        gradients=BFLOAT16 * trained / gpus,
        optimizer=(1 + ADAM_MOMENTS) * FLOAT32 * trained / gpus,
        gathered=gathered,
        # The gradient in float32, for the step.
        step=FLOAT32 * (trained + roots) / gpus,
    )
