"""The first-order linear recurrence under eligibility traces and generalised advantage estimation."""

import torch


def linear_recurrence(x: torch.Tensor, decay: float | torch.Tensor, reverse: bool = False) -> torch.Tensor:
    r"""
    Solve \\( y_t = d_t \, y_{t-1} + x_t \\) along the last dimension, starting from zero.

    With `reverse=True` the recurrence runs from the end: \\( y_t = d_t \, y_{t+1} + x_t \\).

    Neighbours are combined in pairs, the half-length problem is solved in the same way, and its solution is expanded
    (odd-even reduction; Blelloch, "Prefix sums and their applications", 1990). That is O(T) work in O(log T) vector
    operations, and numbers are only ever multiplied by products of decays, never divided by them: zeros in the decay
    are exact resets and nothing overflows.

    Args:
        x (`torch.Tensor`):
            Inputs of shape `(B, T)`. `B` and `T` may be 0.
        decay (`float` or `torch.Tensor`):
            A scalar, one value per row `(B, 1)`, or one per token `(B, T)`. It is treated as a constant.
        reverse (`bool`, *optional*, defaults to `False`):
            Whether to run from the last token to the first.

    Returns:
        `torch.Tensor`: `y` of shape `(B, T)`, differentiable in `x`. Computed and returned in float32 (float64 if `x`
        is float64), also under autocast.

    Raises:
        ValueError: If `x` is not 2-dimensional, `decay` has another shape than those above, or `decay` requires a
            gradient.

    Example:

    ```python
    >>> linear_recurrence(torch.tensor([[1.0, 2.0, 4.0]]), 0.5)
    tensor([[1.0000, 2.5000, 5.2500]])
    ```
    """
    if x.dim() != 2:
        raise ValueError(f"linear_recurrence: `x` must have shape (B, T), got {tuple(x.shape)}.")
    if not isinstance(decay, torch.Tensor):
        decay = torch.tensor(decay, dtype=torch.float64, device=x.device)
    if decay.requires_grad:
        raise ValueError(
            "linear_recurrence: `decay` requires a gradient, but the result is differentiable in `x` only."
        )
    if decay.dim() == 0 or decay.shape == (1,):
        decay = decay.reshape(1, 1)
    batch, length = x.shape
    if decay.shape not in ((1, 1), (batch, 1), (batch, length)):
        raise ValueError(
            f"linear_recurrence: `decay` must be a scalar or have shape ({batch}, 1) or ({batch}, {length}) to go with "
            f"`x` of shape ({batch}, {length}), got {tuple(decay.shape)}."
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    # The few values of a constant decay are squared log2(T) times: in float64 that costs nothing and loses nothing.
    decay = decay.to(device=x.device, dtype=torch.float64 if decay.shape[-1] == 1 else dtype)
    return _LinearRecurrence.apply(x.to(dtype), decay, reverse)


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, decay, reverse):
        ctx.save_for_backward(decay)
        ctx.reverse = reverse
        if reverse:
            return _scan(x.flip(-1), decay.flip(-1)).flip(-1)
        return _scan(x, decay)

    @staticmethod
    def backward(ctx, grad):
        # The transpose of the recurrence is the recurrence the other way round, with the decays one place on.
        (decay,) = ctx.saved_tensors
        if decay.shape[-1] != 1:
            decay = decay.roll(1 if ctx.reverse else -1, dims=-1)
        return _LinearRecurrence.apply(grad, decay, not ctx.reverse), None, None


def _scan(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """`y_t = decay_t · y_{t-1} + x_t` for `x` of shape `(B, T)` and `decay` of shape `(1 | B, 1)` or `(B, T)`."""
    length = x.shape[-1]
    if length <= 1:
        return x.clone()
    pairs = length // 2
    if decay.shape[-1] == 1:
        into_odd = into_even = decay.to(x.dtype)
        over_pair = decay * decay
    else:
        into_odd, into_even = decay[:, 1::2], decay[:, 2::2]
        over_pair = into_odd * decay[:, 0 : 2 * pairs : 2]
    # y at the odd positions obeys a recurrence of half the length ...
    odd = _scan(torch.addcmul(x[:, 1::2], into_odd, x[:, 0 : 2 * pairs : 2]), over_pair)
    # ... and each even position is one step on from the odd one before it.
    y = x.clone()
    y[:, 1::2] = odd
    y[:, 2::2].addcmul_(into_even, odd[:, : (length - 1) // 2])
    return y
