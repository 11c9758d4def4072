"""Eligibility traces over the log-probabilities of a completion, as in GRPO-λ (arXiv:2510.00194)."""

import math

import torch
import torch.nn.functional as F

from .recurrence import linear_recurrence


def eligibility_trace(
    x: torch.Tensor,
    mask: torch.Tensor,
    decay: float,
    style: str = "recent",
    floor: float = 0.0,
    normalization: str = "none",
) -> torch.Tensor:
    r"""
    Apply the trace operator S of GRPO-λ to a per-token quantity, usually the log-ratio.

    \\( (S x)_t = \sum_{j \le t} w(t, j) \, x_j \\), with \\( a = \gamma\lambda \\) and

    | style | \\( w(t, j) \\), \\( j < t \\) | source |
    | --- | --- | --- |
    | `"recent"` | \\( \max(\text{floor}, a^{t-j}) \\) | eq. 1 |
    | `"both"` | \\( \max(\text{floor}, a^{\min(j, t-j)}) \\) | eq. 2 |

    and \\( w(t, t) = 1 \\). Only tokens with `mask = 1` are time steps: the others (padding, tool output) contribute
    nothing and do not add to the distance between the tokens around them. The cost is linear in T. At `decay=0` S is
    the identity for both styles, so that λ = 0 is GRPO (read literally, eq. 2 would keep the first token at weight 1).

    Args:
        x (`torch.Tensor`):
            Values of shape `(B, T)`. Those outside the mask are ignored, NaN included.
        mask (`torch.Tensor`):
            Trained tokens of the completions, shape `(B, T)`, 0/1 or boolean.
        decay (`float`):
            \\( a = \gamma\lambda \\) in [0, 1].
        style (`str`, *optional*, defaults to `"recent"`):
            `"recent"` or `"both"`.
        floor (`float`, *optional*, defaults to `0.0`):
            Smallest weight that an earlier token can have, in [0, 1] (the ε of eqs. 17 and 18).
        normalization (`str`, *optional*, defaults to `"none"`):
            `"none"` as in the paper; `"mean"` divides each row by the mean of its effective weights, so that they
            average 1 over the completion.

    Returns:
        `torch.Tensor`: `S x` of shape `(B, T)` in float32 (float64 if `x` is), zero outside the mask, differentiable
        in `x`.
    """
    length = x.shape[-1]
    mask = mask.bool()
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = torch.where(mask, x, 0).to(dtype)
    if decay == 0 or length == 0:
        return x

    # Move the trained tokens of each row to its front, where column = time step; the rest go to a column of their own.
    step = torch.where(mask, mask.cumsum(-1) - 1, length)
    dense = x.new_zeros(x.shape[0], length + 1).scatter(1, step, x)[:, :length]
    traced = _trace_dense(dense, decay, style, floor)
    traced = torch.where(mask, F.pad(traced, (0, 1)).gather(1, step), 0)
    if normalization == "mean":
        # Row sums and column sums have the same total, and the row sums are the cheaper ones.
        total_weight = trace_weights(mask, decay, style, floor).sum(-1, keepdim=True)
        traced = traced * (mask.sum(-1, keepdim=True) / total_weight.clamp(min=1))
    return traced


def _trace_dense(x: torch.Tensor, decay: float, style: str, floor: float) -> torch.Tensor:
    """S for rows without gaps: the far weights are counted by cumulative sums, the near ones by the recurrence."""
    t = torch.arange(x.shape[-1], device=x.device)
    # Weights a^l fall under the floor after `reach` steps.
    reach = len(t) if floor == 0 or decay == 1 else int(math.log(floor) / math.log(decay) + 1e-9)
    recent = linear_recurrence(x, decay)  # Σ_{j≤t} a^{t-j} x_j
    if style == "recent" and reach >= len(t):
        return recent
    # Tokens up to `early_end` are weighed from the start, those after `late_start` from row t, the floor is between.
    early_end = (t // 2).clamp(max=reach) if style == "both" else torch.full_like(t, -1)
    late_start = torch.maximum(early_end, t - reach - 1)
    power = torch.pow(torch.tensor(decay, dtype=torch.float64, device=x.device), (t - late_start).double())
    traced = recent - power.to(x.dtype) * _column(recent, late_start)
    if style == "both":
        weight = torch.pow(torch.tensor(decay, dtype=torch.float64, device=x.device), t.double())
        traced = traced + _column(linear_recurrence(weight.to(x.dtype) * x, 1.0), early_end)
    if floor > 0:
        total = linear_recurrence(x, 1.0)
        traced = traced + floor * (_column(total, late_start) - _column(total, early_end))
    return traced


def _column(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns of `x` at `index`, where -1 is the empty sum before the first."""
    return F.pad(x, (1, 0))[:, index + 1]


def trace_weights(mask: torch.Tensor, decay: float, style: str = "recent", floor: float = 0.0) -> torch.Tensor:
    r"""
    Row sums \\( S \mathbf{1} \\) of the trace operator: the weight \\( w_t = \sum_{l \le t} w(t, t-l) \\) of GRPO-λ's
    ε-weight update (algorithm 2), e.g. \\( (1 - a^{t+1})/(1 - a) \\) for `"recent"`.

    Args:
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`.
        decay, style, floor:
            As in [`eligibility_trace`].

    Returns:
        `torch.Tensor`: Weights of shape `(B, T)` in float32, zero outside the mask.
    """
    return eligibility_trace(mask.float(), mask, decay, style, floor)


def adjoint_trace(
    x: torch.Tensor,
    mask: torch.Tensor,
    decay: float,
    style: str = "recent",
    floor: float = 0.0,
    normalization: str = "none",
) -> torch.Tensor:
    r"""
    Apply the transpose of the trace operator: \\( (S^\top x)_j = \sum_{t \ge j} w(t, j) \, x_t \\).

    With `x = 1` these are the effective weights of GRPO-λ: when the ratio is 1, the gradient of the ε-trace loss is
    GRPO's with token j weighted by \\( (S^\top \mathbf{1})_j \\), e.g. \\( (1 - a^{T-j})/(1 - a) \\) for `"recent"`.

    Args:
        x (`torch.Tensor`):
            Values of shape `(B, T)`.
        mask, decay, style, floor, normalization:
            As in [`eligibility_trace`].

    Returns:
        `torch.Tensor`: `Sᵀ x` of shape `(B, T)` in float32, zero outside the mask, without a gradient.
    """
    mask = mask.bool()
    x = torch.where(mask, x.detach(), 0)
    with torch.enable_grad():
        inputs = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        inputs.requires_grad_()
        outputs = eligibility_trace(inputs, mask, decay, style, floor, normalization)
        (weights,) = torch.autograd.grad(outputs, inputs, x.to(inputs.dtype))
    return weights
